"""Callbacks before work: the upstream gives up after half a minute, work does not."""

import asyncio
import time

import pytest

from service.pipeline import precedence
from service.pipeline.precedence import Precedence
from tests.waiting import wait_until


async def test_work_starts_at_once_when_no_callback_is_in_hand() -> None:
    """Nobody waits for what is over, nor for what failed."""
    order = Precedence()
    await order.wait()
    with pytest.raises(KeyError), order.callback():
        raise KeyError
    await order.wait()


async def test_work_waits_for_every_callback_in_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one to be answered lets it go on."""
    monkeypatch.setattr(precedence, "PATIENCE_S", 60)
    order = Precedence()
    with order.callback():
        with order.callback():
            work = asyncio.create_task(order.wait())
            await wait_until(lambda: order._calm._waiters)
        await asyncio.sleep(0)
        assert not work.done()
    await work


async def test_a_flood_of_callbacks_does_not_stop_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """After its patience work begins all the same."""
    monkeypatch.setattr(precedence, "PATIENCE_S", 0.05)
    order, started = Precedence(), time.monotonic()
    with order.callback():
        await order.wait()
    assert time.monotonic() - started >= 0.04


async def test_waiting_work_can_be_cancelled() -> None:
    """A stop meets work that waits, at whatever moment."""
    order = Precedence()
    with order.callback():
        work = asyncio.create_task(order.wait())
        await wait_until(lambda: order._calm._waiters)
        work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
