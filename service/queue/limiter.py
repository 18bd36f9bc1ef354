"""Adaptive limits of concurrent requests: additive increase, multiplicative decrease (AIMD).

A call to an upstream waits in a queue for its slot. A delivery to an endpoint waits only a moment,
because it keeps a slot of the worker pool from other endpoints. Its limiter answers when to come
back.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Literal

from service.errors import NoPlace

Kind = Literal["confirm", "submit", "passthrough", "reconcile"]
RANK: dict[Kind, int] = {"confirm": 0, "submit": 1, "passthrough": 1, "reconcile": 2}


@dataclass(slots=True)
class KindLimit:
    """Calls of one kind: `used` of `limit`, which is at most `full`."""

    full: int
    limit: int = field(init=False)
    used: int = 0
    generation: int = 0  # counts the halvings
    successes: int = 0  # since the limit changed
    waiting: deque[tuple[int, "asyncio.Future[None]"]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.limit = self.full

    def record(self, throttled: bool, generation: int) -> None:
        """Halves the limit, or adds one after as many successes as may run at once.

        A call that began before the last halving says nothing about the limit after it.
        """
        if generation != self.generation:
            return
        if throttled:
            self.limit, self.successes = max(1, self.limit // 2), 0
            self.generation += 1
        elif self.limit < self.full:
            self.successes += 1
            if self.successes == self.limit:
                self.limit, self.successes = self.limit + 1, 0


class ConcurrencyLimiter:
    """Slots for concurrent calls to an upstream, by kind. A 429 halves the limit of its kind.

    Confirmations go first, then submissions and passed-through calls, and reconciling last. Calls
    of one rank go in order of arrival. Submissions and passed-through calls hold at most three
    quarters of the slots. One slot in eight is for confirmations alone. `on_limit` receives each
    limit at the start and after a change.
    """

    def __init__(
        self, concurrency: int, on_limit: Callable[[Kind, int], None] = lambda _kind, _limit: None
    ) -> None:
        clients, patient = max(1, concurrency * 3 // 4), concurrency - concurrency // 8
        self.kinds: dict[Kind, KindLimit] = {
            "confirm": KindLimit(concurrency),
            "submit": KindLimit(clients),
            "passthrough": KindLimit(max(1, concurrency // 4)),
            "reconcile": KindLimit(patient),
        }
        self._shares: tuple[tuple[tuple[Kind, ...], int], ...] = (
            (("submit", "passthrough"), clients),
            (("submit", "passthrough", "reconcile"), patient),
            (("submit", "passthrough", "reconcile", "confirm"), concurrency),
        )
        self._arrivals = count()
        self._on_limit = on_limit
        for kind, limit in self.kinds.items():
            on_limit(kind, limit.limit)

    def used(self, *kinds: Kind) -> int:
        return sum(self.kinds[kind].used for kind in kinds or RANK)

    @asynccontextmanager
    async def slot(
        self, kind: Kind, patience: float | None = None
    ) -> AsyncIterator[Callable[[bool | None], None]]:
        """A slot for one call. The yielded function records whether the upstream throttled the
        call (None: unknown). NoPlace: no slot was free within `patience` seconds.
        """
        try:
            async with asyncio.timeout(patience):
                await self._enter(kind)
        except TimeoutError:
            raise NoPlace("too many calls to it are under way") from None
        try:
            yield partial(self._record, kind, self.kinds[kind].generation)
        finally:
            self._leave(kind)

    async def _enter(self, kind: Kind) -> None:
        entry = (next(self._arrivals), asyncio.get_running_loop().create_future())
        self.kinds[kind].waiting.append(entry)
        self._admit()
        try:
            await entry[1]
        except asyncio.CancelledError:
            if entry[1].cancelled():
                with suppress(ValueError):  # `_admit` has passed it over already
                    self.kinds[kind].waiting.remove(entry)
            else:  # the slot was given in the same turn of the loop
                self._leave(kind)
            raise

    def _leave(self, kind: Kind) -> None:
        self.kinds[kind].used -= 1
        self._admit()

    def _admit(self) -> None:
        """Gives every free slot to the call that has the turn."""
        while able := [
            (RANK[kind], limit.waiting[0][0], limit)
            for kind, limit in self.kinds.items()
            if limit.waiting and self._free(kind)
        ]:
            _, _, limit = min(able, key=lambda each: each[:2])
            _, slot = limit.waiting.popleft()
            if not slot.cancelled():
                limit.used += 1
                slot.set_result(None)

    def _free(self, kind: Kind) -> bool:
        limit = self.kinds[kind]
        return limit.used < limit.limit and all(
            self.used(*kinds) < slots for kinds, slots in self._shares if kind in kinds
        )

    def _record(self, kind: Kind, generation: int, throttled: bool | None) -> None:
        limit = self.kinds[kind]
        before = limit.limit
        if throttled is not None:
            limit.record(throttled, generation)
        if limit.limit != before:
            self._on_limit(kind, limit.limit)


FIRST, MOST = 4.0, 16.0  # concurrent requests: to an unknown endpoint, and to any
SHORTEST_S, LONGEST_S = 0.02, 300.0  # until a delivery looks again
PATIENCE_S = 0.05  # of a delivery that waits for a slot in this process
KNOWN = 10_000  # endpoints


@dataclass(slots=True)
class WaitQueue:
    """The first attempts or the retries of one endpoint."""

    busy: int = 0
    turn_at: float = 0.0  # of the last delivery that found no slot
    waiting: deque["asyncio.Future[None]"] = field(default_factory=deque)


@dataclass(slots=True)
class EndpointLoad:
    limit: float = FIRST
    usual_s: float = 0.1  # of an attempt, as a moving average
    silent_since: float = 0.0  # when the last attempt ended, or the first began
    healthy: bool = True  # the last attempt succeeded
    first: WaitQueue = field(default_factory=WaitQueue)
    again: WaitQueue = field(default_factory=WaitQueue)

    @property
    def busy(self) -> int:
        return self.first.busy + self.again.busy

    def queue(self, *, first: bool) -> tuple[WaitQueue, int]:
        """First attempts or retries, and their limit."""
        if first:
            return self.first, int(self.limit)
        return self.again, max(1, int(self.limit) - self.first.busy)


class EndpointLimiter:
    """Slots for concurrent requests to each endpoint. `clock` is in seconds.

    A success adds one. 429, 503 and silence halve the limit, which is never below 1. First attempts
    never wait for retries. Deliveries without a slot come back one after the other, so that a long
    queue asks no more often than the endpoint takes requests.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._loads: dict[str, EndpointLoad] = {}

    def acquire(self, endpoint: str, *, first: bool) -> float | None:
        """Takes a slot, which `record` frees, and returns None. Otherwise returns the seconds after
        which to ask again.
        """
        if len(self._loads) >= KNOWN:
            self._loads = {key: load for key, load in self._loads.items() if load.busy}
        load, now = self._loads.setdefault(endpoint, EndpointLoad()), self._clock()
        queue, limit = load.queue(first=first)
        if queue.busy < limit:
            if not load.busy:
                load.silent_since = now
            queue.busy += 1
            return None
        # A silent endpoint takes at least as long as it has been silent. A healthy one soon takes
        # more at once.
        each_s = max(load.usual_s, now - load.silent_since) / (2 * MOST if load.healthy else limit)
        queue.turn_at = max(queue.turn_at, now) + each_s
        return min(max(queue.turn_at - now, SHORTEST_S), LONGEST_S)

    async def wait(self, endpoint: str, seconds: float, *, first: bool) -> bool:
        """Waits for a slot in order of arrival, if `acquire` said that one is soon free. False: no
        attempt ended in time.
        """
        if seconds > PATIENCE_S:
            return False  # an endpoint at its full limit may take twice the estimate
        load = self._loads[endpoint]
        queue, _ = load.queue(first=first)
        slot: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.waiting.append(slot)
        try:
            await asyncio.wait([slot], timeout=2 * PATIENCE_S)
        except asyncio.CancelledError:
            if not slot.cancel():  # the slot was given in the same turn of the loop
                queue.busy -= 1
                self._admit(load)
            raise
        return not slot.cancel()

    def record(self, endpoint: str, seconds: float, *, first: bool, healthy: bool | None) -> bool:
        """Frees the slot of an attempt that took so many seconds. `healthy` is None if the attempt
        says nothing about the endpoint. Returns whether other deliveries wait for it.
        """
        load, now = self._loads[endpoint], self._clock()
        queue, _ = load.queue(first=first)
        queue.busy -= 1
        waited = queue.turn_at > now
        if healthy is not None:
            load.usual_s += (seconds - load.usual_s) / 4
            load.silent_since = now
            if healthy and not load.healthy:  # new deliveries do not wait behind a dead endpoint's
                load.first.turn_at = load.again.turn_at = 0.0
            load.limit = min(MOST, load.limit + 1) if healthy else max(1.0, load.limit / 2)
            load.healthy = healthy
        self._admit(load)
        return waited

    def _admit(self, load: EndpointLoad) -> None:
        """Gives free slots to the deliveries that wait for them."""
        for first in (True, False):
            queue, limit = load.queue(first=first)
            while queue.waiting and queue.busy < limit:
                if not (slot := queue.waiting.popleft()).done():
                    queue.busy += 1
                    slot.set_result(None)
