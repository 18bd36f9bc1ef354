"""The time limit of a call. tests/integration/test_egress_sockets.py has a pause."""

import asyncio

import pytest

from service.net.deadline import UNREAD_S, until


async def test_a_limit_that_has_passed_gives_no_further_time() -> None:
    """A body that arrives byte by byte does not outlast the limit of its call."""
    loop, soon = asyncio.get_running_loop(), asyncio.Event()
    arriving = loop.call_later(UNREAD_S / 2, soon.set)
    with pytest.raises(TimeoutError):
        async with until(loop.time() - 2 * UNREAD_S):
            await soon.wait()
    arriving.cancel()
