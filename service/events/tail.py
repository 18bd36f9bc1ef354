"""Streams of events. The end of the outbox is read once for all streams of a process.

A stream is a place in the outbox. A slow reader holds no buffer and blocks no other reader. A
stream that is behind the buffered events reads the store itself, a page at a time, until it has
caught up.
"""

import asyncio
from bisect import bisect_right
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter

from service.db.batching import BatchingStore
from service.db.paging import that_fit
from service.errors import StoreUnavailable
from service.events.documents import type_matches
from service.events.feed import LOOK_S, Entry, event_list, outbox_begin, outbox_end
from service.links import Links
from service.queue.stage import log_failure

PAGE = 100  # events
KEPT, KEPT_SIZE = 2000, 16 << 20  # buffered at the end of the outbox: events, bytes
# Older events are read again: links in the buffer expire, and tasks in it may have been erased.
KEPT_MS = 5000
SENT_SIZE = 64 << 10  # bytes per step of a stream, unless one event alone has more


@dataclass(frozen=True, slots=True)
class StreamFilter:
    """Which events a stream shows. `owner` None: all owners'. No `types`: all types."""

    owner: str | None
    types: Sequence[str] = ()
    task_id: str | None = None

    def takes(self, entry: Entry) -> bool:
        return (
            self.owner in (None, entry.owner)
            and self.task_id in (None, entry.task_id)
            and (not self.types or any(type_matches(pattern, entry.type) for pattern in self.types))
        )


@dataclass(frozen=True, slots=True)
class Gone:
    """Retention has deleted events after the stream's place. The stream goes on with `oldest`."""

    oldest: int


class Tail:
    """A job of every process that streams. It reads while there is a stream."""

    def __init__(self, store: BatchingStore, links: Links) -> None:
        self._store = store
        self._links = links
        self._begin: int | None = None  # all events after it, up to `_end`, are buffered
        self._end = 0
        self._entries: list[Entry] = []
        self._size = 0
        self._opened = asyncio.Event()
        self.streams = 0

    async def run(self) -> None:
        signals = self._store.signals
        with signals.listen("events") as emitted:
            while not signals.stopping:
                if not self.streams:
                    self._begin, self._end, self._entries, self._size = None, 0, [], 0
                    self._opened.clear()
                    await self._opened.wait()
                emitted.clear()
                more = False
                try:
                    more = await self._read()
                except StoreUnavailable:  # logged by the workers
                    pass
                except Exception as error:  # noqa: BLE001 - logged, and read again
                    log_failure("tail", None, None, LOOK_S, error)
                await signals.wait(emitted, 0 if more else LOOK_S)

    async def _read(self) -> bool:
        """Buffers a page of new events. True: there may be more."""
        if self._begin is None:
            self._begin = self._end = await self._store.read(outbox_end)
            self._store.signals.notify(["tail"])
        # If one event of the page cannot be read, none is buffered and the page is read again.
        page = await self._store.read(event_list, self._links, None, self._end, PAGE)
        self._entries += page.entries
        self._size += sum(entry.size for entry in page.entries)
        dropped, oldest = 0, self._store.clock() - KEPT_MS
        while dropped < len(self._entries) and (
            len(self._entries) - dropped > KEPT
            or self._size > KEPT_SIZE
            or self._entries[dropped].time < oldest
        ):
            self._begin = self._entries[dropped].sequence
            self._size -= self._entries[dropped].size
            dropped += 1
        del self._entries[:dropped]
        if self._end != page.last:
            self._end = page.last
            self._store.signals.notify(["tail"])
        return page.full

    @contextmanager
    def open(self) -> Iterator[None]:
        self.streams += 1
        self._opened.set()
        try:
            yield
        finally:
            self.streams -= 1

    async def follow(
        self, after: int, wanted: StreamFilter, quiet_s: float
    ) -> AsyncIterator[Sequence[Entry] | Gone]:
        """Events after a place, in sequence. An empty sequence when there was no event for
        `quiet_s` seconds.

        Only within `open`. Ends when the process stops. Raises StoreUnavailable.
        """
        place = after
        reported = 0  # the last deleted place that the reader knows of
        signals, clock = self._store.signals, asyncio.get_running_loop().time
        quiet_at = clock() + quiet_s
        with signals.listen("tail") as moved:
            while not signals.stopping:
                moved.clear()
                before = place
                if self._begin is None or place < self._begin:
                    mine = wanted.owner, place, PAGE, wanted.types, wanted.task_id, SENT_SIZE
                    page = await self._store.read(event_list, self._links, *mine)
                    entries, place = page.entries, page.last
                    if max(before, reported) < page.forgotten:
                        reported = page.forgotten
                        yield Gone(await self._store.read(outbox_begin))
                else:
                    entries, place = self._buffered(place, wanted)
                if not entries and place == before:
                    await signals.wait(moved, quiet_at - clock())
                if entries or clock() >= quiet_at:  # also while only events of other owners arrive
                    yield entries
                    quiet_at = clock() + quiet_s

    def _buffered(self, place: int, wanted: StreamFilter) -> tuple[list[Entry], int]:
        """The next entries from the buffer, and the new place."""
        start = bisect_right(self._entries, place, key=attrgetter("sequence"))
        kept = self._entries[start : start + PAGE]
        matches = (entry for entry in kept if wanted.takes(entry))
        entries, _ = that_fit(matches, lambda entry: entry.size, SENT_SIZE)
        if entries and kept[-1] is not entries[-1]:
            return entries, entries[-1].sequence
        return entries, kept[-1].sequence if len(kept) == PAGE else max(place, self._end)
