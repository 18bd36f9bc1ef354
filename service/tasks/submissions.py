"""Submissions in the store: a task is `submitting` before its request leaves, and a response in
hand is always recorded.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from sqlalchemy import bindparam, select

from service.db.prepared import run
from service.db.tables import tasks
from service.db.transaction import Lease, Transaction
from service.events import outbox
from service.queue import leases
from service.tasks.fair_queue import FairQueue
from service.tasks.ledger import entered
from service.tasks.pause import Pause, held_back, with_pause
from service.tasks.rows import TaskRow, task_rows
from service.tasks.settlements import finish_at_once
from service.tasks.state import State
from service.tasks.transitions import (
    HELD,
    VERDICT_MS,
    callback_waits,
    change,
    end,
    keep_raw,
    lock,
    locking,
    move,
    note_once,
    submitted,
    task_error,
)
from service.upstreams.base import (
    Accepted,
    Finished,
    NotCreated,
    Refused,
    Report,
    SubmitOutcome,
    Uncertain,
)


@dataclass(frozen=True, slots=True)
class SubmissionStart:
    """Asks for the right to send. The lease is extended to outlast a call of `call_ms`."""

    lease: Lease
    call_ms: int
    resubmit: bool = False  # an uncertain task may be sent again


_STARTING = with_pause(
    locking(bindparam("ids", expanding=True)).add_columns(tasks.c.body, callback_waits(tasks.c.id))
)


def start_submissions(tx: Transaction, items: Sequence[SubmissionStart]) -> list[bytes | None]:
    """Moves tasks to `submitting`. Returns the body to send, or None if this process must not, as
    while submission is paused.
    """
    rows = run(tx.connection, _STARTING, {"ids": list({item.lease.key for item in items})})
    by_id = {row[0]: (TaskRow(*row[:-5]), *row[-5:]) for row in rows}
    started: list[bytes | None] = []
    for item in items:
        row, body, called, *pause = by_id.get(item.lease.key, (None, None, False))
        leased = row is not None and leases.holds(item.lease, row)
        ready = leased and _start(tx, row, item, Pause(*pause), called=called)
        started.append(body if ready else None)
    return started


def _start(
    tx: Transaction, row: TaskRow, item: SubmissionStart, pause: Pause, *, called: bool
) -> bool:
    """`called`: a callback waits for its verdict. It may prove that an earlier call created the
    task, so no second call may create another one.
    """
    if row.state is State.QUEUED or (row.state is State.UNCERTAIN and item.resubmit):
        if held_back(tx, row, pause):
            return False
        if called:
            uncounted = {"attempts": row.submit_attempts - 1}
            change(tx, row, **leases.release("submit", tx.now + VERDICT_MS, **uncounted))
            return False
        awaited = row.id in tx.touched
        move(tx, row, State.SUBMITTING)
        if not awaited:
            del tx.touched[row.id]  # no request waits for this
    elif row.state is not State.SUBMITTING:
        return False
    # Otherwise this start runs a second time, because its commit got no answer.
    tx.change(tasks, row.id, {"submit_lease_until": tx.now + item.call_ms})
    return True


@dataclass(frozen=True, slots=True)
class SubmissionResult:
    """The outcome of one call and the times that follow from it. `outcome` None: the time for a
    proof is up.

    `wait_ms` is the time to the next call after NotCreated, to the first query after Accepted.
    After `decide_ms` an uncertain task is decided: sent again if `resend`, once, else failed. A
    task older than `give_up_ms` is not sent again. Links of results live `result_ttl_ms`.
    """

    lease: Lease
    outcome: SubmitOutcome | None
    wait_ms: int = 0
    decide_ms: int = 0
    give_up_ms: int = 0
    resend: bool = False
    result_ttl_ms: int = 0


def record_submissions(tx: Transaction, items: Sequence[SubmissionResult]) -> list[State]:
    """Records the outcomes of calls. Returns the states after it.

    An acceptance counts even if the lease has ended since, and so do results. Any other outcome
    counts under the lease, or while the task is uncertain.
    """
    rows = _lock_concerned(tx, items)
    queue = cache(lambda: FairQueue(tx, (row.owner for row in rows.values())))
    states = []
    for item in items:
        row = rows[item.lease.key]
        leased = leases.holds(item.lease, row)
        submitting = leased and row.state is State.SUBMITTING
        match item.outcome:
            case Accepted(report):
                _accept(tx, row, item, report, rows.values())
            case Finished(report):
                finish_at_once(tx, row, report, item.lease, item.result_ttl_ms)
            case Refused(status, error) if submitting or row.state is State.UNCERTAIN:
                end(tx, row, State.FAILED, error, refusal_status=status)
            case NotCreated(reason, account=account) if submitting:
                _retry(tx, row, item, reason, queue)
                if account and not row.terminal:
                    note_once(tx, row, "task.held", message=HELD)
                elif not row.terminal:
                    note_once(tx, row, "task.submission_retried", reason=reason)
            case Uncertain(reason, raw) if submitting:
                _doubt(tx, row, item, reason, resend=item.resend)
                if raw:
                    keep_raw(tx, row.id, "submission", raw)
            case None if leased and row.state is State.UNCERTAIN and not row.resubmit:
                _decide(tx, row)
        if row.terminal:
            entered(tx, row, "submit")
        released = leases.release("submit", row.submit_due_at) if leased else {}
        change(tx, row, submit_outcomes=row.submit_outcomes + 1, **released)
        states.append(row.state)
    return states


_MINE = tasks.c.id.in_(bindparam("keys", expanding=True))
_HOLDERS = select(tasks.c.id).where(
    tasks.c.upstream.in_(select(tasks.c.upstream).where(_MINE)),
    tasks.c.upstream_id.in_(bindparam("upstream_ids", expanding=True)),
)
_LOCKING = locking(select(tasks.c.id).where(_MINE).union(_HOLDERS))


def _lock_concerned(tx: Transaction, items: Sequence[SubmissionResult]) -> dict[str, TaskRow]:
    """The tasks of these calls, and other tasks that already have an id given to one of these."""
    keys = {item.lease.key for item in items}
    ids = {item.outcome.report.upstream_id for item in items if isinstance(item.outcome, Accepted)}
    if not ids:
        return lock(tx, keys)
    given = {"keys": list(keys), "upstream_ids": list(ids)}
    return {row.id: row for row in task_rows(tx.connection, _LOCKING, given)}


def _accept(
    tx: Transaction, row: TaskRow, item: SubmissionResult, report: Report, rows: Iterable[TaskRow]
) -> None:
    """Binds the upstream's id. If two tasks got the same id, a submit response wins over a
    callback, and the first response over the second.
    """
    if report.upstream_id is None:
        raise AssertionError("an accepted submission has an id")
    named = (row.upstream, report.upstream_id)
    others = (other for other in rows if (other.upstream, other.upstream_id) == named)
    holder = next((other for other in others if other is not row), None)
    if holder is not None:
        data = {
            "task_id": row.id,
            "upstream_id": report.upstream_id,
            "callback_id": None,
            "reason": f"{holder.id} has the same upstream id",
        }
        outbox.emit_operators(tx, "callback.conflict", data, task_id=row.id)
        if holder.upstream_id_from == "answer":
            if row.state is State.SUBMITTING:
                _doubt(tx, row, item, "the id in the answer is another task's", resend=False)
            return
        # A worker that queries the id for the holder loses its lease: the answer is about `row`.
        due = leases.release("settle", tx.now + item.wait_ms)
        change(tx, holder, upstream_id=None, upstream_id_from=None, **due)
        tx.write()  # the id is unique: it is released before it is bound again
    submitted(tx, row, report.upstream_id, "answer", report, item.wait_ms)
    if row.settle_requests and row.state is State.SUBMITTED:  # requested before the id was known
        change(tx, row, **leases.requeue(tx, "settle", row.id, row))


def _retry(
    tx: Transaction,
    row: TaskRow,
    item: SubmissionResult,
    reason: str,
    queue: Callable[[], FairQueue],
) -> None:
    """Sends a task again after the wait, behind its owner's other tasks: a hundred refused tasks
    must not be served first.
    """
    due_at, young = tx.now + item.wait_ms, tx.now - row.created_at < item.give_up_ms
    if row.doubted_at is not None:  # this call created nothing, but an earlier one may have
        again = row.resubmit and young
        move(tx, row, State.UNCERTAIN, submit_due_at=due_at, resubmit=again)
    elif young:
        turn = queue().next_turn(row.owner)
        move(tx, row, State.QUEUED, submit_due_at=due_at, submit_turn=turn)
    else:
        message = f"the upstream took no submission: {reason}"
        end(tx, row, State.FAILED, task_error("not_submitted", message))


def _doubt(
    tx: Transaction, row: TaskRow, item: SubmissionResult, reason: str, *, resend: bool
) -> None:
    """Makes a task uncertain. Only the first doubt may lead to a second call."""
    values = {"doubted_at": tx.now, "resubmit": resend}
    if row.doubted_at is not None:
        values = {"resubmit": False}
    move(tx, row, State.UNCERTAIN, submit_due_at=tx.now + item.decide_ms, **values)
    tx.step(row.id, "task.submission_uncertain", reason=reason)


def _decide(tx: Transaction, row: TaskRow) -> None:
    """Fails an uncertain task whose time is up, unless a callback may prove what became of it."""
    if tx.connection.scalar(select(callback_waits(row.id))):
        row.submit_due_at = tx.now + VERDICT_MS
    else:
        end_uncertain(tx, row)


def end_uncertain(tx: Transaction, row: TaskRow) -> None:
    message = "whether the upstream created and charged this task could not be proved"
    end(tx, row, State.FAILED, task_error("submission_uncertain", message))
