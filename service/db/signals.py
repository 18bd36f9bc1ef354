"""Hints that the commits of a store give to the waiting requests and workers of its process."""

import asyncio
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from service.db.transaction import Lease, Transaction


class Workers(Protocol):
    """The workers of a process, as its store calls them."""

    def reserve(self) -> dict[str, int]:
        """Takes every free slot, by stage. Unused slots come back with `take`."""

    def shares(self) -> dict[str, dict[str, int]]:
        """The slots in use by each owner, for the stages whose slots owners share."""

    def take(self, leased: Iterable[Lease], unused: Mapping[str, int]) -> None:
        """Starts the leased work and frees the unused slots."""

    def committed(self, tx: Transaction) -> None:
        """Receives each committed transaction, with its events and its stages with due work."""

    def hinted(self, stages: Iterable[str] | None) -> None:
        """Stages may have due work. None: any stage may."""


class Signal(asyncio.Event):
    """`record`: what a commit of this process made of the task. None: it has to be read."""

    record: object = None


class Signals:
    """Wakes the coroutines of this process that wait for a task or for the outbox. A signal is a
    hint and never a promise.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, set[Signal]] = {}
        self.stopping = False

    @contextmanager
    def listen(self, key: str) -> Iterator[Signal]:
        event = Signal()
        self._waiting.setdefault(key, set()).add(event)
        try:
            yield event
        finally:
            self._waiting[key].discard(event)
            if not self._waiting[key]:
                del self._waiting[key]

    def notify(self, keys: Iterable[str], records: Mapping[str, object] | None = None) -> None:
        for key in keys:
            for event in self._waiting.get(key, ()):
                event.record = (records or {}).get(key)
                event.set()

    def stop(self) -> None:
        """The process is about to end: every wait ends now."""
        self.stopping = True
        self.notify(list(self._waiting))

    async def wait(self, event: asyncio.Event, seconds: float) -> bool:
        """Waits for an event from `listen`. False: it came too late, or the process stops."""
        if self.stopping or seconds <= 0:
            return False
        try:
            # `wait_for` of Python 3.11 loses a cancellation that meets the event.
            async with asyncio.timeout(seconds):
                await event.wait()
        except TimeoutError:
            return False
        return not self.stopping
