"""Callbacks go first: the upstream waits for them, and gives up after half a minute. New work starts when none is in hand."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress

PATIENCE_S = 0.25  # so long at most: a flood of callbacks must not stop the work


class Precedence:
    """Counts the callbacks in hand; workers ask before they start a job."""

    def __init__(self) -> None:
        self._callbacks = 0
        self._calm = asyncio.Event()
        self._calm.set()

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

    async def wait(self) -> None:
        """Returns when no callback is in hand, or after `PATIENCE_S`."""
        if not self._calm.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE_S):  # `wait_for` of Python 3.11 loses a cancellation that meets the event
                    await self._calm.wait()
