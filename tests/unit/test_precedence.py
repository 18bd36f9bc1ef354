"""Callbacks before work: the upstream gives up after half a minute, work does not."""

import asyncio
import time

import pytest

from service.errors import StoreUnavailable
from service.web import precedence
from service.web.precedence import Precedence
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


async def test_a_callback_that_gets_no_turn_in_time_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its sender hears so while it still listens; whoever has had a turn makes room for the
    next.
    """
    monkeypatch.setattr(precedence, "TURN_S", 0.05)
    monkeypatch.setattr(precedence, "AT_ONCE", 1)
    order, refused = Precedence(), list[str]()
    async with order.turn(lambda: refused.append("first")):
        with pytest.raises(StoreUnavailable):
            async with order.turn(lambda: refused.append("second")):
                raise AssertionError
    with pytest.raises(KeyError):
        async with order.turn(lambda: refused.append("third")):
            raise KeyError
    async with order.turn(lambda: refused.append("fourth")):
        assert refused == ["second"]


async def test_more_callbacks_than_may_wait_are_refused_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody's memory is filled by a line that is never served in time."""
    monkeypatch.setattr(precedence, "MOST", 1)
    order, refused = Precedence(), list[None]()
    with order.callback(), order.callback(), pytest.raises(StoreUnavailable):
        async with order.turn(lambda: refused.append(None)):
            raise AssertionError
    with order.callback():
        async with order.turn(lambda: refused.append(None)):
            assert refused == [None]
