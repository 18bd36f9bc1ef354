"""The clock of the embedded store: a jump of the machine's clock neither makes work due nor delays
it (see docs/decisions/0024).

Between two readings the clock moves by the time that passed, including a machine's sleep, and by at
most a tenth of that towards the machine's clock. An hour's jump is made up for in ten hours, or at
the next start. The clock never goes back.
"""

import time
from collections.abc import Callable

SLEW = 10  # the share of the passed time that corrects the clock is one in ten


def wall_clock() -> int:
    """The machine's time: milliseconds since 1970 UTC."""
    return time.time_ns() // 1_000_000


def wall_ns() -> int:
    return time.time_ns()


def steady_ns() -> int:
    """Time that passes, including a machine's sleep where the system counts it. No setting of the
    clock changes it.
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
        if passed >= SLEW:  # a shorter time would round to no correction
            most = passed // SLEW
            self._looked = looked
            self._now += passed
            self._now += min(most, max(-most, self._wall() - self._now))
        return self._now // 1_000_000
