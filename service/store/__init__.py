"""What a store can do. Two implement it, `sqlite` and `postgres`; one contract suite holds both.

Writes are operations: synchronous functions over a list of items, `operation(tx, items) ->
results`, in one transaction with whatever else waits at that moment (`committer`). Reads are
functions of a connection. Neither knows its dialect.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from sqlalchemy import Connection, Table, bindparam, insert, update

from service.model import JSON

LEASE_MS = 30_000
RENEW_S = 10.0

Item = TypeVar("Item")
Result = TypeVar("Result")
P = ParamSpec("P")


@dataclass(frozen=True, slots=True)
class Grant:
    """The right to work on one row until the lease ends; a finish with an old `fence` changes
    nothing.
    """

    stage: str
    key: str
    fence: int
    attempts: int


@dataclass(slots=True)
class Emitted:
    """An event of this transaction; it has its `sequence` once the transaction is committed."""

    id: str
    owner: str
    type: str
    task_id: str | None
    data: JSON
    terminal: bool = False
    task_callback: bool = False  # the task has a callback_url of its own
    called_back_at: int | None = None
    sequence: int = 0
    deliveries: int = 0


@dataclass(slots=True)
class Transaction:
    """What an operation works with. `now` is the store's clock; `slots` are the free places of this
    process's workers.
    """

    connection: Connection
    now: int
    process: str
    new_id: Callable[[str, int], str]
    slots: dict[str, int] = field(default_factory=dict)
    granted: list[Grant] = field(default_factory=list)
    emitted: list[Emitted] = field(default_factory=list)
    steps: list[JSON] = field(default_factory=list)
    touched: set[str] = field(
        default_factory=set
    )  # ids of tasks that changed, for those who wait for them
    due: set[str] = field(default_factory=set)  # stages that have work which nobody was granted

    inserts: dict[Table, list[JSON]] = field(default_factory=dict)
    changes: dict[Table, dict[str, JSON]] = field(default_factory=dict)

    def id(self, kind: str) -> str:
        return self.new_id(kind, self.now)

    def step(self, task_id: str, step: str, **detail: Any) -> None:
        """Adds a line to the task's timeline."""
        self.steps.append({"task_id": task_id, "time": self.now, "step": step, "detail": detail})

    def insert(self, table: Table, row: JSON) -> None:
        """Adds a row, at the next `write`; rows of one table must name the same columns."""
        self.inserts.setdefault(table, []).append(row)

    def change(self, table: Table, id: str, values: Mapping[str, Any]) -> None:
        """Changes the row with this id, at the next `write`."""
        if values:
            self.changes.setdefault(table, {}).setdefault(id, {}).update(values)

    def write(self) -> None:
        """Sends what is gathered, a statement for many rows; after each operation, and before one
        reads what it wrote.
        """
        for table, rows in self.inserts.items():
            self.connection.execute(insert(table), rows)
        self.inserts.clear()
        for table, changed in self.changes.items():
            alike: dict[frozenset[str], list[JSON]] = {}
            for id in sorted(changed):
                alike.setdefault(frozenset(changed[id]), []).append({"row_id": id, **changed[id]})
            for names, parameters in alike.items():
                statement = update(table).where(table.c.id == bindparam("row_id"))
                self.connection.execute(
                    statement.values({name: bindparam(name) for name in sorted(names)}), parameters
                )
        self.changes.clear()


class Workers(Protocol):
    """What the store asks of the workers of its process."""

    def reserve(self) -> dict[str, int]:
        """Takes every free place, by stage; what a transaction did not use comes back with
        `take`.
        """

    def take(self, granted: Iterable[Grant], unused: Mapping[str, int]) -> None:
        """Starts the granted work and frees the unused places."""

    def committed(self, tx: Transaction) -> None:
        """Tells of a committed transaction: events to log, stages with work that is due."""

    def hinted(self, stages: Iterable[str] | None) -> None:
        """Stages may have work that is due; None: any may."""


class Signals:
    """Wakes those in this process who wait for a task, the outbox or work; a hint, never a
    promise.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self.stopping = False

    @contextmanager
    def listen(self, key: str) -> Iterator[asyncio.Event]:
        event = asyncio.Event()
        self._waiting.setdefault(key, set()).add(event)
        try:
            yield event
        finally:
            self._waiting[key].discard(event)
            if not self._waiting[key]:
                del self._waiting[key]

    def notify(self, keys: Iterable[str]) -> None:
        for key in keys:
            for event in self._waiting.get(key, ()):
                event.set()

    def stop(self) -> None:
        """The process is about to end: nobody is to wait any longer."""
        self.stopping = True
        self.notify(list(self._waiting))

    async def wait(self, event: asyncio.Event, seconds: float) -> bool:
        """Waits for an event from `listen`; True if it came, False after the time or when the
        process stops.
        """
        if self.stopping or seconds <= 0:
            return False
        try:
            async with asyncio.timeout(
                seconds
            ):  # `wait_for` of Python 3.11 loses a cancellation that meets the event
                await event.wait()
        except TimeoutError:
            return False
        return not self.stopping


class Store(Protocol):
    """Durable state. `write` returns after the commit and raises `StoreUnavailable` when there was
    none.
    """

    signals: Signals
    process: str

    def clock(self) -> int:
        """Its time, or near it, in milliseconds since 1970 UTC: for what is compared with times
        that are kept there.
        """

    async def write(
        self,
        operation: Callable[[Transaction, Sequence[Item]], Sequence[Result]],
        item: Item,
        *,
        urgent: bool = False,
    ) -> Result:
        """Runs the operation over this item and whatever else waits, in one transaction; what is
        `urgent` goes first.
        """

    async def read(
        self, query: Callable[Concatenate[Connection, P], Result], *args: P.args, **kwargs: P.kwargs
    ) -> Result:
        """Runs a query on a connection that sees every commit before it."""

    def attach(self, workers: Workers) -> None:
        """From now on rows may be born leased to these workers."""

    def detach(self) -> None:
        """No more leases are handed out: the process is about to stop."""
