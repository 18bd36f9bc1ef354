"""The number of requests that one subscriber gets at once, on a clock of the test."""

import asyncio
import heapq
from dataclasses import dataclass, field

import pytest

from service.queue import limiter
from service.queue.limiter import FIRST, LONGEST_S, MOST, PATIENCE_S, SHORTEST_S, EndpointLimiter


@dataclass(slots=True)
class Subscriber:
    """A subscriber and the attempts to it."""

    now: float = 1000.0
    limiter: EndpointLimiter = field(init=False)

    def __post_init__(self) -> None:
        self.limiter = EndpointLimiter(lambda: self.now)

    def enter(self, *, first: bool = True, subscriber: str = "shop") -> float | None:
        return self.limiter.acquire(subscriber, first=first)

    def leave(self, *, first: bool = True, well: bool | None = True, seconds: float = 0.1) -> bool:
        return self.limiter.record("shop", seconds, first=first, healthy=well)

    async def waiting(self) -> "asyncio.Task[bool]":
        """A delivery that waits for a slot."""
        made = asyncio.create_task(self.limiter.wait("shop", SHORTEST_S, first=True))
        await asyncio.sleep(0)
        return made

    def fill(self, *, first: bool = True) -> int:
        """Starts attempts until one is refused, and returns their number."""
        count = 0
        while count < 100 and self.enter(first=first) is None:
            count += 1
        return count

    def after(self, *ends: bool | None) -> int:
        """The number of attempts that may run at once after attempts with these outcomes."""
        for well in ends:
            assert self.enter() is None
            self.leave(well=well)
        return self.fill()


@pytest.fixture
def endpoint() -> Subscriber:
    return Subscriber()


@pytest.mark.parametrize(
    ("ends", "count"),
    [
        ((), FIRST),
        ((True,), FIRST + 1),
        ((True,) * 100, MOST),
        ((False,), FIRST / 2),
        ((False,) * 10, 1),
        ((False, False, True), 2),
        ((None,) * 5, FIRST),
        (((True,) * 12 + (False,)), MOST / 2),
    ],
)
def test_a_success_adds_a_place_and_a_failure_halves_them(
    endpoint: Subscriber, ends: tuple[bool | None, ...], count: float
) -> None:
    """The limit is never below one and never above the maximum. A fault of ours does not change
    it.
    """
    assert endpoint.after(*ends) == count


def test_one_subscriber_takes_no_place_of_another_one(endpoint: Subscriber) -> None:
    assert endpoint.fill() == FIRST
    for _ in range(100):
        assert endpoint.enter() is not None
    assert endpoint.enter(subscriber="other") is None


def test_first_attempts_never_wait_for_retries(endpoint: Subscriber) -> None:
    """Retries that hang in all their places leave the first attempts theirs, and do not wait before
    them.
    """
    assert endpoint.fill(first=False) == FIRST
    waits = [endpoint.enter(first=False) for _ in range(50)]
    assert all(wait is not None for wait in waits)
    assert endpoint.fill() == FIRST
    assert (endpoint.enter() or 0) < (waits[-1] or 0)


def test_retries_get_the_places_that_first_attempts_leave_and_at_least_one(
    endpoint: Subscriber,
) -> None:
    for count in (3, 2, 1, 1):
        assert endpoint.enter() is None
        assert endpoint.fill(first=False) == count
        while endpoint.limiter._loads["shop"].again.busy:
            endpoint.leave(first=False, well=None)


@pytest.mark.slow
def test_waiting_attempts_come_one_after_another(endpoint: Subscriber) -> None:
    """Their waits follow the rate that the subscriber shows, within bounds, so that a long queue
    does not ask again and again.
    """
    endpoint.fill()
    waits = [endpoint.enter() or 0 for _ in range(500_000)]
    assert waits[0] == SHORTEST_S
    assert waits == sorted(waits)
    assert waits[-1] == LONGEST_S
    endpoint.leave(seconds=8)
    endpoint.fill()
    assert waits[1000] < LONGEST_S


def test_the_end_of_an_attempt_tells_whether_others_wait(endpoint: Subscriber) -> None:
    """The workers can then look for them at once. First attempts and retries have queues of their
    own.
    """
    endpoint.fill()
    assert endpoint.enter(first=False) is None
    wait = endpoint.enter()
    assert wait is not None
    assert not endpoint.leave(first=False)
    assert endpoint.leave()
    endpoint.now += 10
    assert not endpoint.leave()


