"""The worker that confirms tasks: it queries the upstream and records the outcome once.

A callback and a silent task take the same way: both make the task due for a query. With
`EVOLINK_CONFIRM=never` the first callback's word replaces the query.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from service.db.transaction import Lease, Transaction
from service.errors import NoPlace
from service.queue import leases
from service.queue.backoff import confirm_wait, first_query_wait, next_query_wait
from service.queue.checkpoints import checkpoint
from service.resources import Resources
from service.tasks import task_queries
from service.tasks.results import awaited, expect, finish_if_done, tell_late
from service.tasks.rows import TaskRow
from service.tasks.state import UNPROVED, State
from service.tasks.transitions import (
    change,
    end,
    fill,
    forget_downloads,
    lock_leased,
    move,
    submitted,
    task_error,
)
from service.upstreams.base import (
    Found,
    NoAnswer,
    NotFound,
    QueryOutcome,
    Report,
    Status,
    outcome_digest,
    throttled,
)

log = structlog.get_logger()

PATIENCE_S = 2.0  # a reconciling query waits this long for a slot, then gives its row back


@dataclass(frozen=True, slots=True)
class QueryPlan:
    """When a task is queried (docs/concepts.md). Waits are milliseconds.

    `with_callback`: the upstream got a callback_url. `after` is `RECONCILE_AFTER_S`.
    """

    with_callback: bool
    after: float | None
    random: Callable[[], float]

    def first(self, estimated_time: int | None) -> int:
        """From the submission to the first query."""
        return round(first_query_wait(estimated_time, self.with_callback, self.after) * 1000)

    def again(self, attempt: int, *, called_back: bool, retry_after: float | None = None) -> int:
        """After a query that settled nothing. A callback that says that the task has ended makes
        the wait short.
        """
        wait = confirm_wait(attempt)
        if not called_back:
            wait = next_query_wait(attempt, self.with_callback, self.random())
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

    async def run(self, lease: Lease) -> None:
        store = self.resources.store
        row, callback = await store.read(task_queries.settling, lease.key)
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
        retry_after = answer.retry_after if isinstance(answer, NoAnswer) else None
        called_back = callback is not None
        wait_ms = self.plan.again(lease.attempts, called_back=called_back, retry_after=retry_after)
        if callback is None:
            word, wait_s = _word(answer), wait_ms / 1000
            log.info("reconcile.queried", attempt=lease.attempts, answer=word, wait_s=wait_s)
        checkpoint("settle.answered")
        settlement = Settlement(
            lease,
            report,
            requests=row.settle_requests,
            wait_ms=wait_ms,
            result_ttl_ms=round(self.result_ttl_s * 1000),
            expires_ms=round(self.task_ttl_s * 1000) if isinstance(answer, NotFound) else None,
        )
        recorded = await store.write(record_settlements, settlement)
        checkpoint("settle.recorded")
        if recorded is not None and report is not None and report.final and not row.terminal:
            log.info(
                "task.confirmed",
                owner=row.owner,
                upstream_id=row.upstream_id,
                status=report.status,
                results=len(report.results),
            )

    async def _answer(self, lease: Lease, row: TaskRow, callback: bytes | None) -> QueryOutcome:
        """Raises NoPlace if a reconciling query found no slot in time. A callback may ask for the
        same row meanwhile.
        """
        upstream = self.resources.upstreams[row.upstream]
        once = row.settle_requests == 1 and row.state is State.SUBMITTED  # nothing contradicted it
        if callback is not None and once and not self.confirm:
            believed = upstream.read_callback(callback)
            if believed is not None:
                return Found(believed)
        if row.upstream_id is None:  # another task proved that the id was its own
            return NotFound()
        urgent = lease.stage == "settle"
        async with self.resources.limiter.slot(
            "confirm" if urgent else "reconcile", None if urgent else PATIENCE_S
        ) as record:
            answer = await upstream.query(row.upstream_id)
            record(throttled(answer))
        return answer


def _word(answer: QueryOutcome) -> str:
    match answer:
        case Found(report):
            return report.status or "undocumented"
        case NotFound():
            return "not_found"
    return answer.reason


# --- recording


@dataclass(frozen=True, slots=True)
class Settlement:
    """The answer to a query.

    `report` None: no answer came, or, with `expires_ms`, the upstream does not know the task, which
    is expired if it is older than that. `requests` is the task's `settle_requests` at the time of
    the query: a callback since then asks for another.
    """

    lease: Lease
    report: Report | None
    requests: int
    wait_ms: int
    result_ttl_ms: int
    expires_ms: int | None = None


def record_settlements(tx: Transaction, items: Sequence[Settlement]) -> list[State | None]:
    """Records answers. Returns the states after it, or None where the lease had ended and nothing
    changed.
    """
    return [_settle(tx, row, item) if row else None for item, row in lock_leased(tx, items)]


def _settle(tx: Transaction, row: TaskRow, item: Settlement) -> State:
    due_at = _record(tx, row, item)
    settled = row.terminal and row.settled_digest is not None
    asked_again = row.settle_requests != item.requests and not settled
    change(tx, row, **leases.release("settle", tx.now if asked_again else due_at))
    if asked_again:
        change(tx, row, **leases.requeue(tx, "settle", row.id, row))
    return row.state


def _record(tx: Transaction, row: TaskRow, item: Settlement) -> int | None:
    """Returns when to query again, or None."""
    report, again_at = item.report, tx.now + item.wait_ms
    if report is None:
        return _unanswered(tx, row, item)
    change(tx, row, **fill(row, report))
    if row.upstream_id_from == "hand":
        change(tx, row, upstream_id_from="query")
    if row.terminal:
        return _record_late(tx, row, report, item)
    if row.state in UNPROVED and row.upstream_id is not None:
        submitted(tx, row, row.upstream_id, row.upstream_id_from or "", report)
    if report.final:
        _finish(tx, row, report, item)
        return None
    if report.status is not None and row.state is not State.STORING:
        change(tx, row, upstream_status=report.status)
    return again_at


def _unanswered(tx: Transaction, row: TaskRow, item: Settlement) -> int | None:
    age = tx.now - (row.submitted_at or row.created_at)
    expired = item.expires_ms is not None and age >= item.expires_ms
    if expired and row.state is State.SUBMITTED:
        end(tx, row, State.EXPIRED, task_error("expired", "the upstream no longer knows the task"))
        return None
    if row.terminal and (row.settled_digest is not None or expired):
        return None
    return tx.now + item.wait_ms


def _finish(tx: Transaction, row: TaskRow, report: Report, item: Settlement) -> None:
    """Moves a task on by a final report. A task that is storing is settled already: each of its
    images is stored or lost by the rules for its link.
    """
    settled = {
        "settled_digest": outcome_digest(report.status, report.results),
        "upstream_status": report.status,
    }
    if row.state is State.SUBMITTED:
        tx.step(row.id, "task.confirmed", status=report.status)
    if report.status is Status.COMPLETED and report.results:
        expect(tx, row, report.results, item.result_ttl_ms)
        if row.state is State.SUBMITTED:
            move(tx, row, State.STORING, **settled)
        finish_if_done(tx, row)
        return
    if row.state is State.STORING:
        return
    forget_downloads(tx, row.id)
    state, error = State.FAILED, report.error
    if report.status is Status.COMPLETED:
        error = task_error("no_results", "the upstream completed the task without any result")
    elif report.status is Status.CANCELLED:
        state = State.CANCELLED
        error = error or task_error("request_cancelled", "cancelled by the upstream")
    elif error and _unknown_upstream(report):  # not settled: proof may still come
        state, error = State.EXPIRED, {**error, "code": "expired"}
        settled = {"upstream_status": report.status}
    end(
        tx,
        row,
        state,
        error or task_error("unknown_error", "the upstream gave no reason"),
        **settled,
    )


def _record_late(tx: Transaction, row: TaskRow, report: Report, item: Settlement) -> int | None:
    """Records a report on a task that has ended. Its state and its event stand.

    After an end of the service's own the upstream is queried until it has ended the task too. Then
    the images are saved and operators are told, unless the task was cancelled or erased.
    """
    late = row.settled_digest is None and row.state is not State.CANCELLED and row.erased_at is None
    completed = report.status is Status.COMPLETED
    if report.final and late:
        if _unknown_upstream(report) and row.state is State.EXPIRED:
            return None  # this says no more than the end did: proof may still come
        digest = outcome_digest(report.status, report.results)
        change(tx, row, settled_digest=digest, upstream_status=report.status)
        if not (completed and report.results):
            forget_downloads(tx, row.id)
            tell_late(tx, row)
            return None
    if completed and (late or awaited(tx, row.id)):
        expect(tx, row, report.results, item.result_ttl_ms)
        finish_if_done(tx, row)
    return None if report.final or row.settled_digest is not None else tx.now + item.wait_ms


def _unknown_upstream(report: Report) -> bool:
    """Whether the upstream says that it keeps the task no more."""
    error = report.error or {}
    return report.status is Status.FAILED and error.get("code") == "resource_not_found"
