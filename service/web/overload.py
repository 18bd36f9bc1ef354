"""What holds clients back: how many requests a key may make, and how many a process has in hand.
Callbacks are held back by neither.
"""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import structlog

from service.errors import ApiError
from service.ops.metrics import Metrics
from service.web.precedence import Precedence
from service.web.protocol import Line

log = structlog.get_logger()

BUSY, WAITING = (
    500,
    5000,
)  # clients' requests at work, and those that only wait for a task or an event
FLOOD = 250  # callbacks in hand, and those that wait to be begun: some 0.1 s of work
TOLD_S = 1.0
BY_HAND, BY_HAND_EACH = (
    32,
    16,
)  # requests to subscribers that clients asked for, and those of an owner


class KeyLimits:
    """`requests` in the notation of the library `limits`, such as `600/minute`; None: no limit."""

    def __init__(self, requests: str | None) -> None:
        self._limit = None
        if requests is not None:
            from limits import parse
            from limits.aio.storage import MemoryStorage
            from limits.aio.strategies import (
                SlidingWindowCounterRateLimiter,
            )  # two numbers a key, however many its requests

            self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())
            self._limit = parse(requests)

    async def count(self, key: str) -> None:
        """Counts a request; ApiError 429 with the seconds until the next is allowed when it is one
        too many, which does not count.
        """
        if self._limit is not None and not await self._limiter.hit(self._limit, key):
            allowed_at, _ = await self._limiter.get_window_stats(self._limit, key)
            wait = max(1, math.ceil(allowed_at - time.time()))
            raise ApiError(
                429,
                "rate_limit_exceeded",
                f"the key's limit is reached: {self._limit}",
                retry_after=wait,
            )


@dataclass(slots=True)
class Admission:
    """Sheds clients' requests before callbacks have to wait for them: while there are too many, or
    a flood of callbacks is being taken.
    """

    precedence: Precedence
    metrics: Metrics
    busy: int = 0
    waiting: int = 0
    by_hand: Counter[str] = field(default_factory=Counter)
    _told: float = -math.inf
    _withheld: int = 0
    _refused: int = 0  # callbacks that nobody told of yet
    _telling: bool = False

    @contextmanager
    def request(self) -> Iterator[None]:
        """Around a client's request; ApiError 503 when it is shed."""
        burst = self.precedence.in_hand + Line.of(asyncio.get_running_loop()).callbacks
        if self.busy >= BUSY or self.waiting >= WAITING or burst >= FLOOD:
            self._tell()
            raise ApiError(503, "overloaded", "the service has too much in hand", retry_after=1)
        self.busy += 1
        try:
            yield
        finally:
            self.busy -= 1

    @contextmanager
    def wait(self) -> Iterator[None]:
        """Around a time in which an admitted request only waits: it takes nobody's place meanwhile,
        and comes back without asking.
        """
        self.busy -= 1
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1
            self.busy += 1

    @contextmanager
    def by_hand_of(self, owner: str) -> Iterator[None]:
        """Around a test send or a retry by hand: subscribers that hang hold up nobody else's.
        ApiError 429: too many are under way.
        """
        if self.by_hand[owner] >= BY_HAND_EACH or self.by_hand.total() >= BY_HAND:
            raise ApiError(
                429, "rate_limit_exceeded", "too many attempts by hand are under way", retry_after=1
            )
        self.by_hand[owner] += 1
        try:
            yield
        finally:
            self.by_hand[owner] -= 1
            if not self.by_hand[owner]:
                del self.by_hand[owner]

    def refused(self) -> None:
        """A callback that is told to come again: the first is logged at once, those of the next
        second together, and so on to the last.
        """
        self.metrics.callbacks.labels("overloaded").inc()
        self._refused += 1
        if not self._telling:
            self._tell_of_refused()

    def _tell_of_refused(self) -> None:
        self._telling = self._refused > 0
        if self._telling:
            log.warning(
                "callback.overloaded", refused=self._refused, callbacks=self.precedence.in_hand
            )
            self._refused = 0
            asyncio.get_running_loop().call_later(TOLD_S, self._tell_of_refused)

    def _tell(self) -> None:
        self.metrics.requests_shed.inc()
        now = time.monotonic()
        if now - self._told < TOLD_S:
            self._withheld += 1
            return
        figures = {
            "busy": self.busy,
            "waiting": self.waiting,
            "callbacks": self.precedence.in_hand,
            "withheld": self._withheld,
        }
        log.warning("http.shed", **figures)
        self._told, self._withheld = now, 0
