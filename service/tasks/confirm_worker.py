"""The worker that confirms tasks: it queries the upstream and records the outcome once.

A callback and a silent task take the same way: both make the task due for a query. With
`DARKROOM_EVOLINK_CONFIRM=never` the first callback's word replaces the query.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import structlog

from service.db.transaction import Lease
from service.errors import NoPlace
from service.ops import tracing
from service.queue import leases
from service.queue.backoff import confirm_wait, first_query_wait, next_query_wait
from service.queue.checkpoints import checkpoint
from service.resources import Resources
from service.tasks import task_queries
from service.tasks.rows import TaskRow
from service.tasks.settlements import Settlement, record_settlements
from service.tasks.state import State
from service.upstreams.base import Found, NoAnswer, NotFound, QueryOutcome, throttled

log = structlog.get_logger()

PATIENCE_S = 2.0  # a reconciling query waits this long for a slot, then gives its row back


@dataclass(frozen=True, slots=True)
class QueryPlan:
    """When a task is queried (docs/concepts.md). Waits are milliseconds.

    `with_callback`: the upstream got a callback_url. `after` is `RECONCILE_AFTER_S`. The first
    query comes when the task is `ttl_s` old at the latest, as the upstream may keep it no longer.
    """

    with_callback: bool
    after: float | None
    random: Callable[[], float]
    ttl_s: float = math.inf

    def first(self, estimated_time: int | None) -> int:
        wait = first_query_wait(estimated_time, self.with_callback, self.after)
        return round(min(wait, self.ttl_s) * 1000)

    def again(self, attempt: int, *, called_back: bool, retry_after: float | None = None) -> int:
        """The wait after a query that settled nothing, in milliseconds. It is short after a
        callback of an ended task, and after an operator has asked for an ended task's results.
        """
        wait = confirm_wait(attempt)
        if not called_back:
            wait = next_query_wait(attempt, self.with_callback, self.after, self.random())
        return round(max(wait, retry_after or 0) * 1000)


@dataclass(frozen=True, slots=True)
class ConfirmWorker:
    """The stages `settle`, for tasks that a callback or an operator asked about, and `reconcile`,
    for silent tasks. `confirm` False: the first callback needs no query.
    """

    resources: Resources
    plan: QueryPlan
    confirm: bool
    task_ttl_s: float
    result_ttl_s: float
    no_results_after_s: float

    async def run(self, lease: Lease) -> None:
        store = self.resources.store
        row, callback = await self._task(lease)
        if row is None or (row.upstream_id is None and row.state is not State.SUBMITTED):
            await store.write(leases.done, lease)
            return
        checkpoint("settle.claimed")
        try:
            answer = await self._answer(lease, row, callback)
        except NoPlace:
            await store.write(leases.give_back, lease)
            return
        report = answer.report if isinstance(answer, Found) else None
        silence = answer if isinstance(answer, NoAnswer) else None
        wait_ms = self.plan.again(
            lease.attempts,
            called_back=callback is not None or row.settled_digest is not None,
            retry_after=silence.retry_after if silence else None,
        )
        raw = b"" if isinstance(answer, NotFound) else answer.raw
        if raw:
            log.warning("upstream.unreadable", kind="query", reason=_word(answer))
        if callback is None:
            word, wait_s = _word(answer), wait_ms / 1000
            log.info("reconcile.queried", attempt=lease.attempts, answer=word, wait_s=wait_s)
        checkpoint("settle.answered")
        latest_ms = round(self.task_ttl_s * 1000)
        settlement = Settlement(
            lease,
            report,
            requests=row.settle_requests,
            wait_ms=wait_ms,
            result_ttl_ms=round(self.result_ttl_s * 1000),
            expires_ms=None if silence else latest_ms,
            latest_ms=latest_ms,
            patience_ms=round(self.no_results_after_s * 1000),
            raw=raw,
            source=answer.source if isinstance(answer, Found) else "query",
        )
        if report is not None and report.final:
            await self.resources.shared_commits.join(row.id)
        recorded = await store.write(record_settlements, settlement)
        checkpoint("settle.recorded")
        if recorded is not None and report is not None and report.final and not row.terminal:
            figures = {"status": report.status, "results": len(report.results)}
            if recorded is State.SUBMITTED:
                log.warning("task.results_awaited", **figures)
            else:
                log.info("task.confirmed", **figures)

    async def _task(self, lease: Lease) -> tuple[TaskRow | None, bytes | None]:
        """The task, and the body of its first terminal callback: empty if it is not needed before
        the query.
        """
        row: TaskRow | None = lease.row
        body: bytes | None = b""
        if not self.confirm or row is None or row.called_back_at is None:
            row, body = await self.resources.store.look_up(task_queries.settling, lease.key)
        if row is not None:
            tracing.work_for(row.origin, owner=row.owner)
        return row, body

    async def _answer(self, lease: Lease, row: TaskRow, callback: bytes | None) -> QueryOutcome:
        """Raises NoPlace if a reconciling query found no slot in time. A callback may ask for the
        same row meanwhile.
        """
        upstream = self.resources.upstreams[row.upstream]
        called = None if callback is None else upstream.read_callback(callback)
        once = row.settle_requests == 1 and row.state is State.SUBMITTED  # nothing contradicted it
        if called is not None and once and not self.confirm and not called.incomplete:
            return Found(called, "callback")
        if row.upstream_id is None:  # another task proved that the id was its own
            return NotFound()
        urgent = lease.stage == "settle"
        async with self.resources.limiter.slot(
            "confirm" if urgent else "reconcile", None if urgent else PATIENCE_S
        ) as record:
            with tracing.span("confirm", attributes={"darkroom.task.id": row.id}):
                answer = await upstream.query(row.upstream_id)
            record(throttled(answer))
        if not isinstance(answer, Found) or callback is None:
            return answer
        if not callback and answer.report.final and not answer.report.names_cost:
            callback = await self.resources.store.look_up(task_queries.first_callback, row.id)
            called = upstream.read_callback(callback) if callback else None
        if called is None:
            return answer
        return replace(answer, report=answer.report.with_credits_of(called))


def _word(answer: QueryOutcome) -> str:
    match answer:
        case Found(report):
            return report.status or "undocumented"
        case NotFound():
            return "not_found"
    return answer.reason
