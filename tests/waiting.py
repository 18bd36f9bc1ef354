"""The only module of the tests that sleeps."""

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

LEAST_S, MOST_S, SHARE = 0.01, 0.1, 0.1  # a pause is a share of the time waited so far


async def wait_until(predicate: Callable[[], Any], timeout: float = 30) -> Any:
    """The value of `predicate`, plain or awaited, as soon as it is true. AssertionError after
    `timeout` seconds.

    It is for changes without an event, like the work of another process. Where there is an event,
    await the event.
    """
    loop = asyncio.get_running_loop()
    start = loop.time()
    while True:
        answer = predicate()
        value = await answer if inspect.isawaitable(answer) else answer
        if value:
            return value
        waited = loop.time() - start
        if waited > timeout:
            raise AssertionError(f"still {value!r} after {timeout} s")
        await asyncio.sleep(min(MOST_S, max(LEAST_S, waited * SHARE)))
