"""The one place of the tests that sleeps."""

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

PAUSE_S = 0.01


async def wait_until(predicate: Callable[[], Any], timeout: float = 10) -> Any:
    """What `predicate` answers, plain or awaited, as soon as that is true; AssertionError after
    `timeout` seconds.

    For what nobody announces, like another process's work; where there is an event to await, await
    that.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout
    while True:
        answer = predicate()
        value = await answer if inspect.isawaitable(answer) else answer
        if value:
            return value
        if loop.time() > end:
            raise AssertionError(f"still {value!r} after {timeout} s")
        await asyncio.sleep(PAUSE_S)
