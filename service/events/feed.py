"""Reads the outbox in sequence: one page, or a page that waits for its first event."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Select, func, or_, select, union_all

from service.db.batching import BatchingStore
from service.db.list_indexes import COMMON, RARE_EVENT
from service.db.paging import PAGE_BYTES, Row, courtesy, in_batches, matching, that_fit
from service.db.tables import counters, events
from service.events.documents import event_document
from service.links import Links
from service.strict_json import compact_json

LOOK_S = 0.5  # between reads, because a hint that there is something new may be lost


@dataclass(frozen=True, slots=True)
class Entry:
    """An event as its readers get it: `document` is JSON in UTF-8."""

    sequence: int
    id: str
    owner: str
    type: str
    task_id: str | None
    document: bytes
    time: int = 0
    traceparent: str | None = None  # of its task

    @property
    def size(self) -> int:
        return len(self.document) + 1  # with a comma


size_of = attrgetter("size")


class EntryPage(NamedTuple):
    """Events after a place. `last`: the last place that was examined. `forgotten`: the last place
    that retention has deleted, or 0. `full`: there may be more.
    """

    entries: list[Entry]
    last: int
    forgotten: int
    full: bool


def event_list(
    connection: Connection,
    links: Links,
    owner: str | None,
    after: int,
    limit: int,
    types: Sequence[str] = (),
    task_id: str | None = None,
    most: int = PAGE_BYTES,
) -> EntryPage:
    """Events after a place, in sequence: at most `limit`, and at most `most` bytes, unless the
    first one alone has more.

    `forgotten` is read twice: before the events, so that a reader of an empty outbox moves on, and
    after them, so that a deletion in between is reported.
    """
    last = outbox_end(connection)
    statement = matching(select(events), events, owner=owner, task_id=task_id)
    statement = statement.where(events.c.sequence <= last)
    usual = any("*" in each or each in COMMON for each in types)
    rare = types and task_id is None and not usual
    if types and not rare:
        statement = statement.where(type_conditions(types))

    def read(place: int, count: int) -> list[Entry]:
        if rare:
            some = statement.where(events.c.sequence.in_(_places(owner, place, count, types)))
        else:
            some = statement.where(events.c.sequence > place)
        some = some.order_by(events.c.sequence).limit(count)
        return [_entry(row, links) for row in connection.execute(some).mappings()]

    place_of = attrgetter("sequence")
    candidates = in_batches(read, place_of, size_of, after, limit, courtesy(connection))
    entries, cut = that_fit(candidates, size_of, most)
    full = cut or len(entries) == limit
    place = entries[-1].sequence if full else max(last, after)
    return EntryPage(entries, place, _forgotten(connection), full)


def _places(owner: str | None, place: int, count: int, types: Sequence[str]) -> Select[Any]:
    """The next places of events of each of these types, by an index of events that are rare."""
    selects = []
    for type in dict.fromkeys(types):
        some = matching(select(events.c.sequence), events, owner=owner, type=type)
        some = some.where(RARE_EVENT, events.c.sequence > place)
        selects.append(select(some.order_by(events.c.sequence).limit(count).subquery().c.sequence))
    return select(union_all(*selects).subquery().c.sequence)


def _entry(row: Row, links: Links) -> Entry:
    document = compact_json(event_document(row, links)).encode()
    names = ("sequence", "id", "owner", "type", "task_id", "time", "traceparent")
    return Entry(**{name: row[name] for name in names}, document=document)


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
    gone: Callable[[], Awaitable[bool]],
) -> tuple[list[Entry], int, bool]:
    """Waits up to `wait_s` seconds for events after a place, or reads from the oldest. Returns the
    events, the last place that was examined, and whether retention deleted events before it that
    the reader has not seen. Looks no more once the reader is `gone`.
    """
    clock = asyncio.get_running_loop().time
    deadline = clock() + wait_s
    with store.signals.listen("events") as emitted:
        while True:
            emitted.clear()
            page = await store.read(event_list, links, owner, after or 0, limit, types, task_id)
            resync = after is not None and after < page.forgotten
            left = deadline - clock()
            if page.entries or resync or left <= 0 or store.signals.stopping or await gone():
                return page.entries, page.last, resync
            await store.signals.wait(emitted, min(left, LOOK_S))
