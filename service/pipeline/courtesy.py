"""How many requests one subscriber gets at once: a slow or dead one waits for itself, and takes no place from the others.

More by one with each success, half of it on 429, 503 and silence. Whoever finds the subscriber busy comes back at a time of its own,
so that a long queue is not asked again and again.
"""

from collections.abc import Callable
from dataclasses import dataclass

FIRST, MOST = 4.0, 16.0  # at once: of a subscriber that nothing is known of, and of any
SHORTEST_S, LONGEST_S = 0.02, 30.0  # until a delivery looks again
KNOWN = 10_000  # subscribers


@dataclass(slots=True)
class Load:
    limit: float = FIRST
    busy: int = 0
    usual_s: float = 0.1  # of an attempt
    free_at: float = 0.0  # when the last of those that wait may look again


class Courtesy:
    """Of one process; `clock` in seconds. `limit` is never below 1."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._loads: dict[str, Load] = {}

    def enter(self, subscriber: str) -> float | None:
        """None: go, and `leave` afterwards; else in how many seconds to look again."""
        if len(self._loads) >= KNOWN:
            self._loads = {key: load for key, load in self._loads.items() if load.busy}
        load = self._loads.setdefault(subscriber, Load())
        if load.busy < int(load.limit):
            load.busy += 1
            return None
        now = self._clock()
        load.free_at = max(load.free_at, now) + load.usual_s / int(load.limit)
        return min(max(load.free_at - now, SHORTEST_S), LONGEST_S)

    def leave(self, subscriber: str, seconds: float, *, well: bool | None) -> None:
        """After an attempt of so many seconds; `well` None: it says nothing of what the subscriber can take."""
        load = self._loads.setdefault(subscriber, Load(busy=1))
        load.busy -= 1
        load.usual_s += (seconds - load.usual_s) / 4
        if well is False:
            load.limit = max(1.0, load.limit / 2)
        elif well:
            load.limit = min(MOST, load.limit + 1)
            load.free_at = 0.0
