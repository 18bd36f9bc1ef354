"""How many requests one subscriber gets at once, on a clock of the test's own."""

import heapq
from dataclasses import dataclass, field

import pytest

from service.queue import limiter
from service.queue.limiter import FIRST, LONGEST_S, MOST, SHORTEST_S, EndpointLimiter


@dataclass(slots=True)
class Place:
    """A subscriber, and what it is sent."""

    now: float = 1000.0
    limiter: EndpointLimiter = field(init=False)

    def __post_init__(self) -> None:
        self.limiter = EndpointLimiter(lambda: self.now)

    def enter(self, *, first: bool = True, subscriber: str = "shop") -> float | None:
        return self.limiter.acquire(subscriber, first=first)

    def leave(self, *, first: bool = True, well: bool | None = True, seconds: float = 0.1) -> bool:
        return self.limiter.record("shop", seconds, first=first, healthy=well)

    def fill(self, *, first: bool = True) -> int:
        """As many as are let in."""
        count = 0
        while count < 100 and self.enter(first=first) is None:
            count += 1
        return count

    def after(self, *ends: bool | None) -> int:
        """How many at once are let in after attempts that ended so, one by one."""
        for well in ends:
            assert self.enter() is None
            self.leave(well=well)
        return self.fill()


@pytest.fixture
def shop() -> Place:
    return Place()


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
def test_success_adds_a_place_and_trouble_halves_them(
    shop: Place, ends: tuple[bool | None, ...], count: float
) -> None:
    """Never below one, never above the most; a fault of our own says nothing."""
    assert shop.after(*ends) == count


def test_one_subscriber_takes_no_place_of_anothers(shop: Place) -> None:
    """However many wait for the one, the other is as it was."""
    assert shop.fill() == FIRST
    for _ in range(100):
        assert shop.enter() is not None
    assert shop.enter(subscriber="other") is None


def test_first_attempts_never_wait_for_retries(shop: Place) -> None:
    """Retries that hang in every place leave the first attempts theirs, and do not stand before
    them in the line.
    """
    assert shop.fill(first=False) == FIRST
    waits = [shop.enter(first=False) for _ in range(50)]
    assert all(wait is not None for wait in waits)
    assert shop.fill() == FIRST
    assert (shop.enter() or 0) < (waits[-1] or 0)


def test_retries_have_what_first_attempts_leave_and_at_least_one_place(shop: Place) -> None:
    """They give way, and are not starved."""
    for count in (3, 2, 1, 1):
        assert shop.enter() is None
        assert shop.fill(first=False) == count
        while shop.limiter._loads["shop"].again.busy:
            shop.leave(first=False, well=None)


def test_who_waits_comes_one_after_the_other(shop: Place) -> None:
    """By the rate that the subscriber shows, within bounds, so that a long line is not asked again
    and again.
    """
    shop.fill()
    waits = [shop.enter() or 0 for _ in range(500_000)]
    assert waits[0] == SHORTEST_S
    assert waits == sorted(waits)
    assert waits[-1] == LONGEST_S
    shop.leave(seconds=8)
    shop.fill()
    assert waits[1000] < LONGEST_S


def test_whoever_ends_tells_whether_others_wait(shop: Place) -> None:
    """So that they are looked for at once; first attempts and retries have lines of their own."""
    shop.fill()
    assert shop.enter(first=False) is None
    wait = shop.enter()
    assert wait is not None
    assert not shop.leave(first=False)
    assert shop.leave()
    shop.now += 10
    assert not shop.leave()


def test_whoever_is_back_after_trouble_has_no_line(shop: Place) -> None:
    """What comes then does not stand behind all who waited for a dead one."""
    shop.fill()
    shop.now += 60
    shop.leave(well=False, seconds=60)
    assert [shop.enter() for _ in range(100)][-1] == LONGEST_S
    shop.leave(well=True)
    while (wait := shop.enter()) is None:
        pass
    assert wait < LONGEST_S / 2


def test_a_dead_subscriber_is_looked_at_seldom() -> None:
    """200 deliveries to one that never answers, attempts of 15 s, for ten minutes: looks are few,
    and fewer as it is silent longer.
    """
    shop, looks = Place(), list[float]()
    line: list[tuple[float, int, bool]] = [(1000.0, number, False) for number in range(200)]
    ends: list[tuple[float, int, bool]] = []
    while (line and line[0][0] < 1600) or (ends and ends[0][0] < 1600):
        if ends and (not line or ends[0][0] <= line[0][0]):
            shop.now, *_ = heapq.heappop(ends)
            shop.leave(well=False, seconds=15)
            continue
        shop.now, number, _ = heapq.heappop(line)
        looks.append(shop.now)
        wait = shop.enter()
        if wait is None:
            heapq.heappush(ends, (shop.now + 15, number, True))
            assert len(ends) <= FIRST
        else:
            heapq.heappush(line, (shop.now + wait, number, False))
    assert len(looks) <= 200 * 10
    assert len([look for look in looks if look >= 1300]) <= 2 * 200 * 300 / LONGEST_S


def test_what_is_known_of_subscribers_is_bounded(
    shop: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that nothing is sent to are forgotten first; who is busy stays."""
    monkeypatch.setattr(limiter, "KNOWN", 10)
    assert shop.fill() == FIRST
    for number in range(100):
        assert shop.enter(subscriber=f"s{number}") is None
        shop.limiter.record(f"s{number}", 0.1, first=True, healthy=True)
        assert len(shop.limiter._loads) <= 10
    assert shop.enter() is not None
