"""What a store can do."""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from sqlalchemy import Connection

from service.db.transaction import Lease, Transaction

Item = TypeVar("Item")


Result = TypeVar("Result")


P = ParamSpec("P")


class Workers(Protocol):
    """What the store asks of the workers of its process."""

    def reserve(self) -> dict[str, int]:
        """Takes every free place, by stage; what a transaction did not use comes back with
        `take`.
        """

    def take(self, leased: Iterable[Lease], unused: Mapping[str, int]) -> None:
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
