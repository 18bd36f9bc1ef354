"""How many requests one subscriber gets at once: a slow or dead one waits for itself, and takes no
place from the others.

More by one with each success, half of it on 429, 503 and silence. First attempts never wait for
retries. Whoever finds the subscriber busy comes back when its turn should be, one after the other:
of a long queue no more look again than could be sent.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

FIRST, MOST = 4.0, 16.0  # at once: of a subscriber that nothing is known of, and of any
SHORTEST_S, LONGEST_S = 0.02, 300.0  # until a delivery looks again
KNOWN = 10_000  # subscribers


@dataclass(slots=True)
class Line:
    """First attempts, or retries."""

    busy: int = 0
    turn_at: float = 0.0  # of the last of those that wait


@dataclass(slots=True)
class Load:
    limit: float = FIRST
    usual_s: float = 0.1  # of an attempt
    heard_at: float = 0.0  # when the last attempt ended, or the first began
    well: bool = True  # so it ended
    first: Line = field(default_factory=Line)
    again: Line = field(default_factory=Line)

    @property
    def busy(self) -> int:
        return self.first.busy + self.again.busy


class Courtesy:
    """Of one process; `clock` in seconds. `limit` is never below 1."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._loads: dict[str, Load] = {}

    def enter(self, subscriber: str, *, first: bool) -> float | None:
        """None: go, and `leave` afterwards; else in how many seconds to look again."""
        if len(self._loads) >= KNOWN:
            self._loads = {key: load for key, load in self._loads.items() if load.busy}
        load, now = self._loads.setdefault(subscriber, Load()), self._clock()
        line, limit = (
            (load.first, int(load.limit))
            if first
            else (load.again, max(1, int(load.limit) - load.first.busy))
        )
        if line.busy < limit:
            if not load.busy:
                load.heard_at = now
            line.busy += 1
            return None
        # A silent one takes no less than it has been silent. While all goes well they come in good
        # time, as it will take more at once.
        each_s = max(load.usual_s, now - load.heard_at) / (2 * MOST if load.well else limit)
        line.turn_at = max(line.turn_at, now) + each_s
        return min(max(line.turn_at - now, SHORTEST_S), LONGEST_S)

    def leave(self, subscriber: str, seconds: float, *, first: bool, well: bool | None) -> bool:
        """After an attempt of so many seconds; `well` None: it says nothing of what the subscriber
        can take. Whether others wait for it.
        """
        load, now = self._loads[subscriber], self._clock()
        line = load.first if first else load.again
        line.busy -= 1
        load.usual_s += (seconds - load.usual_s) / 4
        load.heard_at = now
        waited = line.turn_at > now
        if well is False:
            load.limit = max(1.0, load.limit / 2)
        elif well:
            load.limit = min(MOST, load.limit + 1)
            if (
                not load.well
            ):  # it is back: what comes now does not stand behind those who waited for a dead one
                load.first.turn_at = load.again.turn_at = 0.0
        load.well = load.well if well is None else well
        return waited
