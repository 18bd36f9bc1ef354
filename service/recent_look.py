"""Recent looks, which many requests share."""

import asyncio
import math
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

Seen = TypeVar("Seen")
FRESH_S = 0.1


class RecentLook(Generic[Seen]):
    """Shares one look among the requests that come while it runs and `FRESH_S` after it."""

    def __init__(self) -> None:
        self._looking: asyncio.Task[Seen] | None = None
        self._until = math.inf

    async def look(self, begin: Callable[[], Coroutine[Any, Any, Seen]]) -> Seen:
        loop = asyncio.get_running_loop()
        if self._looking is None or loop.time() > self._until:
            self._until = math.inf
            self._looking = loop.create_task(begin())
            self._looking.add_done_callback(lambda _: self._seen_at(loop.time()))
        return await asyncio.shield(self._looking)

    def _seen_at(self, time: float) -> None:
        self._until = time + FRESH_S
