"""Overload protection: callbacks go before clients, and both have limits.

The upstream sends a callback at most four times, but a client can wait and come again. The figures
are in docs/overload.md.
"""

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import structlog

from service.errors import ApiError
from service.fair_slots import HOLDER
from service.ops.metrics import Metrics
from service.web.key_shares import BodyShares, Share, Shares

log = structlog.get_logger()

LOG_EVERY_S = 1.0  # lines about refusals


@dataclass(slots=True)
class LogSampler:
    """At most one line per second, with the number of lines that it withheld before."""

    _last: float = -math.inf
    _withheld: int = 0

    def take(self, now: float, *, force: bool = False) -> int | None:
        """How many lines were withheld since the last one. None: this one is withheld too."""
        if not force and now - self._last < LOG_EVERY_S:
            self._withheld += 1
            return None
        withheld, self._withheld, self._last = self._withheld, 0, now
        return withheld


# --- callbacks before clients and workers ---

# Requests that begin in one turn of the event loop: as many callbacks as fit into one commit. A
# client's request takes up to a millisecond, and a callback needs several turns. So fewer
# of clients begin in one turn, and one while a callback is in hand.
BEGIN_PER_TURN = 100
CLIENTS_PER_TURN = 16
MAX_COMMITTING = 200  # callbacks, beyond which further ones wait in the queue
MAX_QUEUED = 5000  # callbacks, beyond which each one gets 503 at once, and the upstream retries it
# At most, as a flood of callbacks must not stop the workers and the readers.
WORKER_WAIT_S, READER_WAIT_S, READER_LOOK_S = 0.25, 0.05, 0.001


class PriorityGate:
    """Queues requests in order, bounds callbacks in commit, and holds workers back meanwhile.

    The event loop reads from every ready connection before it runs anything else. Without the
    queue, thousands of requests of a burst would all begin before the first is answered. Every
    commit would then take longer than its time limit, and every answer would come too late
    (docs/decisions/0035).
    """

    def __init__(self) -> None:
        self.callbacks = 0  # in hand
        self._committing = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._begun = Counter[bool]()  # callbacks and others, in this turn of the loop
        self._scheduled = False
        self._queues: dict[bool, deque[Callable[[], None]]] = {True: deque(), False: deque()}

    @property
    def queued_callbacks(self) -> int:
        return len(self._queues[True])

    def admit(self, begin: Callable[[], None], *, callback: bool) -> bool:
        """Whether a request may begin now. If not, the gate calls `begin` at its turn."""
        queue = self._queues[callback]
        admitted = not queue and self._room(callback=callback) > 0
        if admitted:
            self._begun[callback] += 1
        else:
            queue.append(begin)
        self._schedule()
        return admitted

    def _room(self, *, callback: bool) -> int:
        room = BEGIN_PER_TURN - self._begun.total()
        others = (1 if self.callbacks else CLIENTS_PER_TURN) - self._begun[False]
        return min(room, MAX_COMMITTING - self._committing if callback else others)

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._next_turn)

    def _next_turn(self) -> None:
        self._scheduled, self._begun = False, Counter()
        for callback, queue in self._queues.items():
            count = min(len(queue), self._room(callback=callback))
            if count > 0:
                self._begun[callback] += count
                self._schedule()  # first: if a `begin` raises, the next turn goes on behind it
                for _ in range(count):
                    queue.popleft()()

    @contextmanager
    def commit(self) -> Iterator[None]:
        """Around the commit of one callback."""
        self._committing += 1
        try:
            yield
        finally:
            self._committing -= 1
            if self.queued_callbacks:
                self._schedule()

    @contextmanager
    def callback(self) -> Iterator[None]:
        """Around one callback, from its token to its answer."""
        self.callbacks += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.callbacks -= 1
            if not self.callbacks:
                self._idle.set()

    async def wait(self) -> None:
        """Returns when no callback is in hand, or after `WORKER_WAIT_S`."""
        if not self._idle.is_set():
            # `wait_for` of Python 3.11 loses a cancellation that coincides with the event
            with suppress(TimeoutError):
                async with asyncio.timeout(WORKER_WAIT_S):
                    await self._idle.wait()

    def give_way(self) -> None:
        """The same for a thread, which would take the interpreter from callbacks."""
        end = time.monotonic() + READER_WAIT_S
        while self.callbacks and time.monotonic() < end:
            time.sleep(READER_LOOK_S)


