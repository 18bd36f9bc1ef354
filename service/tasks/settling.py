"""Settling: what the upstream said of a task is recorded once, by the only function that may do
it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from service.db.transaction import Lease, Transaction
from service.queue import leases
from service.strict_json import JSON
from service.tasks.results import awaited, expect, finish_if_done, tell_late
from service.tasks.rows import TaskRow
from service.tasks.state import TERMINAL, State
from service.tasks.transitions import change, end, fill, forget_downloads, lock, move, submitted
from service.upstreams.base import Report, Status, outcome_digest


@dataclass(frozen=True, slots=True)
class Settlement:
    """An answer about a task, or none.

    `report` None: nobody answered, or, with `expires_ms`, the upstream does not know the task: it
    is expired once it is older than that. `requests` is the task's `settle_requests` when the
    question was asked: a callback since asks again.
    """

    lease: Lease
    report: Report | None
    requests: int
    wait_ms: int
    result_ttl_ms: int
    expires_ms: int | None = None


def record_settlements(tx: Transaction, items: Sequence[Settlement]) -> list[State | None]:
    """Records answers; the states after it, or None where the lease had ended and nothing
    changed.
    """
    rows = lock(tx, (item.lease.key for item in items))
    results: list[State | None] = []
    for item in items:
        row = rows[item.lease.key]
        if not leases.holds(item.lease, row):
            results.append(None)
            continue
        due = _record(tx, row, item)
        settled = row.state in TERMINAL and row.settled_digest is not None
        asked_again = row.settle_requests != item.requests and not settled
        change(tx, row, **leases.release("settle", tx.now if asked_again else due))
        if asked_again:
            change(tx, row, **leases.requeue(tx, "settle", row.id, row))
        results.append(row.state)
    return results


def _record(tx: Transaction, row: TaskRow, item: Settlement) -> int | None:
    """When to ask again, if at all."""
    report, state = item.report, row.state
    if report is None:
        age = tx.now - (row.submitted_at or row.created_at)
        if item.expires_ms is not None and age >= item.expires_ms and state is State.SUBMITTED:
            end(tx, row, State.EXPIRED, _error("expired", "the upstream no longer knows the task"))
            return None
        given_up = state in TERMINAL and (
            row.settled_digest is not None
            or (item.expires_ms is not None and age >= item.expires_ms)
        )
        return None if given_up else tx.now + item.wait_ms
    told = fill(row, report)
    if (
        row.upstream_id_from == "hand"
    ):  # it was no slip of the pen: the upstream has something under it
        told["upstream_id_from"] = "query"
    if told:
        change(tx, row, **told)
    if state in TERMINAL:
        return _ended(tx, row, report, item)
    if state in (State.QUEUED, State.SUBMITTING, State.UNCERTAIN) and row.upstream_id is not None:
        submitted(tx, row, row.upstream_id, row.upstream_id_from or "", report)
    if not report.final:
        if report.status is not None and state is not State.STORING:
            change(tx, row, upstream_status=report.status.value)
        return tx.now + item.wait_ms
    return _final(tx, row, report, item)


def _ended(tx: Transaction, row: TaskRow, report: Report, item: Settlement) -> int | None:
    """What is settled stands. After an end of our own making the upstream is asked until it has
    ended the task too: then its pictures are saved, which a cancelled or erased task's are not, and
    operators are told (contract section 3).
    """
    late = row.settled_digest is None and row.state is not State.CANCELLED and row.erased_at is None
    if report.final and late:
        if (
            _gone(report) and row.state is State.EXPIRED
        ):  # which is what we said: proof may come yet
            return None
        change(
            tx,
            row,
            settled_digest=outcome_digest(report.status, report.results),
            upstream_status=report.status,
        )
        if not (report.status is Status.COMPLETED and report.results):
            forget_downloads(tx, row.id)
            tell_late(tx, row)
            return None
    if report.status is Status.COMPLETED and (late or awaited(tx, row.id)):
        expect(tx, row, report.results, item.result_ttl_ms)
        finish_if_done(tx, row)
    return None if report.final or row.settled_digest is not None else tx.now + item.wait_ms


def _gone(report: Report) -> bool:
    """Whether the upstream says that it keeps the task no more."""
    return (
        report.status is Status.FAILED
        and report.error is not None
        and report.error["code"] == "resource_not_found"
    )


def _final(tx: Transaction, row: TaskRow, report: Report, item: Settlement) -> int | None:
    settled = {
        "settled_digest": outcome_digest(report.status, report.results),
        "upstream_status": report.status,
    }
    if row.state == State.SUBMITTED:
        tx.step(row.id, "task.confirmed", status=report.status)
    if report.status is Status.COMPLETED and report.results:
        expect(tx, row, report.results, item.result_ttl_ms)
        if row.state is State.SUBMITTED:
            move(tx, row, State.STORING, **settled)
        finish_if_done(tx, row)
        return None
    if row.state is State.STORING:
        # what is settled stands: each picture is stored, or lost by the rules for the link it has
        return None
    forget_downloads(tx, row.id)
    if report.status is Status.COMPLETED:
        end(
            tx,
            row,
            State.FAILED,
            _error("no_results", "the upstream completed the task without any result"),
            **settled,
        )
    elif report.status is Status.CANCELLED:
        end(
            tx,
            row,
            State.CANCELLED,
            report.error or _error("request_cancelled", "cancelled by the upstream"),
            **settled,
        )
    elif report.error and _gone(report):  # not settled: proof may come yet
        end(
            tx,
            row,
            State.EXPIRED,
            {**report.error, "code": "expired"},
            upstream_status=report.status,
        )
    else:
        end(
            tx,
            row,
            State.FAILED,
            report.error or _error("unknown_error", "the upstream gave no reason"),
            **settled,
        )
    return None


def _error(code: str, message: str) -> JSON:
    return {"code": code, "message": message, "type": "task_error"}
