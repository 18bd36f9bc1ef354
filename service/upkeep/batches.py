"""How much of what goes a transaction takes: so many rows, so many bytes, however much a single
task has gathered.

What has more goes in several, its callbacks, timeline and answers first and its own row last: dying
in between leaves something that is found again. All is weighed by reading, while others write. A
row that is larger by itself, as a request of a MiB and its event, goes alone.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    Table,
    Text,
    cast,
    delete,
    func,
    literal_column,
    select,
    update,
)

from service.db.tables import attempts, callbacks, deliveries, events, images, steps, tasks
from service.db.transaction import Transaction
from service.strict_json import JSON

ERASED = "erased"
BARE = 4096  # characters: a smaller event is left to the end, as those without content are small


@dataclass(frozen=True, slots=True)
class Weight:
    rows: int
    bytes: int  # or characters, of JSON


@dataclass(frozen=True, slots=True)
class Limit(Weight):
    """What a transaction takes. SQLite may overwrite what it deletes, so that bytes cost what
    writing them does.
    """

    def fits(self, weights: Iterable[Weight]) -> int:
        """How many of the first are within it together."""
        rows = size = count = 0
        for weight in weights:
            rows, size = rows + weight.rows, size + weight.bytes
            if rows > self.rows or size > self.bytes:
                break
            count += 1
        return count


LIMIT = Limit(100, 512 << 10)  # so that nobody waits 50 ms for the writer, on a slow disk either


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of a task or a delivery, by the names of their tables: all of them (`whole`), or as many
    as fit.
    """

    of: str
    ids: Mapping[str, Sequence[Any]]
    weight: Weight
    whole: bool

    def some(self, table: Table) -> Sequence[Any]:
        return self.ids.get(table.name, ())


@dataclass(frozen=True, slots=True)
class Old:
    """What a transaction is to take: these with all that they have; or, as the first has too much,
    a part of that before.
    """

    whole: list[str]
    part: Part | None = None


Sized = tuple[Table, Any, int]  # a row's table, id and size


def length(column: ColumnElement[Any]) -> ColumnElement[int]:
    return func.coalesce(func.length(column), 0)


def text_length(column: ColumnElement[Any]) -> ColumnElement[int]:
    return func.length(cast(column, Text))


OWN = (
    length(tasks.c.body)
    + length(tasks.c.prompt)
    + text_length(tasks.c.request)
    + text_length(tasks.c.metadata)
)  # of a task's row


def _read(connection: Connection, limit: Limit, *sources: tuple[Table, Select[Any]]) -> list[Sized]:
    """Rows that may go before what they belong to: at most one more than are within the limit of
    each table.
    """
    return [
        (table, id, size)
        for table, found in sources
        for id, size in connection.execute(found.limit(limit.rows + 1))
    ]


def _part(of: str, found: Sequence[Sized], own: Weight, limit: Limit) -> Part:
    """All that was found, if it fits with its owner's own row; else as much as fits alone, and one
    at least.
    """
    weights = [Weight(1, size) for _, _, size in found]
    whole = not found or limit.fits([*weights, own]) > len(found)
    taken = found if whole else found[: max(1, limit.fits(weights))]
    ids: dict[str, list[Any]] = {}
    for table, id, _ in taken:
        ids.setdefault(table.name, []).append(id)
    rows, size = (own.rows, own.bytes) if whole else (0, 0)
    return Part(of, ids, Weight(rows + len(taken), size + sum(row[2] for row in taken)), whole)


def _own(connection: Connection, task_id: str) -> Weight:
    many = select(func.count()).select_from(images).where(images.c.task_id == task_id)
    return Weight(
        1 + connection.execute(many).scalar_one(),
        connection.execute(select(OWN).where(tasks.c.id == task_id)).scalar() or 0,
    )


def stripped_part(connection: Connection, task_id: str, limit: Limit) -> Part:
    """What goes with the content of an old task: callbacks and timeline."""
    called = select(callbacks.c.id, length(callbacks.c.body)).where(callbacks.c.task_id == task_id)
    noted = select(steps.c.id, text_length(steps.c.detail)).where(steps.c.task_id == task_id)
    return _part(
        task_id,
        _read(connection, limit, (callbacks, called), (steps, noted)),
        _own(connection, task_id),
        limit,
    )