async def test_a_delivery_waits_a_moment_for_a_slot(
    endpoint: Subscriber, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limiter gives slots to waiting deliveries in order. A cancelled one takes none,
    and none go over the limit.
    """
    monkeypatch.setattr(limiter, "PATIENCE_S", 60)
    endpoint.fill()
    one, two, three = [await endpoint.waiting() for _ in range(3)]
    one.cancel()
    await asyncio.sleep(0)
    endpoint.leave(well=None)
    assert await two
    assert endpoint.enter() is not None
    endpoint.leave(well=True)
    assert await three
    assert endpoint.enter() is None
    four = await endpoint.waiting()
    for well in (False, False, None, None):
        endpoint.leave(well=well)
        await asyncio.sleep(0.01)
        assert not four.done()
    endpoint.leave(well=None)
    assert await four
    assert endpoint.enter() is not None


@pytest.mark.parametrize("first", ["given", "cancelled"])
async def test_a_delivery_that_is_cancelled_as_it_gets_a_slot_frees_it(
    endpoint: Subscriber, first: str
) -> None:
    """A slot is freed and the waiting delivery is cancelled in one turn of the event loop, in
    either order. The next delivery gets the slot.
    """
    endpoint.fill()
    one, two = await endpoint.waiting(), await endpoint.waiting()
    if first == "cancelled":
        one.cancel()
    endpoint.leave(well=None)
    one.cancel()
    with pytest.raises(asyncio.CancelledError):
        await one
    assert await two
    assert endpoint.enter() is not None
    endpoint.leave(well=None)
    assert endpoint.enter() is None


async def test_a_delivery_does_not_wait_for_a_slow_subscriber(
    endpoint: Subscriber, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would keep a slot of the workers from other endpoints."""
    endpoint.fill()
    assert not await endpoint.limiter.wait("shop", PATIENCE_S + 0.001, first=True)
    monkeypatch.setattr(limiter, "PATIENCE_S", 0.01)
    assert not await endpoint.limiter.wait("shop", 0.01, first=True)
    endpoint.leave(well=None)
    assert endpoint.enter() is None


def test_a_subscriber_that_recovers_has_no_queue(endpoint: Subscriber) -> None:
    """New attempts do not wait behind all that waited for the dead subscriber."""
    endpoint.fill()
    endpoint.now += 60
    endpoint.leave(well=False, seconds=60)
    assert [endpoint.enter() for _ in range(100)][-1] == LONGEST_S
    endpoint.leave(well=True)
    while (wait := endpoint.enter()) is None:
        pass
    assert wait < LONGEST_S / 2


def test_a_dead_subscriber_gets_few_looks() -> None:
    """200 deliveries to a subscriber that never answers, with attempts of 15 s, for ten minutes.
    The looks become fewer the longer it is silent.
    """
    endpoint, looks = Subscriber(), list[float]()
    line: list[tuple[float, int, bool]] = [(1000.0, number, False) for number in range(200)]
    ends: list[tuple[float, int, bool]] = []
    while (line and line[0][0] < 1600) or (ends and ends[0][0] < 1600):
        if ends and (not line or ends[0][0] <= line[0][0]):
            endpoint.now, *_ = heapq.heappop(ends)
            endpoint.leave(well=False, seconds=15)
            continue
        endpoint.now, number, _ = heapq.heappop(line)
        looks.append(endpoint.now)
        wait = endpoint.enter()
        if wait is None:
            heapq.heappush(ends, (endpoint.now + 15, number, True))
            assert len(ends) <= FIRST
        else:
            heapq.heappush(line, (endpoint.now + wait, number, False))
    assert len(looks) <= 200 * 10
    assert len([look for look in looks if look >= 1300]) <= 2 * 200 * 300 / LONGEST_S


def test_the_state_of_subscribers_is_bounded(
    endpoint: Subscriber, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Idle subscribers are forgotten first, and busy ones stay."""
    monkeypatch.setattr(limiter, "KNOWN", 10)
    assert endpoint.fill() == FIRST
    for number in range(100):
        assert endpoint.enter(subscriber=f"s{number}") is None
        endpoint.limiter.record(f"s{number}", 0.1, first=True, healthy=True)
        assert len(endpoint.limiter._loads) <= 10
    assert endpoint.enter() is not None