# --- load shedding of clients ---

# Of the process. An owner has a fair share of each: at most half of what the others leave. A key's
# share of polls and streams is a setting.
MAX_ACTIVE = 1000  # requests at work
LOOKED_UP = 5000  # requests whose key is looked up, which an address has a share of
POLLS = SUBMISSIONS = 2500  # requests that wait for an event, and for a task
STREAMS = 2000
LONG_PAGES = 64  # on their way to a client, up to 4 MiB each
MANUAL = 32  # attempts that clients ask for by hand
WAITING_OF_KEY = 1000  # submissions
SHED_AT = 250  # callbacks in hand or queued, about 0.1 s of work


class LoadShedder:
    """Sheds clients' requests with 503 during a burst, and gives each owner its share."""

    def __init__(self, gate: PriorityGate, metrics: Metrics, key_waits: int = 100) -> None:
        self.gate, self.metrics = gate, metrics
        self.bodies, self.log_sampler = BodyShares(), LogSampler()
        self.requests = Shares("requests at work", MAX_ACTIVE)
        self.lookups = Shares("requests whose key is looked up", LOOKED_UP)
        self.polls = Shares("requests that wait for an event", POLLS, key_waits)
        self.streams = Shares("streams", STREAMS, key_waits)
        self.submissions = Shares("submissions that wait", SUBMISSIONS, WAITING_OF_KEY)
        self.pages = Shares("long answers on their way", LONG_PAGES)
        self.manual = Shares("attempts by hand under way", MANUAL)
        self._refused = 0  # callbacks since the last line
        self._logging = False

    @property
    def active(self) -> int:
        return self.requests.taken

    @property
    def waiting(self) -> int:
        return self.polls.taken + self.submissions.taken

    def lookup(self) -> Share:
        """Around the look-up of a client's key. Raises ApiError 503."""
        return self._admitted(self.lookups)

    def request(self) -> Share:
        """Around a client's request, for the holder that it has then. Raises ApiError 503."""
        return self._admitted(self.requests)

    def _admitted(self, shares: Shares) -> Share:
        holder, burst = HOLDER.get(), self.gate.callbacks + self.gate.queued_callbacks
        if burst < SHED_AT and shares.left(holder):
            return shares.take(holder)
        self.metrics.requests_shed.inc()
        if (withheld := self.log_sampler.take(time.monotonic())) is not None:
            figures = {"busy": self.active, "waiting": self.waiting, "withheld": withheld}
            log.warning("http.shed", **figures, callbacks=self.gate.callbacks)
        raise ApiError(503, "overloaded", "the service has too much in hand", retry_after=1)

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Inside a request while it does no work, such as while its body arrives."""
        holder = HOLDER.get()
        self.requests.count(holder, "", -1)
        try:
            yield
        finally:
            self.requests.count(holder, "", 1)

    def callback_refused(self) -> None:
        """Counts a callback that gets 503: a line for the first, then one per second."""
        self.metrics.callbacks.labels("overloaded").inc()
        self._refused += 1
        if not self._logging:
            self._log_refused()

    def _log_refused(self) -> None:
        self._logging = self._refused > 0
        if self._logging:
            log.warning("callback.overloaded", refused=self._refused, callbacks=self.gate.callbacks)
            self._refused = 0
            asyncio.get_running_loop().call_later(LOG_EVERY_S, self._log_refused)


# --- wrong tokens ---

RATE, BURST, MAX_DELAY_S = 100, 100, 1.0


class TokenBucket:
    """Token bucket: 100 refusals per second, burst of 100. A refusal without a token in the bucket
    is delayed, by at most a second.

    The delay slows down a client that sends one request after the other, and leaves the processor
    to callbacks.
    """

    def __init__(self) -> None:
        self._next_token = -math.inf

    def delay(self, now: float) -> float:
        """Takes a token, and returns how many seconds the refusal waits for it."""
        wait = max(0.0, self._next_token - now)
        if wait < MAX_DELAY_S:
            self._next_token = max(self._next_token, now - BURST / RATE) + 1 / RATE
        return min(wait, MAX_DELAY_S)
