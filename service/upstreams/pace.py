"""How many calls to an upstream run at once, and whose turn is next.

Confirmations go first, then submissions and what is passed through, reconciling last; within these,
first come first served. A 429 halves how many calls of its kind may run, successes restore it:
additive increase, multiplicative decrease.
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
from service.net import Response
from service.upstreams.base import NoAnswer, NotCreated, QueryOutcome, SubmitOutcome, Uncertain

Kind = Literal["confirm", "submit", "passthrough", "reconcile"]
Answer = SubmitOutcome | QueryOutcome | Response

RANK: dict[Kind, int] = {"confirm": 0, "submit": 1, "passthrough": 1, "reconcile": 2}


def throttled(answer: Answer) -> bool | None:
    """Whether the upstream found these too many calls; None: it did not say."""
    match answer:
        case NotCreated() | NoAnswer():
            return answer.throttled or None
        case Response():
            return answer.status == 429 or (None if answer.status >= 500 else False)
        case Uncertain():
            return None
    return False


@dataclass(slots=True)
class Lane:
    """Calls of one kind: `used` run, of `limit`, which is at most `full`. `generation` counts the
    halvings.
    """

    full: int
    limit: int = field(init=False)
    used: int = 0
    generation: int = 0
    successes: int = 0  # since the limit changed
    waiting: deque[tuple[int, "asyncio.Future[None]"]] = field(
        default_factory=deque
    )  # in the order of arrival

    def __post_init__(self) -> None:
        self.limit = self.full


class Pace:
    """Places for so many calls at once. `on_limit` is told each kind's limit: now, and when it
    changes.

    Submissions and what is passed through hold three quarters of the places at most: reconciling
    goes on however slow they are. Of eight places one is for confirmations alone.
    """

    def __init__(
        self, concurrency: int, on_limit: Callable[[Kind, int], None] = lambda _kind, _limit: None
    ) -> None:
        clients, patient = max(1, concurrency * 3 // 4), concurrency - concurrency // 8
        self._lanes: dict[Kind, Lane] = {
            "confirm": Lane(concurrency),
            "submit": Lane(clients),
            "passthrough": Lane(max(1, concurrency // 4)),
            "reconcile": Lane(patient),
        }
        self._shares: tuple[tuple[tuple[Kind, ...], int], ...] = (
            (("submit", "passthrough"), clients),
            (("submit", "passthrough", "reconcile"), patient),
            (("submit", "passthrough", "reconcile", "confirm"), concurrency),
        )
        self._arrivals = count()
        self._on_limit = on_limit
        for kind, lane in self._lanes.items():
            on_limit(kind, lane.limit)

    def used(self, *kinds: Kind) -> int:
        """How many calls run, of these kinds or in all."""
        return sum(self._lanes[kind].used for kind in kinds or RANK)

    def waiting(self, kind: Kind) -> int:
        return len(self._lanes[kind].waiting)

    def limit(self, kind: Kind) -> int:
        return self._lanes[kind].limit

    @asynccontextmanager
    async def place(
        self, kind: Kind, patience: float | None = None
    ) -> AsyncIterator[Callable[[Answer], None]]:
        """Around one call, whose answer is told to what this yields. NoPlace: its turn did not come
        within `patience` seconds.
        """
        try:
            async with asyncio.timeout(patience):
                await self._enter(kind)
        except TimeoutError:
            raise NoPlace("too many calls to it are under way") from None
        try:
            yield partial(self._heard, kind, self._lanes[kind].generation)
        finally:
            self._leave(kind)

    async def _enter(self, kind: Kind) -> None:
        waiting = self._lanes[kind].waiting
        arrival, given = next(self._arrivals), asyncio.get_running_loop().create_future()
        waiting.append((arrival, given))
        self._admit()
        try:
            await given
        except asyncio.CancelledError:
            if given.cancelled():
                with suppress(ValueError):  # passed over already
                    waiting.remove((arrival, given))
            else:  # it had a place by then
                self._leave(kind)
            raise

    def _leave(self, kind: Kind) -> None:
        self._lanes[kind].used -= 1
        self._admit()

    def _admit(self) -> None:
        """Gives every free place to whose turn it is."""
        while able := [
            kind for kind, lane in self._lanes.items() if lane.waiting and self._free(kind)
        ]:
            lane = self._lanes[
                min(able, key=lambda kind: (RANK[kind], self._lanes[kind].waiting[0][0]))
            ]
            _, given = lane.waiting.popleft()
            if not given.cancelled():
                lane.used += 1
                given.set_result(None)

    def _free(self, kind: Kind) -> bool:
        lane = self._lanes[kind]
        return lane.used < lane.limit and all(
            self.used(*kinds) < places for kinds, places in self._shares if kind in kinds
        )

    def _heard(self, kind: Kind, generation: int, answer: Answer) -> None:
        lane, verdict = self._lanes[kind], throttled(answer)
        if (
            verdict is None or generation != lane.generation
        ):  # a call from before the last halving, which was the answer to it
            return
        before = lane.limit
        if verdict:
            lane.limit, lane.successes, lane.generation = max(1, before // 2), 0, generation + 1
        elif before < lane.full:
            lane.successes += 1
            if lane.successes == before:  # as many as may run at once: room for one more
                lane.limit, lane.successes = before + 1, 0
        if lane.limit != before:
            self._on_limit(kind, lane.limit)  # who waits is let in when this call leaves
