"""How many requests an API key may make: a sliding window for each key, in this process's memory."""

import math
import time

from service.errors import ApiError


class KeyLimits:
    """`requests` in the notation of the library `limits`, such as `600/minute`; None: no limit."""

    def __init__(self, requests: str | None) -> None:
        self._limit = None
        if requests is not None:
            from limits import parse
            from limits.aio.storage import MemoryStorage
            from limits.aio.strategies import SlidingWindowCounterRateLimiter  # two numbers a key, however many its requests

            self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())
            self._limit = parse(requests)

    async def count(self, key: str) -> None:
        """Counts a request; ApiError 429 with the seconds until the next is allowed when it is one too many, which does not count."""
        if self._limit is not None and not await self._limiter.hit(self._limit, key):
            allowed_at, _ = await self._limiter.get_window_stats(self._limit, key)
            wait = max(1, math.ceil(allowed_at - time.time()))
            raise ApiError(429, "rate_limit_exceeded", f"the key's limit is reached: {self._limit}", retry_after=wait)
