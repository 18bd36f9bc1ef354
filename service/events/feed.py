"""Reads the outbox in sequence: one page, or a page that waits for its first event."""

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import ColumnElement, Connection, func, or_, select

from service.db.batching import BatchingStore
from service.db.paging import Row, matching
from service.db.tables import counters, events
from service.events.documents import event_document
from service.links import Links
from service.strict_json import JSON

LOOK_S = 0.5  # between reads, because a hint that there is something new may be lost


class EventRows(NamedTuple):
    """Events after a place. `last`: the last place that was examined. `forgotten`: the last place
    that retention has deleted, or 0.
    """

    rows: list[Row]
    last: int
    forgotten: int


def event_list(
    connection: Connection,
    owner: str | None,
    after: int,
    limit: int,
    types: Sequence[str] = (),
    task_id: str | None = None,
) -> EventRows:
    """Events after a place, in sequence.

    `forgotten` is read twice: before the events, so that a reader of an empty outbox moves on, and
    after them, so that a deletion in between is reported.
    """
    last = outbox_end(connection)
    statement = matching(select(events), events, owner=owner, task_id=task_id)
    statement = statement.where(events.c.sequence > after, events.c.sequence <= last)
    if types:
        statement = statement.where(type_conditions(types))
    statement = statement.order_by(events.c.sequence).limit(limit)
    rows: list[Row] = list(connection.execute(statement).mappings())
    place = rows[-1]["sequence"] if len(rows) == limit else max(last, after)
    return EventRows(rows, place, _forgotten(connection))


def outbox_begin(connection: Connection) -> int:
    """The place of the oldest event, or the next place if there is no event."""
    oldest = connection.execute(select(func.min(events.c.sequence))).scalar()
    return outbox_end(connection) + 1 if oldest is None else oldest


def outbox_end(connection: Connection) -> int:
    """The last place that readers have been able to see."""
    last = connection.execute(select(func.max(events.c.sequence))).scalar()
    return max(_forgotten(connection), last or 0)


def _forgotten(connection: Connection) -> int:
    mine = counters.c.name == "forgotten"
    value: int = connection.execute(select(counters.c.value).where(mine)).scalar_one()
    return value


def type_conditions(patterns: Sequence[str]) -> ColumnElement[bool]:
    """`type_matches` of `documents` in SQL, for any of the patterns."""
    return or_(*(_type_condition(pattern) for pattern in patterns))


def _type_condition(pattern: str) -> ColumnElement[bool]:
    if pattern == "*":
        return events.c.sequence > 0
    if pattern.endswith(".*"):
        return events.c.type.startswith(pattern[:-1], autoescape=True)
    return events.c.type == pattern


async def read_events(
    store: BatchingStore,
    links: Links,
    owner: str | None,
    after: int | None,
    limit: int,
    types: Sequence[str],
    task_id: str | None,
    wait_s: float,
) -> tuple[list[JSON], int, bool]:
    """Waits up to `wait_s` seconds for events after a place, or reads from the oldest. Returns the
    events, the last place that was examined, and whether retention deleted events before it that
    the reader has not seen.
    """
    clock = asyncio.get_running_loop().time
    deadline = clock() + wait_s
    with store.signals.listen("events") as emitted:
        while True:
            emitted.clear()
            page = await store.read(event_list, owner, after or 0, limit, types, task_id)
            resync = after is not None and after < page.forgotten
            left = deadline - clock()
            if page.rows or resync or left <= 0 or store.signals.stopping:
                return [event_document(row, links) for row in page.rows], page.last, resync
            await store.signals.wait(emitted, min(left, LOOK_S))
