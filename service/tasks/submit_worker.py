"""The worker that submits: at most once, by the table "What a submission's outcome proves"
(contract section 3).
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from service.db.clock import steady_ns
from service.db.store import Item, Result
from service.db.transaction import Lease, Transaction
from service.errors import StoreUnavailable
from service.queue import leases
from service.queue.backoff import wait_before
from service.queue.checkpoints import checkpoint
from service.resources import Resources
from service.tasks import submissions as store
from service.tasks import task_queries
from service.tasks.account_breaker import Account
from service.tasks.reconcile import Plan
from service.tasks.rows import TaskRow
from service.tasks.state import State
from service.upstreams import base
from service.upstreams.base import throttled

log = structlog.get_logger()

RECORD_AGAIN_S = 0.5
MARGIN_S = 10.0  # the lease outlasts the call by so much, for recording its answer


@dataclass(frozen=True, slots=True)
class Submitter:
    """Stage `submit`."""

    resources: Resources
    plan: Plan
    account: Account
    schedule: tuple[float, ...]
    timeout_s: float
    give_up_s: float
    uncertain: str  # fail | resubmit
    uncertain_after_s: float

    async def run(self, lease: Lease) -> None:
        row = await self.resources.store.read(task_queries.task_row, lease.key, None)
        state = row.state if row else None
        if state is State.SUBMITTING:  # whoever sent it died, and its answer with it
            await self._record(
                lease, self._uncertain(lease, "its sender died before the answer was recorded")
            )
        elif row and state is State.UNCERTAIN and not self._resubmits(row):
            await self._record(lease, store.Undecided())
        elif row and state in (State.QUEUED, State.UNCERTAIN):
            await self._send(
                lease,
                resubmit=state is State.UNCERTAIN,
                last=state is State.QUEUED and not self._young(row),
            )
        else:
            await self.resources.store.write(leases.done, lease)

    def _resubmits(self, row: TaskRow) -> bool:
        """Whether an uncertain task is sent again: as was decided for it, or for as long as one of
        which nothing was created.
        """
        return row.resubmit or (self.uncertain == "resubmit" and self._young(row))

    def _young(self, row: TaskRow) -> bool:
        return self.resources.store.clock() - row.created_at < self.give_up_s * 1000

    async def _send(self, lease: Lease, *, resubmit: bool, last: bool) -> None:
        """`last`: it is too old to wait on, but is not given up without a try."""
        async with self.resources.limiter.slot(
            "submit"
        ) as record:  # a place first: what is `submitting` is on its way
            if (
                self.resources.store.signals.stopping
            ):  # while it waited: whoever comes next sends it
                await self.resources.store.write(leases.give_back, lease)
                return
            trial = self.account.refused
            with self.account.sending(last=last) as may:
                if not may:
                    await self.account.hold(lease, self.give_up_s)
                    return
                checkpoint("submission.claimed")
                asked = steady_ns()
                start = store.Start(lease, round((self.timeout_s + MARGIN_S) * 1000), resubmit)
                body = await self._kept(store.start_submissions, start)
                if body is None:
                    await self.resources.store.write(leases.done, lease)
                    return
                checkpoint("submission.started")
                if (
                    steady_ns() - asked > MARGIN_S * 1e9
                ):  # it stood still: the lease, if it still is ours, would not outlast the call
                    await self._record(
                        lease,
                        store.Again("the process stood still", 0, round(self.give_up_s * 1000)),
                    )
                    return
                answer = await self.resources.upstream.submit(body, lease.key)
                checkpoint("submission.answered")
                record(throttled(answer))
        await self._record(lease, self._outcome(lease, answer))
        checkpoint("submission.recorded")
        if isinstance(answer, base.Accepted | base.Refused):
            await self.account.taken(trial=trial)

    def _outcome(
        self, lease: Lease, answer: base.SubmitOutcome
    ) -> store.Accepted | store.Again | store.Refused | store.Uncertain:
        match answer:
            case base.Accepted(report):
                return store.Accepted(
                    report,
                    self.plan.first(report.estimated_time),
                    round(self._decide_s(lease) * 1000),
                )
            case base.NotCreated(reason, retry_after, account):
                if account:
                    self.account.refuse(reason)
                wait = (
                    0.0 if account else max(self._wait(lease), retry_after or 0)
                )  # what comes then is held, until the account is good
                log.warning(
                    "task.submission_retried",
                    attempt=lease.attempts,
                    reason=reason,
                    account=account,
                    wait_s=round(wait, 3),
                )
                return store.Again(reason, round(wait * 1000), round(self.give_up_s * 1000))
            case base.Refused(status, error):
                log.info("task.submission_refused", status=status, code=error["code"])
                return store.Refused(status, error)
        return self._uncertain(lease, answer.reason)

    def _wait(self, lease: Lease) -> float:
        wait = wait_before(
            self.schedule,
            lease.attempts,
            repeat_last=True,
            random=self.resources.random(),
            spread=0.2,
        )
        assert wait is not None  # the last wait repeats
        return wait

    def _decide_s(self, lease: Lease) -> float:
        """Without a callback URL nothing can prove it any more: it is decided at once; what is sent
        again keeps to the schedule.
        """
        at_once = self._wait(lease) if self.uncertain == "resubmit" else 0.0
        return self.uncertain_after_s if self.plan.with_callback else at_once

    def _uncertain(self, lease: Lease, reason: str) -> store.Uncertain:
        decide_s = self._decide_s(lease)
        log.warning("task.submission_uncertain", reason=reason, decide_s=decide_s)
        return store.Uncertain(reason, round(decide_s * 1000), resend=self.uncertain == "resubmit")

    async def _record(
        self,
        lease: Lease,
        outcome: store.Accepted | store.Again | store.Refused | store.Uncertain | store.Undecided,
    ) -> None:
        state = await self._kept(store.record_submissions, store.Submission(lease, outcome))
        if isinstance(outcome, store.Accepted):
            report = outcome.report
            log.info(
                "task.submitted",
                upstream_id=report.upstream_id,
                attempt=lease.attempts,
                estimated_time=report.estimated_time,
                state=state,
            )

    async def _kept(
        self, operation: Callable[[Transaction, Sequence[Item]], Sequence[Result]], item: Item
    ) -> Result:
        """A write's result once the store has it. What the upstream said cannot be asked for again;
        and a start whose commit was not answered may be in the store, where nobody could tell it
        from one that was sent.
        """
        told = False
        while True:
            try:
                return await self.resources.store.write(operation, item)
            except StoreUnavailable as error:
                if not told:
                    log.warning("store.failed", message=str(error), exception=repr(error.__cause__))
                told = True
                await asyncio.sleep(RECORD_AGAIN_S)
