"""Callbacks go first: the upstream waits for them, and gives up after half a minute. New work
starts when none is in hand.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

from service.errors import StoreUnavailable

PATIENCE_S = 0.25  # so long at most: a flood of callbacks must not stop the work

# Callbacks that are judged and committed at once. Without a limit a burst of thousands is begun
# before any is finished: none is in time.
AT_ONCE = 200
# wait for that; whoever comes then is told at once to come again, as the upstream does after 1, 2
# and 4 s
MOST = 5000
# so long for its turn: the upstream gives up after 10 s, and what comes then is taken all the
# sooner
TURN_S = 5.0


class Precedence:
    """Counts the callbacks in hand; workers ask before they start a job."""

    def __init__(self) -> None:
        self._callbacks = 0
        self._calm = asyncio.Event()
        self._calm.set()
        self._turns = asyncio.Semaphore(AT_ONCE)

    @property
    def in_hand(self) -> int:
        """Callbacks that are being taken."""
        return self._callbacks

    @contextmanager
    def callback(self) -> Iterator[None]:
        """Around the taking of one callback."""
        self._callbacks += 1
        self._calm.clear()
        try:
            yield
        finally:
            self._callbacks -= 1
            if not self._callbacks:
                self._calm.set()

    @asynccontextmanager
    async def turn(self, refused: Callable[[], None]) -> AsyncIterator[None]:
        """Around the commit of one callback, first come first served; StoreUnavailable, and
        `refused` told: there are too many.
        """
        if self._callbacks > MOST:
            refused()
            raise StoreUnavailable("too many callbacks at once")
        try:
            async with asyncio.timeout_at(
                time.monotonic() + TURN_S
            ):  # the loop's own time stands still while it begins a burst
                await self._turns.acquire()
        except TimeoutError:
            refused()
            raise StoreUnavailable("too many callbacks at once") from None
        try:
            yield
        finally:
            self._turns.release()

    async def wait(self) -> None:
        """Returns when no callback is in hand, or after `PATIENCE_S`."""
        if not self._calm.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(
                    PATIENCE_S
                ):  # `wait_for` of Python 3.11 loses a cancellation that meets the event
                    await self._calm.wait()
