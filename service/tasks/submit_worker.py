"""The worker that submits tasks. It sends a task at most once, unless a response proves that
nothing was created. docs/api.md says which response proves what.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from service.db.batching import Item, Result
from service.db.clock import steady_ns
from service.db.transaction import Lease, Transaction
from service.errors import StoreUnavailable
from service.ops import tracing
from service.queue import leases
from service.queue.backoff import scheduled_wait
from service.queue.checkpoints import checkpoint
from service.resources import Resources
from service.tasks import task_queries
from service.tasks.account_breaker import AccountBreaker
from service.tasks.confirm_worker import QueryPlan
from service.tasks.pause import PauseWatch, hold_paused
from service.tasks.rows import TaskRow
from service.tasks.state import UNPROVED, State
from service.tasks.submissions import (
    SubmissionResult,
    SubmissionStart,
    record_submissions,
    start_submissions,
)
from service.tasks.upstream_copies import (
    InputFailure,
    InputProblem,
    forget_refused,
    input_links,
    record_input_failures,
    with_input_links,
)
from service.upstreams.base import (
    Accepted,
    Finished,
    NotCreated,
    Refused,
    SubmitOutcome,
    Uncertain,
    throttled,
)

log = structlog.get_logger()

RECORD_AGAIN_S = 0.5
MARGIN_S = 10.0  # the lease outlasts the call by this, so that the outcome can be recorded


@dataclass(frozen=True, slots=True)
class SubmitWorker:
    """The stage `submit`."""

    resources: Resources
    plan: QueryPlan
    breaker: AccountBreaker
    schedule: tuple[float, ...]
    timeout_s: float
    give_up_s: float
    uncertain: str  # fail | resubmit
    uncertain_after_s: float
    result_ttl_s: float
    pause: PauseWatch | None = None

    async def run(self, lease: Lease) -> None:
        row: TaskRow | None = lease.row
        if row is None:
            row = await self.resources.store.look_up(task_queries.task_row, lease.key, None)
        if row is not None:
            tracing.work_for(row.origin, owner=row.owner)
        if row is None or row.state not in UNPROVED:
            await self.resources.store.write(leases.done, lease)
        elif row.state is State.SUBMITTING:  # its worker died, and the response is lost
            lost = Uncertain("its sender died before the answer was recorded")
            await self._record(lease, lost)
        elif row.state is State.UNCERTAIN and not self._resubmits(row):
            await self._record(lease, None)
        else:
            with tracing.span("submit", attributes={"darkroom.task.id": row.id}):
                await self._send(lease, row)

    def _resubmits(self, row: TaskRow) -> bool:
        """Whether an uncertain task is sent again: by an earlier decision, or by the setting while
        the task is young.
        """
        return row.resubmit or (self.uncertain == "resubmit" and self._young(row))

    def _young(self, row: TaskRow) -> bool:
        return self.resources.store.clock() - row.created_at < self.give_up_s * 1000

    async def _send(self, lease: Lease, row: TaskRow) -> None:
        """Sends the task once a slot is free. The state changes after that, so that a task that is
        `submitting` has a call under way.
        """
        resources, breaker = self.resources, self.breaker
        paused = self.pause is not None and self.pause.pause.paused_at is not None
        if paused and await resources.store.write(hold_paused, lease):
            return
        last = row.state is State.QUEUED and not self._young(row)  # one try before giving up
        async with resources.limiter.slot("submit") as record:
            if resources.store.signals.stopping:
                await resources.store.write(leases.give_back, lease)
                return
            trial = breaker.is_open
            with breaker.allow(last=last) as allowed:
                if not allowed:
                    await breaker.hold(lease, self.give_up_s)
                    return
                links = await input_links(resources, row) if row.inputs else {}
                if isinstance(links, InputProblem):
                    record(links.throttled or None)
                    await self._record_problem(lease, links)
                    return
                body = await self._start(lease, resubmit=row.state is State.UNCERTAIN)
                if body is None:
                    return
                body = with_input_links(body, links)
                body = resources.keyring.with_token(row.upstream, row.id, body)
                outcome = await resources.upstreams[row.upstream].submit(body, lease.key)
                checkpoint("submission.answered")
                record(throttled(outcome))
        await self._record(lease, outcome)
        checkpoint("submission.recorded")
        if isinstance(outcome, Accepted | Finished | Refused):
            await breaker.succeeded(trial=trial)
        if isinstance(outcome, Refused) and links:
            await forget_refused(resources, outcome, links)

    async def _start(self, lease: Lease, *, resubmit: bool) -> bytes | None:
        """The body to send, once the task is `submitting`. None: this process must not send it."""
        checkpoint("submission.claimed")
        asked, call_ms = steady_ns(), round((self.timeout_s + MARGIN_S) * 1000)
        body = await self._until_stored(
            start_submissions, SubmissionStart(lease, call_ms, resubmit)
        )
        if body is None:
            await self.resources.store.write(leases.done, lease)
            return None
        checkpoint("submission.started")
        if steady_ns() - asked > MARGIN_S * 1e9:  # the lease would not outlast the call any more
            await self._record(lease, NotCreated("the process stood still"), wait_s=0.0)
            return None
        return body

    async def _record_problem(self, lease: Lease, problem: InputProblem) -> None:
        """Records that nothing was sent, because an input image did not reach the upstream."""
        wait_s = max(self._scheduled_s(lease), problem.retry_after or 0)
        fields = {"attempt": lease.attempts, "reason": problem.reason, "code": problem.code}
        log.warning("input.retried", **fields, wait_s=round(wait_s, 3))
        give_up_ms = round(self.give_up_s * 1000)
        failure = InputFailure(lease, problem, round(wait_s * 1000), give_up_ms)
        await self._until_stored(record_input_failures, failure)

    async def _record(
        self, lease: Lease, outcome: SubmitOutcome | None, wait_s: float | None = None
    ) -> None:
        decide_s = self._decide_s(lease)
        if wait_s is None:
            wait_s = self._wait_s(lease, outcome)
            self._log(lease, outcome, wait_s, decide_s)
        result = SubmissionResult(
            lease,
            outcome,
            wait_ms=round(wait_s * 1000),
            decide_ms=round(decide_s * 1000),
            give_up_ms=round(self.give_up_s * 1000),
            resend=self.uncertain == "resubmit",
            result_ttl_ms=round(self.result_ttl_s * 1000),
        )
        state = await self._until_stored(record_submissions, result)
        if isinstance(outcome, Accepted | Finished):
            log.info(
                "task.submitted",
                upstream_id=outcome.report.upstream_id,
                attempt=lease.attempts,
                estimated_time=outcome.report.estimated_time,
                state=state,
            )

    def _log(
        self, lease: Lease, outcome: SubmitOutcome | None, wait_s: float, decide_s: float
    ) -> None:
        match outcome:
            case NotCreated(reason, account=account):
                if account:
                    self.breaker.open(reason)
                log.warning(
                    "task.submission_retried",
                    attempt=lease.attempts,
                    reason=reason,
                    account=account,
                    wait_s=round(wait_s, 3),
                )
            case Refused(status, error):
                log.info("task.submission_refused", status=status, code=error["code"])
            case Uncertain(reason):
                log.warning("task.submission_uncertain", reason=reason, decide_s=decide_s)

    def _wait_s(self, lease: Lease, outcome: SubmitOutcome | None) -> float:
        match outcome:
            case Accepted(report):
                return self.plan.first(report.estimated_time) / 1000
            case NotCreated(account=False):
                return max(self._scheduled_s(lease), outcome.retry_after or 0)
        return 0.0  # after a refusal of the account the breaker holds the task

    def _scheduled_s(self, lease: Lease) -> float:
        return scheduled_wait(self.schedule, lease.attempts, self.resources.random())

    def _decide_s(self, lease: Lease) -> float:
        """When an uncertain task is decided. Without a callback URL no proof can come any more: it
        fails at once, or is sent again by the schedule.
        """
        if self.plan.with_callback:
            return self.uncertain_after_s
        return self._scheduled_s(lease) if self.uncertain == "resubmit" else 0.0

    async def _until_stored(
        self, operation: Callable[[Transaction, Sequence[Item]], Sequence[Result]], item: Item
    ) -> Result:
        """Repeats a write until the store has it. The upstream's response cannot be asked for
        again. A start may be in the store although its commit got no answer. There it looks like a
        request that was sent.
        """
        logged = False
        while True:
            try:
                return await self.resources.store.write(operation, item)
            except StoreUnavailable as error:
                if not logged:
                    log.warning("store.failed", message=str(error), exception=repr(error.__cause__))
                logged = True
                await asyncio.sleep(RECORD_AGAIN_S)
