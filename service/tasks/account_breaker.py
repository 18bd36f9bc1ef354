"""The circuit breaker of submissions, for the service's key and account at the upstream."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import structlog

from service.credits import millionths
from service.db.tables import tasks
from service.db.transaction import Lease, Transaction, one_by_one
from service.errors import EgressError
from service.net.responses import Response
from service.ops.metrics import Metrics
from service.queue import leases
from service.queue.backoff import scheduled_wait
from service.queue.checkpoints import checkpoint
from service.queue.stage import log_failure
from service.resources import Resources
from service.tasks.pause import AT_ONCE, release_held
from service.tasks.state import State
from service.tasks.transitions import change, hold, lock_leased
from service.upstreams.base import Upstream, throttled
from service.upstreams.lenient import document_of, section_of

log = structlog.get_logger()

CREDITS = "/v1/credits"
PATIENCE_S = 10.0  # how long a trial request waits for a slot


class AccountBreaker:
    """Opens when the upstream refuses the key or the account. While it is open, tasks are held, and
    `run` sends a trial request after each wait of `schedule`, in seconds.

    The trial is `GET /v1/credits`, which is free. If that tells nothing, or answered although the
    next submission was refused again, one held task is sent instead (half-open). So it is if only
    the credits were refused so far. A task that is too old to wait is sent once as well, one at a
    time: the service ends no task by its age alone.
    """

    def __init__(self, resources: Resources, upstream: Upstream, schedule: Sequence[float]) -> None:
        self._resources, self._upstream, self._schedule = resources, upstream, schedule
        self._opened = asyncio.Event()
        self._opened_at, self.reason = 0, ""
        self._trials = 0  # since the upstream took a submission
        # False: they answered after a refused submission, and no submission was taken since.
        self._credits_count = True
        self._refusals_count = True  # False: a submission was taken although credits were refused
        self._confirmed = False  # a submission was refused, not the credits alone
        self._half_open = False  # one held task may be sent
        self._sending = False  # it is under way
        self.changed = asyncio.Event()  # opened or closed, which operators have to be told
        self.doubted = asyncio.Event()  # a query was refused: are the credits, too?

    @property
    def is_open(self) -> bool:
        return self._opened.is_set()

    def open(self, reason: str) -> None:
        """The upstream refused a submission because of the key or the account."""
        self._resources.metrics.account_refusals.inc()
        self._open(reason, half=False)
        self._confirmed, self.reason = True, reason

    def refused(self, kind: str, reason: str) -> None:
        """The answer to a call of any kind refuses the key or the account."""
        if kind == "credits" and self._refusals_count:
            self._open(reason, half=True)
        elif kind != "submit":  # the worker calls `open`
            self.doubted.set()

    def _open(self, reason: str, *, half: bool) -> None:
        if not self.is_open:
            self._opened_at, self.reason = self._resources.clock(), reason
            self._half_open = half
            self._opened.set()
            self.changed.set()
            self._resources.metrics.account_refused.set(1)
            log.error("account.refused", reason=reason, setting="DARKROOM_EVOLINK_API_KEY")

    @contextmanager
    def allow(self, *, last: bool) -> Iterator[bool]:
        """Whether a submission may be sent inside. `last`: the task is too old to wait."""
        if not self.is_open or self._sending or not (self._half_open or last):
            yield not self.is_open
            return
        self._half_open, self._sending = False, True
        try:
            yield True
        finally:
            self._sending = False

    async def succeeded(self, *, trial: bool) -> None:
        """The upstream took a submission, or refused the request itself. `trial`: the breaker was
        open when the task was sent.
        """
        if trial and self.is_open:
            self._refusals_count = self._confirmed
            await self._close()
        if not self.is_open:
            self._trials, self._credits_count = 0, True

    async def hold(self, lease: Lease, give_up_s: float) -> None:
        """Holds a task unsent until the breaker closes. If this process dies, the task is due after
        the longest wait of the schedule.
        """
        wait_ms, give_up_ms = self.wait_s(len(self._schedule)) * 1000, give_up_s * 1000
        item = SubmissionHold(lease, round(wait_ms), round(give_up_ms))
        await self._resources.store.write(hold_submissions, item)
        checkpoint("account.held")
        if not self.is_open:  # it closed meanwhile
            await self._resources.store.write(resume_submissions, AT_ONCE)

    async def run(self) -> None:
        while True:
            await self._opened.wait()
            self._trials += 1
            await asyncio.sleep(self.wait_s(self._trials))
            with self.guarded():
                if self.is_open and not self._sending:
                    await self._try()

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Logs and counts an unforeseen exception. The next trial request comes all the same."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - logged and counted
            log_failure("account", None, self._trials, None, error)
            self._resources.metrics.worker_faults.labels("account").inc()

    def wait_s(self, attempt: int) -> float:
        return scheduled_wait(self._schedule, attempt, self._resources.random())

    async def _try(self) -> None:
        self._half_open = False  # while the credits are asked for
        answer = await self.credits() if self._credits_count else None
        if answer is not None and is_document(answer):
            self._credits_count = not self._confirmed
            await self._close()
        elif answer is None or not self._confirmed or not self._same_refusal(answer):
            self._half_open = True
            await self._resources.store.write(resume_submissions, 1)

    async def credits(self) -> Response | None:
        try:
            async with self._resources.limiter.slot("passthrough", PATIENCE_S) as record:
                answer = await self._upstream.passthrough("GET", CREDITS)
                record(throttled(answer))
        except EgressError:
            return None
        note_credits(self._resources.metrics, answer.status, answer.body)
        return answer

    def _same_refusal(self, answer: Response) -> bool:
        code = section_of(document_of(answer.body), "error").get("code")
        return answer.status == 401 or (answer.status == 403 and f"403 {code}" == self.reason)

    async def _close(self) -> None:
        """Held tasks are due at once."""
        self._opened.clear()
        self._half_open = self._confirmed = False
        self.changed.set()
        self._resources.metrics.account_refused.set(0)
        seconds = round((self._resources.clock() - self._opened_at) / 1000, 1)
        log.warning("account.restored", seconds=seconds)
        checkpoint("account.restored")
        more = True
        while more and not self.is_open:
            more = await self._resources.store.write(resume_submissions, AT_ONCE) == AT_ONCE


def is_document(answer: Response) -> bool:
    """Whether the call succeeded, and no page was put in place of its answer."""
    return 200 <= answer.status < 300 and document_of(answer.body) is not None


def note_credits(metrics: Metrics, status: int, body: bytes) -> None:
    """Sets the metric from a response to `GET /v1/credits`, if it has the figure."""
    remaining = remaining_credits(body) if 200 <= status < 300 else None
    if remaining is not None:
        metrics.upstream_credits.set(remaining)


def remaining_credits(body: bytes) -> float | None:
    """`data.token.remaining_credits`. None: it is missing or malformed."""
    token = section_of(section_of(document_of(body), "data"), "token")
    credits = millionths(token.get("remaining_credits"))
    return None if credits is None else credits / 1_000_000


# --- held tasks


@dataclass(frozen=True, slots=True)
class SubmissionHold:
    """The service sent no request. The task is due after `wait_ms`, and at the age `give_up_ms`."""

    lease: Lease
    wait_ms: int
    give_up_ms: int


def hold_submissions(tx: Transaction, items: Sequence[SubmissionHold]) -> list[bool]:
    """Holds tasks. False: the lease was lost."""
    pairs = list(lock_leased(tx, items))
    for item, row in pairs:
        if row is None:
            continue
        give_up_at, due_at = row.created_at + item.give_up_ms, tx.now + item.wait_ms
        if row.state is State.QUEUED and tx.now < give_up_at:
            due_at = min(due_at, give_up_at)
        if row.state in (State.QUEUED, State.UNCERTAIN):
            hold(tx, row, due_at)
        else:  # cancelled meanwhile, or proved
            change(tx, row, **leases.release("submit", row.submit_due_at))
    return [row is not None for _, row in pairs]


@one_by_one
def resume_submissions(tx: Transaction, limit: int) -> int:
    """Makes up to so many tasks that this process holds due, in their turn. Returns how many."""
    return release_held(tx, limit, tasks.c.submit_lease_owner == tx.process)
