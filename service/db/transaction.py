"""The transaction that operations work with."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache, wraps
from typing import Any, TypeVar

from sqlalchemy import Connection, Insert, Table, Update, bindparam, insert, update

from service.db.prepared import run_many
from service.ops.tracing import Origin
from service.strict_json import JSON

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to work on one row until the lease ends. A finish with an old `fence` changes
    nothing. `owner`: the row's, whose share of the slots the lease takes up. `row`: the record as
    the transaction that leased it left it, which saves the worker a read. None: the transaction
    did not read it.
    """

    stage: str
    key: str
    fence: int
    attempts: int
    owner: str = ""
    row: Any = field(default=None, compare=False, repr=False)


@dataclass(slots=True)
class Emitted:
    """An event of this transaction, with the document of its task as it is now. The flush sets its
    `sequence` and its number of deliveries.
    """

    id: str
    owner: str
    type: str
    task_id: str | None
    data: JSON
    terminal: bool = False
    task_callback: bool = False  # the event also goes to the task's own callback_url
    called_back_at: int | None = None  # when the upstream's first terminal callback arrived
    sequence: int = 0
    deliveries: int = 0


# A function that runs once at the end of the transaction, with the items by key.
Deferred = Callable[..., None]


@dataclass(slots=True)
class Transaction:
    """`now` is the store's time. `slots` are the free slots of this process's workers, by stage.
    `shares` are the slots in use by each owner, for the stages whose slots owners share.

    The committer reads the other fields after the commit: `leased` rows for its workers, events,
    the `touched` tasks for waiting requests (by id, with the record as it is now if it is known),
    and stages with `due` work.
    """

    connection: Connection
    now: int
    process: str
    new_id: Callable[[str, int], str]
    slots: dict[str, int] = field(default_factory=dict)
    shares: dict[str, dict[str, int]] = field(default_factory=dict)
    leased: list[Lease] = field(default_factory=list)
    emitted: list[Emitted] = field(default_factory=list)
    steps: list[JSON] = field(default_factory=list)
    touched: dict[str, object] = field(default_factory=dict)
    due: set[str] = field(default_factory=set)
    costs: set[str] = field(default_factory=set)  # tasks with a cost that this transaction changed
    posted: list[JSON] = field(default_factory=list)  # entries of the ledger
    # What the lines of these tasks say of their origin, and the traces of their events.
    origins: dict[str, Origin] = field(default_factory=dict)
    deferred: dict[Deferred, dict[str, Any]] = field(default_factory=dict)

    inserts: dict[Table, list[JSON]] = field(default_factory=dict)
    changes: dict[Table, dict[str, JSON]] = field(default_factory=dict)

    def id(self, kind: str) -> str:
        return self.new_id(kind, self.now)

    def step(self, task_id: str, step: str, **detail: Any) -> None:
        self.steps.append({"task_id": task_id, "time": self.now, "step": step, "detail": detail})

    def defer(self, function: Deferred, key: str, item: object) -> None:
        """Has the function called at the end of the transaction. A later item with the same key
        replaces an earlier one.
        """
        self.deferred.setdefault(function, {})[key] = item

    def finish(self) -> None:
        """Runs the deferred functions, always in the same order, because they lock counters."""
        for function in sorted(self.deferred, key=lambda each: each.__name__):
            function(self, self.deferred[function])
        self.deferred.clear()

    def insert(self, table: Table, row: JSON) -> None:
        """Adds a row at the next `write`. All rows of one table must name the same columns."""
        self.inserts.setdefault(table, []).append(row)

    def change(self, table: Table, id: str, values: Mapping[str, Any]) -> None:
        """Changes the row with this id at the next `write`."""
        if values:
            self.changes.setdefault(table, {}).setdefault(id, {}).update(values)

    def write(self) -> None:
        """Sends the gathered rows, with one statement for many rows. It runs after each operation.
        An operation calls it before it reads its own changes.
        """
        for table, rows in self.inserts.items():
            run_many(self.connection, inserting(table), rows)
        self.inserts.clear()
        for table, changed in self.changes.items():
            alike: dict[frozenset[str], list[JSON]] = {}
            for id in sorted(changed):
                alike.setdefault(frozenset(changed[id]), []).append({"row_id": id, **changed[id]})
            for names, parameters in alike.items():
                run_many(self.connection, changing(table, names), parameters)
        self.changes.clear()


# Statements that most transactions run are made once. To make one takes as long as to run it.


@cache
def inserting(table: Table) -> Insert:
    return insert(table)


@lru_cache(512)
def changing(table: Table, names: frozenset[str]) -> Update:
    """Sets these columns of the row with the id `row_id`."""
    statement = update(table).where(table.c.id == bindparam("row_id"))
    return statement.values({name: bindparam(name) for name in sorted(names)})


def one_by_one(
    operation: Callable[[Transaction, Item], Result],
) -> Callable[[Transaction, Sequence[Item]], list[Result]]:
    """An operation of the store, made of a function that handles one item."""

    @wraps(operation)
    def run(tx: Transaction, items: Sequence[Item]) -> list[Result]:
        return [operation(tx, item) for item in items]

    return run
