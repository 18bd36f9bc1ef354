"""The limit of requests for each API key (`DARKROOM_KEY_REQUESTS`)."""

import math
import time

from service.errors import ApiError


class KeyLimits:
    """A limit of requests per API key, such as `600/minute`. None: no limit."""

    def __init__(self, requests: str | None) -> None:
        self._limit = None
        if requests is not None:
            from limits import parse
            from limits.aio.storage import MemoryStorage
            from limits.aio.strategies import SlidingWindowCounterRateLimiter

            # It keeps two numbers per key, independent of the number of requests.
            self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())
            self._limit = parse(requests)

    async def count(self, key: str) -> None:
        """Counts a request. Raises ApiError 429 over the limit, and does not count the request."""
        if self._limit is not None and not await self._limiter.hit(self._limit, key):
            allowed_at, _ = await self._limiter.get_window_stats(self._limit, key)
            wait = max(1, math.ceil(allowed_at - time.time()))
            message = f"the key's limit is reached: {self._limit}"
            raise ApiError(429, "rate_limit_exceeded", message, retry_after=wait)
