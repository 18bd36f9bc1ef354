"""Fair slots: holders take turns, and a newcomer finds a free slot."""

import asyncio
from collections import Counter

import pytest

from service.fair_slots import HOLDER, FairSlots, has_share


class Work:
    """Work of several holders, each piece of which ends when it is told to."""

    def __init__(self, slots: FairSlots) -> None:
        self.slots, self.running = slots, list[str]()
        self.ends = dict[str, list[asyncio.Event]]()

    async def piece(self, holder: str, end: asyncio.Event) -> None:
        HOLDER.set(holder)
        async with self.slots.slot():
            self.running.append(holder)
            self.ends.setdefault(holder, []).append(end)
            await end.wait()
            self.running.remove(holder)

    async def begin(self, holder: str, count: int) -> list["asyncio.Task[None]"]:
        tasks = [asyncio.create_task(self.piece(holder, asyncio.Event())) for _ in range(count)]
        await settled()
        return tasks

    async def end(self, holder: str) -> None:
        self.ends[holder].pop(0).set()
        await settled()


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("total", "rest", "share"), [(1, 1, 1), (2, 1, 1), (3, 1, 2), (128, 4, 26)]
)
async def test_a_newcomer_finds_a_slot_beside_a_greedy_holder(
    total: int, rest: int, share: int
) -> None:
    work = Work(FairSlots(total, rest))
    tasks = await work.begin("greedy", 2 * total)
    assert len(work.running) == share
    tasks += await work.begin("newcomer", 1)
    assert ("newcomer" in work.running) == (share < total)
    while work.running:
        await work.end(work.running[0])
    await asyncio.gather(*tasks)


async def test_holders_take_turns_however_much_one_of_them_wants() -> None:
    """A piece of work waits for at most one piece of each other holder that waits."""
    work = Work(FairSlots(1))
    tasks = await work.begin("greedy", 20)
    for holder in ("one", "two", "one"):
        tasks += await work.begin(holder, 1)
    order = []
    while work.running:
        order.append(work.running[0])
        await work.end(order[-1])
    await asyncio.gather(*tasks)
    assert order[:6] == ["greedy", "greedy", "one", "two", "greedy", "one"]
    assert Counter(order) == {"greedy": 20, "one": 2, "two": 1}


async def test_who_leaves_the_queue_takes_no_slot() -> None:
    """Whether it waits, or was admitted in the turn in which it is cancelled."""
    slots = FairSlots(1)
    work = Work(slots)
    tasks = await work.begin("first", 1)
    waiting = await work.begin("second", 3)
    waiting[0].cancel()
    await settled()
    work.ends["first"][0].set()
    await asyncio.sleep(0)  # the first ends, and the next one is admitted
    waiting[1].cancel()
    await settled()
    assert work.running == ["second"]
    await work.end("second")
    await asyncio.gather(*tasks, waiting[2])
    assert (slots._free, dict(slots._used), slots._waiting) == (1, {}, {})


@pytest.mark.parametrize(
    ("used", "free", "rest"), [(0, 1, 1), (0, 1, 4), (499, 501, 1), (25, 103, 4)]
)
def test_a_share_ends_where_it_is_a_part_of_the_rest(used: int, free: int, rest: int) -> None:
    assert has_share(used, free, rest)
    assert not has_share(used + 1, free - 1, rest) or (used == 0 and free > 1)
    assert not has_share(used, 0, rest)
