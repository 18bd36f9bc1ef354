"""The embedded store's clock: no jump of the machine's clock makes work due, or puts it off.

Between two looks it moves by the time that really passed, a machine's sleep included, and by a
tenth of that, at most, towards the machine's clock: an hour's jump is made up for in ten hours, or
at the next start. It never goes back.
"""

import time
from collections.abc import Callable

SLEW = 10  # one part in so many


def wall_clock() -> int:
    """The machine's: milliseconds since 1970 UTC."""
    return time.time_ns() // 1_000_000


def wall_ns() -> int:
    return time.time_ns()


def steady_ns() -> int:
    """Time that passes, whatever anybody sets: since the machine's start, where the system says it,
    its sleep included.
    """
    return time.clock_gettime_ns(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class SteadyClock:
    """Milliseconds since 1970 UTC."""

    def __init__(
        self, wall: Callable[[], int] = wall_ns, steady: Callable[[], int] = steady_ns
    ) -> None:
        self._wall, self._steady = wall, steady
        self._now, self._looked = wall(), steady()

    def __call__(self) -> int:
        looked = self._steady()
        passed = max(0, looked - self._looked)
        if passed >= SLEW:  # less could not be told from nothing
            most = passed // SLEW
            self._looked = looked
            self._now += passed
            self._now += min(most, max(-most, self._wall() - self._now))
        return self._now // 1_000_000
