"""The outbox's end, read once for all streams of a process. A stream is a place in it: a slow
reader holds nothing, and nobody up.

Who is behind what is kept here reads the store itself, a page at a time, until it has caught up.
"""

import asyncio
from bisect import bisect_right
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from operator import attrgetter

import structlog

from service.db.paging import Row
from service.db.store import Store
from service.errors import StoreUnavailable
from service.events import event_queries
from service.events.documents import type_matches
from service.events.feed import LOOK_S, render, written
from service.links import Links

log = structlog.get_logger()

PAGE = 100  # events
KEPT, KEPT_SIZE = 2000, 16 << 20  # of the end: events, characters
SENT_SIZE = (
    64 << 10
)  # characters at once to one stream, but for an event that has more: so much a slow reader holds


@dataclass(frozen=True, slots=True)
class Entry:
    """An event as streams send it."""

    sequence: int
    owner: str
    type: str
    task_id: str | None
    document: str  # JSON


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a stream shows; `owner` None: everybody's events, no `types`: all of them."""

    owner: str | None
    types: Sequence[str] = ()
    task_id: str | None = None

    def has(self, entry: Entry) -> bool:
        return (
            self.owner in (None, entry.owner)
            and self.task_id in (None, entry.task_id)
            and (not self.types or any(type_matches(pattern, entry.type) for pattern in self.types))
        )


@dataclass(frozen=True, slots=True)
class Gone:
    """The place that a stream wanted to go on from is no longer kept; it goes on with `oldest`."""

    oldest: int


class Tail:
    """A job of every process that streams; it reads while there is a stream."""

    def __init__(self, store: Store, links: Links) -> None:
        self._store = store
        self._links = links
        self._begin: int | None = None  # all events after it up to `_end` are kept here
        self._end = 0
        self._entries: list[Entry] = []
        self._size = 0
        self._wanted = asyncio.Event()
        self.streams = 0

    async def run(self) -> None:
        signals = self._store.signals
        with signals.listen("events") as written:
            while not signals.stopping:
                if not self.streams:
                    self._begin, self._end, self._entries, self._size = None, 0, [], 0
                    self._wanted.clear()
                    await self._wanted.wait()
                written.clear()
                await signals.wait(written, 0 if await self._looked() else LOOK_S)

    async def _looked(self) -> bool:
        """As `_look`; the streams that wait are not told of a fault, so this goes on."""
        try:
            return await self._look()
        except StoreUnavailable:  # said by whoever promised something
            return False
        except Exception as error:
            log.exception(
                "worker.failed",
                stage="tail",
                key=None,
                attempt=None,
                wait_s=LOOK_S,
                exception=repr(error),
            )
            return False

    async def _look(self) -> bool:
        """Reads what is new; whether there may be more."""
        if self._begin is None:
            self._begin = self._end = await self._store.read(event_queries.outbox_end)
            self._store.signals.notify(["tail"])
        rows, last, _ = await self._store.read(event_queries.event_list, None, self._end, PAGE)
        entries = [
            self._entry(row) for row in rows
        ]  # all or none: what is kept once is read no second time
        self._entries += entries
        self._size += sum(len(entry.document) for entry in entries)
        over = 0
        while len(self._entries) - over > KEPT or self._size > KEPT_SIZE:
            self._begin, self._size, over = (
                self._entries[over].sequence,
                self._size - len(self._entries[over].document),
                over + 1,
            )
        del self._entries[:over]
        if self._end != last:
            self._end = last
            self._store.signals.notify(["tail"])
        return len(rows) == PAGE

    @contextmanager
    def open(self) -> Iterator[None]:
        """Around each stream."""
        self.streams += 1
        self._wanted.set()
        try:
            yield
        finally:
            self.streams -= 1

    async def follow(
        self, after: int | None, wanted: Wanted, quiet_s: float
    ) -> AsyncIterator[Sequence[Entry] | Gone]:
        """Events after a place, in their sequence; None: from now on. An empty sequence when there
        was none for `quiet_s` seconds.

        Only within `open`. Ends when the process stops. StoreUnavailable.
        """
        place = await self._store.read(event_queries.outbox_end) if after is None else after
        told = 0  # the last place that is no longer kept, when that was said
        signals, limit = self._store.signals, PAGE
        clock = asyncio.get_running_loop().time
        quiet_at = clock() + quiet_s
        with signals.listen("tail") as moved:
            while not signals.stopping:
                moved.clear()
                before = place
                if self._begin is None or place < self._begin:
                    rows, place, forgotten = await self._store.read(
                        event_queries.event_list,
                        wanted.owner,
                        place,
                        limit,
                        wanted.types,
                        wanted.task_id,
                    )
                    found = sent_at_once([self._entry(row) for row in rows])
                    if len(found) < len(rows):
                        place = found[-1].sequence
                    limit = (
                        max(1, min(2 * len(found), PAGE)) if rows else PAGE
                    )  # what is not sent was read in vain
                    del rows
                    if max(before, told) < forgotten:
                        told = forgotten
                        yield Gone(await self._store.read(event_queries.outbox_begin))
                else:
                    kept = self._entries[
                        bisect_right(self._entries, place, key=attrgetter("sequence")) :
                    ][:PAGE]
                    found = sent_at_once([entry for entry in kept if wanted.has(entry)])
                    if found and kept[-1] is not found[-1]:
                        place = found[-1].sequence
                    else:
                        place = kept[-1].sequence if len(kept) == PAGE else max(place, self._end)
                    del kept
                if not found and place == before:
                    await signals.wait(moved, quiet_at - clock())
                if found or clock() >= quiet_at:  # whatever others' events moved meanwhile
                    yield found
                    quiet_at = clock() + quiet_s

    def _entry(self, row: Row) -> Entry:
        return Entry(
            row["sequence"],
            row["owner"],
            row["type"],
            row["task_id"],
            written(render(row, self._links)),
        )


def sent_at_once(entries: Sequence[Entry]) -> Sequence[Entry]:
    """As many of the first as fit; one at least."""
    sizes = accumulate(len(entry.document) for entry in entries)
    return entries[: max(1, bisect_right(list(sizes), SENT_SIZE))]
