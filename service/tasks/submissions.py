"""Submitting: `submitting` is in the store before the request leaves, and an answer in hand is
always recorded.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from sqlalchemy import select

from service.db.tables import tasks
from service.db.transaction import Lease, Transaction
from service.events import outbox
from service.queue import leases
from service.strict_json import JSON
from service.tasks.fair_queue import Turns
from service.tasks.rows import TaskRow
from service.tasks.state import State
from service.tasks.transitions import change, end, lock, move, submitted
from service.upstreams.base import Report


@dataclass(frozen=True, slots=True)
class Start:
    """Asks for the right to send: the lease is made to outlast a call of `call_ms`."""

    lease: Lease
    call_ms: int
    resubmit: bool = False  # an uncertain task may be sent again


def start_submissions(tx: Transaction, items: Sequence[Start]) -> list[bytes | None]:
    """Moves tasks to `submitting`; the body to send, or None when this process must not send."""
    rows = lock(tx, (item.lease.key for item in items))
    results: list[bytes | None] = []
    for item in items:
        row = rows[item.lease.key]
        state = row.state
        if leases.holds(item.lease, row) and (
            state is State.QUEUED or (state is State.UNCERTAIN and item.resubmit)
        ):
            move(tx, row, State.SUBMITTING)
        elif (
            not leases.holds(item.lease, row) or state is not State.SUBMITTING
        ):  # else: this very start, run again
            results.append(None)
            continue
        change(
            tx, row, submit_lease_until=tx.now + item.call_ms
        )  # also then: the call has not begun yet
        results.append(row.body)
    return results


@dataclass(frozen=True, slots=True)
class Accepted:
    """The upstream has it: asked again after `first_query_ms` if nothing is heard. `decide_ms` as
    in `Uncertain`, which it is when its id is another task's.
    """

    report: Report
    first_query_ms: int
    decide_ms: int = 0


@dataclass(frozen=True, slots=True)
class Again:
    """Nothing was created: sent again after `wait_ms`, or failed `not_submitted` once older than
    `give_up_ms`.
    """

    reason: str
    wait_ms: int
    give_up_ms: int


@dataclass(frozen=True, slots=True)
class Refused:
    """The upstream will not do it: `status` is its HTTP status."""

    status: int
    error: JSON


@dataclass(frozen=True, slots=True)
class Uncertain:
    """It may have been created and charged; decided after `decide_ms` unless a callback proves it;
    `resend`: by sending again, once.
    """

    reason: str
    decide_ms: int
    resend: bool = False


@dataclass(frozen=True, slots=True)
class Undecided:
    """The time is up and nothing was proved: failed `submission_uncertain`."""


@dataclass(frozen=True, slots=True)
class Submission:
    lease: Lease
    outcome: Accepted | Again | Refused | Uncertain | Undecided


def record_submissions(tx: Transaction, items: Sequence[Submission]) -> list[State]:
    """Records what came of submissions; the tasks' states after it.

    An answer counts whoever holds the lease by now: an accepted one always, a refusal while nothing
    else is known or on its way.
    """
    rows, turns = lock(tx, _concerned(tx, items)), cache(lambda: Turns(tx))
    results = []
    for item in items:
        row = rows[item.lease.key]
        held = leases.holds(item.lease, row)
        if isinstance(item.outcome, Accepted):
            _accepted(tx, row, item.outcome, rows.values(), turns)
        elif row.state in ((State.SUBMITTING, State.UNCERTAIN) if held else (State.UNCERTAIN,)):
            _not_accepted(tx, row, item.outcome, turns, held=held)
        done = leases.release("submit", row.submit_due_at) if held else {}
        change(tx, row, submit_outcomes=row.submit_outcomes + 1, **done)
        results.append(row.state)
    return results


def _concerned(tx: Transaction, items: Sequence[Submission]) -> set[str]:
    """The tasks of submissions, and those that have the id which one of these was given."""
    keys = {item.lease.key for item in items}
    names = {
        item.outcome.report.upstream_id for item in items if isinstance(item.outcome, Accepted)
    }
    upstreams = select(tasks.c.upstream).where(tasks.c.id.in_(keys))
    holders = select(tasks.c.id).where(
        tasks.c.upstream.in_(upstreams), tasks.c.upstream_id.in_(names)
    )
    return keys | set(tx.connection.execute(holders).scalars()) if names else keys


def _accepted(
    tx: Transaction,
    row: TaskRow,
    outcome: Accepted,
    rows: Iterable[TaskRow],
    turns: Callable[[], Turns],
) -> None:
    """Binds the task to its id. Two may be told the same one: an answer wins over a callback, and
    the first answer over the second.
    """
    if outcome.report.upstream_id is None:
        raise AssertionError("an accepted submission has an id")
    name = (row.upstream, outcome.report.upstream_id)
    holder = next(
        (
            other
            for other in rows
            if other is not row and (other.upstream, other.upstream_id) == name
        ),
        None,
    )
    if holder is not None:
        data = {
            "task_id": row.id,
            "upstream_id": name[1],
            "callback_id": None,
            "reason": f"{holder.id} has the same upstream id",
        }
        outbox.emit_operators(tx, "callback.conflict", data, task_id=row.id)
        if holder.upstream_id_from == "answer":
            _not_accepted(
                tx,
                row,
                Uncertain("the id in the answer is another task's", outcome.decide_ms),
                turns,
                held=True,
            )
            return
        # Whoever asks about it meanwhile loses the lease: the answer is the other task's.
        change(
            tx,
            holder,
            upstream_id=None,
            upstream_id_from=None,
            **leases.release("settle", tx.now + outcome.first_query_ms),
        )
        tx.write()  # it is free before it is given again
    submitted(tx, row, outcome.report.upstream_id, "answer", outcome.report, outcome.first_query_ms)
    if (
        row.settle_requests and row.state is State.SUBMITTED
    ):  # somebody asked before there was an id to ask for
        change(tx, row, **leases.requeue(tx, "settle", row.id, row))


def _not_accepted(
    tx: Transaction,
    row: TaskRow,
    outcome: Again | Refused | Uncertain | Undecided,
    turns: Callable[[], Turns],
    *,
    held: bool,
) -> None:
    state = row.state
    match outcome:
        case Again() if (
            state is State.SUBMITTING and row.doubted_at is not None
        ):  # of this call nothing came; of an earlier one?
            young = tx.now - row.created_at < outcome.give_up_ms
            move(
                tx,
                row,
                State.UNCERTAIN,
                submit_due_at=tx.now + outcome.wait_ms,
                resubmit=row.resubmit and young,
            )
        case Again() if (
            state is State.SUBMITTING
        ):  # behind its owner's others: what was refused by the hundred is not served first
            if tx.now - row.created_at >= outcome.give_up_ms:
                end(
                    tx,
                    row,
                    State.FAILED,
                    _error("not_submitted", f"the upstream took no submission: {outcome.reason}"),
                )
            else:
                move(
                    tx,
                    row,
                    State.QUEUED,
                    submit_due_at=tx.now + outcome.wait_ms,
                    submit_turn=turns().next(row.owner),
                )
        case Refused():
            end(tx, row, State.FAILED, outcome.error, refusal_status=outcome.status)
        case Uncertain() if state is State.SUBMITTING:
            resend, doubted_at = (
                (outcome.resend, tx.now) if row.doubted_at is None else (False, row.doubted_at)
            )
            move(
                tx,
                row,
                State.UNCERTAIN,
                submit_due_at=tx.now + outcome.decide_ms,
                doubted_at=doubted_at,
                resubmit=resend,
            )
            tx.step(row.id, "task.submission_uncertain", reason=outcome.reason)
        case Undecided() if held and state is State.UNCERTAIN and not row.resubmit:
            end_uncertain(tx, row)
        case _:
            pass  # somebody else moved it on while the call ran


def end_uncertain(tx: Transaction, row: TaskRow) -> None:
    end(
        tx,
        row,
        State.FAILED,
        _error(
            "submission_uncertain",
            "whether the upstream created and charged this task could not be proved",
        ),
    )


def _error(code: str, message: str) -> JSON:
    return {"code": code, "message": message, "type": "task_error"}
