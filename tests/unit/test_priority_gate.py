"""Callbacks go before work, because the upstream gives up after half a minute."""

import asyncio
import time
from contextlib import nullcontext
from functools import partial
from itertools import pairwise

import pytest

from service.web import overload
from service.web.overload import PriorityGate
from tests.waiting import wait_until


async def test_work_starts_at_once_without_a_callback_in_progress() -> None:
    """A callback that ended or failed does not count."""
    gate = PriorityGate()
    await gate.wait()
    with pytest.raises(KeyError), gate.callback():
        raise KeyError
    await gate.wait()


async def test_work_waits_for_every_callback_in_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work goes on after the last one is answered."""
    monkeypatch.setattr(overload, "WORKER_WAIT_S", 60)
    gate = PriorityGate()
    with gate.callback():
        with gate.callback():
            work = asyncio.create_task(gate.wait())
            await wait_until(lambda: gate._idle._waiters)
        await asyncio.sleep(0)
        assert not work.done()
    await work


async def test_a_flood_of_callbacks_does_not_stop_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """After its longest wait, work starts all the same."""
    monkeypatch.setattr(overload, "WORKER_WAIT_S", 0.05)
    gate, started = PriorityGate(), time.monotonic()
    with gate.callback():
        await gate.wait()
    assert time.monotonic() - started >= 0.04


async def test_waiting_work_can_be_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop may cancel work that waits at the gate."""
    monkeypatch.setattr(overload, "WORKER_WAIT_S", 60)
    gate = PriorityGate()
    with gate.callback():
        work = asyncio.create_task(gate.wait())
        await wait_until(lambda: gate._idle._waiters)
        work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work


async def test_callbacks_wait_in_the_queue_while_too_many_commit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In their order. Clients' requests go on meanwhile."""
    monkeypatch.setattr(overload, "MAX_COMMITTING", 1)
    gate, begun = PriorityGate(), list[str]()
    with gate.commit():
        assert not gate.admit(lambda: begun.append("first"), callback=True)
        assert not gate.admit(lambda: begun.append("second"), callback=True)
        assert gate.admit(lambda: begun.append("client"), callback=False)
        await asyncio.sleep(0.01)
        assert (begun, gate.queued_callbacks) == ([], 2)
    await wait_until(lambda: begun == ["first", "second"])
    assert gate.admit(lambda: begun.append("third"), callback=True)


@pytest.mark.parametrize("in_hand", [False, True], ids=["no callback", "a callback"])
async def test_few_requests_of_clients_begin_in_one_turn(in_hand: bool) -> None:
    """A callback needs several turns of the loop, so that it would wait for all of them each time.
    Others go on in the order in which they came.
    """
    gate, begun, turns = PriorityGate(), list[int](), list[int]()
    count = 2 * overload.CLIENTS_PER_TURN + 1
    with gate.callback() if in_hand else nullcontext():
        for number in range(count):
            if gate.admit(partial(begun.append, number), callback=False):
                begun.append(number)
        while len(begun) < count:
            turns.append(len(begun))
            await asyncio.sleep(0)
        assert begun == list(range(count))
    steps = {after - before for before, after in pairwise(turns)}
    assert max(steps) == turns[0] == (1 if in_hand else overload.CLIENTS_PER_TURN)


async def test_a_thread_with_a_long_read_gives_way_to_callbacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Until none is in hand, or for its longest wait."""
    monkeypatch.setattr(overload, "READER_WAIT_S", 60)
    gate = PriorityGate()
    await asyncio.to_thread(gate.give_way)
    with gate.callback():
        reading = asyncio.create_task(asyncio.to_thread(gate.give_way))
        await asyncio.sleep(0.02)
        assert not reading.done()
    await reading
    monkeypatch.setattr(overload, "READER_WAIT_S", 0.01)
    with gate.callback():
        await asyncio.to_thread(gate.give_way)
