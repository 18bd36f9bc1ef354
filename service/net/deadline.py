"""The time limit of a call."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

UNREAD_S = 1.0  # for what arrived during a pause


@asynccontextmanager
async def until(end: float) -> AsyncIterator[None]:
    """Raises TimeoutError at `end`. A process that is paused past `end` first reads what arrived
    meanwhile, because the response to a submission comes only once.
    """
    loop = asyncio.get_running_loop()
    ahead = loop.time() <= end

    def expire() -> None:
        now = loop.time()
        timer.reschedule(now + UNREAD_S if ahead and now > end + UNREAD_S else now)

    async with asyncio.timeout(None) as timer:
        expiring = loop.call_at(end, expire)
        try:
            yield
        finally:
            expiring.cancel()