def erased_part(connection: Connection, task_id: str, limit: Limit) -> Part:
    """What goes with the content of an erased task: bodies of callbacks, timeline, answers of
    subscribers, what events tell.
    """
    called = select(callbacks.c.id, length(callbacks.c.body)).where(
        callbacks.c.task_id == task_id, length(callbacks.c.body) > 0
    )
    noted = select(steps.c.id, text_length(steps.c.detail)).where(steps.c.task_id == task_id)
    told = select(attempts.c.id, length(attempts.c.answer)).join(
        deliveries, deliveries.c.id == attempts.c.delivery_id
    )
    answered = told.where(deliveries.c.task_id == task_id, attempts.c.answer.is_not(None))
    found = _read(connection, limit, (callbacks, called), (steps, noted), (attempts, answered))
    return _part(
        task_id, found + _telling(connection, task_id, limit), _own(connection, task_id), limit
    )


def _telling(connection: Connection, task_id: str, limit: Limit) -> list[Sized]:
    """A task's events that are larger than without content."""
    size = text_length(events.c.data)
    about = select(events.c.id, size).where(
        events.c.task_id == task_id, events.c.type.startswith("image.task."), size > BARE
    )
    found = []
    for row in _read(connection, limit, (events, about.order_by(events.c.sequence))):
        data = connection.execute(select(events.c.data).where(events.c.id == row[1])).scalar_one()
        if data != bare_document(data):
            found.append(row)
    return found


def attempts_part(connection: Connection, delivery_id: str, limit: Limit) -> Part:
    """The attempts of a delivery."""
    made = select(attempts.c.id, length(attempts.c.answer) + length(attempts.c.error)).where(
        attempts.c.delivery_id == delivery_id
    )
    return _part(delivery_id, _read(connection, limit, (attempts, made)), Weight(1, 0), limit)


def first(
    connection: Connection,
    found: Select[Any],
    limit: Limit,
    part_of: Callable[[Connection, str, Limit], Part],
) -> Old | None:
    """The first of what a statement finds, as id, rows and bytes, that are within the limit
    together.
    """
    rows = list(connection.execute(found))
    if not rows:
        return None
    whole = [row[0] for row in rows[: limit.fits(Weight(row[1], row[2]) for row in rows)]]
    if whole:
        return Old(whole)
    part = part_of(connection, rows[0][0], limit)
    return Old([part.of]) if part.whole else Old([], part)


def counted(
    table: Table, of: ColumnElement[bool], size: ColumnElement[int] | None = None
) -> list[ColumnElement[int]]:
    """How many rows of a table belong to another's, and how many bytes they have."""
    total = func.coalesce(func.sum(literal_column("0") if size is None else size), 0)
    return [
        select(number).where(of).scalar_subquery() for number in (func.count(table.c.id), total)
    ]


# --- taking a part ---


def take_stripped(tx: Transaction, part: Part) -> int:
    """Removes a part of what an old task has; how many rows."""
    removed = 0
    for table in (callbacks, steps):
        ids = part.some(table)
        removed += (
            tx.connection.execute(
                delete(table).where(table.c.id.in_(ids), table.c.task_id == part.of)
            ).rowcount
            if ids
            else 0
        )
    return removed


def take_erased(tx: Transaction, part: Part) -> None:
    """Removes a part of what a task has that is erased. Callbacks stay as counted, events in their
    places, attempts as made.
    """
    execute = tx.connection.execute
    if ids := part.some(callbacks):
        execute(update(callbacks).where(callbacks.c.id.in_(ids)).values(body=b""))
    if ids := part.some(steps):
        execute(delete(steps).where(steps.c.id.in_(ids)))
    if ids := part.some(attempts):
        execute(update(attempts).where(attempts.c.id.in_(ids)).values(answer=None))
    if ids := part.some(events):
        for event in execute(select(events.c.id, events.c.data).where(events.c.id.in_(ids))):
            tx.change(events, event.id, {"data": bare_document(event.data)})


# --- what stays ---


def bare_error(error: JSON | None) -> JSON | None:
    """An error without its message, which may quote the prompt."""
    return error and {"code": error["code"], "message": ERASED, "type": error["type"]}


def bare_document(document: JSON) -> JSON:
    """An event's task without content: ids, times, state and figures."""
    return {
        **document,
        "error": bare_error(document["error"]),
        "metadata": {},
        "request": {},
        "images": [],
    }
