"""Signals: hints within a process for those who wait (a hint, never a promise)."""

import asyncio

from service.store import Signals


async def test_everybody_who_listens_to_a_key_is_woken() -> None:
    """All of them, and nobody who listens to another; who left is forgotten."""
    signals = Signals()
    with signals.listen("task_1") as one, signals.listen("task_2") as other:
        with signals.listen("task_1") as two:
            signals.notify(["task_1", "task_3"])
            assert await signals.wait(one, 10)
            assert await signals.wait(two, 10)
        assert not other.is_set()
        assert set(signals._waiting) == {"task_1", "task_2"}
    assert signals._waiting == {}


async def test_a_wait_ends_with_its_time() -> None:
    """False: nothing came; no time is no wait."""
    signals = Signals()
    with signals.listen("events") as heard:
        assert not await signals.wait(heard, 0.001)
        signals.notify(["events"])
        assert not await signals.wait(heard, 0)
        assert await signals.wait(heard, 10)


async def test_a_stop_ends_every_wait() -> None:
    """At once, and nobody begins a new one: whoever waits answers with what there is."""
    signals = Signals()
    with signals.listen("events") as heard, signals.listen("task_1") as changed:
        waiting = [asyncio.ensure_future(signals.wait(event, 60)) for event in (heard, changed)]
        await asyncio.sleep(0)
        signals.stop()
        assert await asyncio.gather(*waiting) == [False, False]
        assert not await signals.wait(heard, 60)
    assert signals.stopping
