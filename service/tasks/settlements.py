"""Answers to queries in the store: each outcome of a task is recorded once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select

from service.db.transaction import Lease, Transaction
from service.queue import leases
from service.tasks.ledger import entered
from service.tasks.results import (
    await_missing,
    awaited,
    expect,
    finish_if_done,
    links_awaited,
    named_so_far,
    tell_late,
)
from service.tasks.rows import TaskRow
from service.tasks.state import UNPROVED, State
from service.tasks.transitions import (
    VERDICT_MS,
    callback_waits,
    change,
    end,
    fill,
    forget_downloads,
    keep_raw,
    lock_leased,
    move,
    submitted,
    task_error,
)
from service.upstreams.base import Report, Status, outcome_digest


@dataclass(frozen=True, slots=True)
class Settlement:
    """The answer to a query.

    `report` None: the upstream does not know the task, or, without `expires_ms`, no answer came. A
    task that is older than `expires_ms` is expired, unless the report is final. A task younger than
    `latest_ms` is queried again at that age at the latest, despite a longer wait. A completed task
    without all of its results is asked for again for `patience_ms`. `requests` is the task's
    `settle_requests` at the time of the query: a callback since then asks for another. `raw` is the
    beginning of an answer that could not be read. `source` is `callback` if no query was made.
    """

    lease: Lease
    report: Report | None
    requests: int
    wait_ms: int
    result_ttl_ms: int
    expires_ms: int | None = None
    latest_ms: int = 0
    patience_ms: int = 0
    raw: bytes = b""
    source: str = "query"


def record_settlements(tx: Transaction, items: Sequence[Settlement]) -> list[State | None]:
    """Records answers. Returns the states after it, or None where the lease had ended and nothing
    changed.
    """
    return [_settle(tx, row, item) if row else None for item, row in lock_leased(tx, items)]


def _settle(tx: Transaction, row: TaskRow, item: Settlement) -> State:
    due_at = _record(tx, row, item)
    entered(tx, row, item.source)
    settled = row.terminal and row.settled_digest is not None
    asked_again = row.settle_requests != item.requests and not settled
    change(tx, row, **leases.release("settle", tx.now if asked_again else due_at))
    if asked_again:
        change(tx, row, **leases.requeue(tx, "settle", row.id, row))
    return row.state


def _record(tx: Transaction, row: TaskRow, item: Settlement) -> int | None:
    """Returns when to query again, or None."""
    report = item.report
    if item.raw:
        keep_raw(tx, row.id, "query", item.raw)
    if report is None:
        return _unsettled(tx, row, item, "the upstream no longer knows the task")
    change(tx, row, **fill(row, report))
    if row.upstream_id_from == "hand":
        change(tx, row, upstream_id_from="query")
    if row.state in UNPROVED and row.upstream_id is not None:
        submitted(tx, row, row.upstream_id, row.upstream_id_from or "", report)
    if report.incomplete:
        again_at = await_missing(tx, row, report, item.result_ttl_ms, item.patience_ms)
        if again_at is not None:
            return again_at
    if row.terminal:
        return _record_late(tx, row, report, item)
    if report.final:
        _finish(tx, row, report, item)
        return None
    if report.status is not None and row.state is not State.STORING:
        change(tx, row, upstream_status=report.status)
    status = report.status or "no known status"
    return _unsettled(tx, row, item, f"the upstream's last word was {status}")


def finish_at_once(
    tx: Transaction, row: TaskRow, report: Report, lease: Lease, result_ttl_ms: int
) -> None:
    """Records a completed report that was the answer to the submission. It has no id, so nothing
    can be asked again. An outcome that a query has settled stands.
    """
    if row.settled_digest is not None:
        return
    submitted(tx, row, None, "answer", report)
    item = Settlement(lease, report, row.settle_requests, 0, result_ttl_ms)
    if row.terminal:
        _record_late(tx, row, report, item)
    else:
        _finish(tx, row, report, item)


def _unsettled(tx: Transaction, row: TaskRow, item: Settlement, why: str) -> int | None:
    """Ends a task as expired when its time at the upstream is up without an outcome. Returns when
    to query again.
    """
    age, wait_ms = tx.now - (row.submitted_at or row.created_at), item.wait_ms
    again_at = tx.now + (min(wait_ms, item.latest_ms - age) if age < item.latest_ms else wait_ms)
    expired = item.expires_ms is not None and age >= item.expires_ms
    if expired and row.state is State.SUBMITTED:
        if tx.connection.scalar(select(callback_waits(row.id))):
            return tx.now + VERDICT_MS
        end(tx, row, State.EXPIRED, task_error("expired", why))
    if row.terminal and row.settled_digest is not None:
        return _await_links(tx, row, item)
    if row.terminal and expired:
        return again_at if _just_called_back(tx, row, item) else None
    return again_at


def _await_links(tx: Transaction, row: TaskRow, item: Settlement) -> int | None:
    """When to query again for the fresh links that an operator asked for. Once the upstream says
    that there are none, the old links are tried.
    """
    waiting, report = links_awaited(tx, row.id), item.report
    silent = item.expires_ms is None
    if silent or (report is not None and (report.incomplete or not report.final)):
        until = [image.due_at for image in waiting if image.due_at is not None]
        return min(tx.now + item.wait_ms, *until) if until else None
    for image in waiting:
        change(tx, image, **leases.requeue(tx, "download", image.id, image))
    return None


def _just_called_back(tx: Transaction, row: TaskRow, item: Settlement) -> bool:
    """Whether a callback proved an outcome so recently that a query may not know it yet."""
    called = row.settled_digest is None and row.called_back_at is not None
    return called and tx.now - (row.called_back_at or 0) < item.patience_ms


def _finish(tx: Transaction, row: TaskRow, report: Report, item: Settlement) -> None:
    """Moves a task on by a final report. A task that is storing is settled already: each of its
    images is stored or lost by the rules for its link.
    """
    settled: dict[str, Any] = {
        "settled_digest": outcome_digest(report.status, report.results),
        "upstream_status": report.status,
    }
    if row.state is State.SUBMITTED:
        tx.step(row.id, "task.confirmed", status=report.status)
    results = report.results or named_so_far(tx, row.id)
    if report.status is Status.COMPLETED and results:
        images = expect(tx, row, results, item.result_ttl_ms)
        if row.state is State.SUBMITTED:
            move(tx, row, State.STORING, **settled)
        finish_if_done(tx, row, images)
        return
    if row.state is State.STORING:
        return
    forget_downloads(tx, row.id)
    state, error = State.FAILED, report.error
    if report.status is Status.COMPLETED:
        error = task_error("no_results", "the upstream completed the task without any result")
    elif report.status is Status.CANCELLED:
        state = State.CANCELLED
        given = error or task_error("", "cancelled by the upstream")
        error = {**given, "code": "request_cancelled"}  # in the place of the upstream's code
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
    completed = report.status is Status.COMPLETED
    revised = completed and not report.incomplete and _ended_empty(row)
    unproved = row.settled_digest is None or revised
    late = unproved and row.state is not State.CANCELLED and row.erased_at is None
    results = report.results or named_so_far(tx, row.id)
    if completed and row.settled_digest is None and not late:
        change(tx, row, upstream_status=report.status)  # its cost counts, also if no image is kept
    if report.final and late:
        if _unknown_upstream(report) and row.state is State.EXPIRED:
            return None  # this says no more than the end did: proof may still come
        digest = outcome_digest(report.status, report.results)
        change(tx, row, settled_digest=digest, upstream_status=report.status)
        if not (completed and results):
            forget_downloads(tx, row.id)
            tell_late(tx, row)
            return None
    if completed and (late or awaited(tx, row.id)):
        images = expect(tx, row, results, item.result_ttl_ms)
        finish_if_done(tx, row, images)
    return _await_links(tx, row, item) if report.final else _unsettled(tx, row, item, "")


def _ended_empty(row: TaskRow) -> bool:
    """Whether the task failed because the upstream named no results, and has named none since."""
    code = (row.error or {}).get("code")
    return code == "no_results" and row.settled_digest == outcome_digest(Status.COMPLETED, ())


def _unknown_upstream(report: Report) -> bool:
    """Whether the upstream says that it keeps the task no more."""
    error = report.error or {}
    return report.status is Status.FAILED and error.get("code") == "resource_not_found"
