"""Submitting: `submitting` is in the store before the request leaves, and an answer in hand is always recorded."""

from collections.abc import Sequence
from dataclasses import dataclass

from service import model
from service.model import Report, State
from service.store import Grant, Transaction
from service.store.operations import leases
from service.store.operations.tasks import Row, change, end, lock, move, submitted


@dataclass(frozen=True, slots=True)
class Start:
    """Asks for the right to send: the lease is made to outlast a call of `call_ms`."""

    grant: Grant
    call_ms: int
    resubmit: bool = False  # an uncertain task may be sent again


def start_submissions(tx: Transaction, items: Sequence[Start]) -> list[bytes | None]:
    """Moves tasks to `submitting`; the body to send, or None when this process must not send."""
    rows = lock(tx, (item.grant.key for item in items))
    results: list[bytes | None] = []
    for item in items:
        row = rows[item.grant.key]
        state = State(row["state"])
        if leases.holds(item.grant, row) and (state is State.QUEUED or (state is State.UNCERTAIN and item.resubmit)):
            move(tx, row, State.SUBMITTING, submit_lease_until=tx.now + item.call_ms)
        elif not leases.holds(item.grant, row) or state is not State.SUBMITTING:  # else: this very start, run again
            results.append(None)
            continue
        results.append(row["body"])
    return results


@dataclass(frozen=True, slots=True)
class Accepted:
    """The upstream has it: asked again after `first_query_ms` if nothing is heard."""

    report: Report
    first_query_ms: int


@dataclass(frozen=True, slots=True)
class Again:
    """Nothing was created: sent again after `wait_ms`, or failed `not_submitted` once older than `give_up_ms`."""

    reason: str
    wait_ms: int
    give_up_ms: int


@dataclass(frozen=True, slots=True)
class Refused:
    """The upstream will not do it: `status` is its HTTP status."""

    status: int
    error: model.JSON


@dataclass(frozen=True, slots=True)
class Uncertain:
    """It may have been created and charged; decided after `decide_ms` unless a callback proves it."""

    reason: str
    decide_ms: int


@dataclass(frozen=True, slots=True)
class Undecided:
    """The time is up and nothing was proved: failed `submission_uncertain`."""


@dataclass(frozen=True, slots=True)
class Submission:
    grant: Grant
    outcome: Accepted | Again | Refused | Uncertain | Undecided


def record_submissions(tx: Transaction, items: Sequence[Submission]) -> list[State]:
    """Records what came of submissions; the tasks' states after it.

    An answer counts whoever holds the lease by now: an accepted one always, a refusal while nothing else is known or on its way.
    """
    rows = lock(tx, (item.grant.key for item in items))
    results = []
    for item in items:
        row = rows[item.grant.key]
        held = leases.holds(item.grant, row)
        if isinstance(item.outcome, Accepted):
            _accepted(tx, row, item.outcome)
        elif row["state"] in ((State.SUBMITTING, State.UNCERTAIN) if held else (State.UNCERTAIN,)):
            _not_accepted(tx, row, item.outcome, held=held)
        done = leases.freed("submit", row["submit_due_at"]) if held else {}
        change(tx, row, submit_outcomes=row["submit_outcomes"] + 1, **done)
        results.append(State(row["state"]))
    return results


def _accepted(tx: Transaction, row: Row, outcome: Accepted) -> None:
    if outcome.report.upstream_id is None:
        raise AssertionError("an accepted submission has an id")
    submitted(tx, row, outcome.report.upstream_id, "answer", outcome.report, outcome.first_query_ms)
    if row["settle_requests"] and State(row["state"]) is State.SUBMITTED:  # somebody asked before there was an id to ask for
        change(tx, row, **leases.wanted(tx, "settle", row["id"], row))


def _not_accepted(tx: Transaction, row: Row, outcome: Again | Refused | Uncertain | Undecided, *, held: bool) -> None:
    state = State(row["state"])
    match outcome:
        case Again() if state is State.SUBMITTING:
            if tx.now - row["created_at"] >= outcome.give_up_ms:
                end(tx, row, State.FAILED, _error("not_submitted", f"the upstream took no submission: {outcome.reason}"))
            else:
                move(tx, row, State.QUEUED, submit_due_at=tx.now + outcome.wait_ms)
        case Refused():
            end(tx, row, State.FAILED, outcome.error, refusal_status=outcome.status)
        case Uncertain() if state is State.SUBMITTING:
            move(tx, row, State.UNCERTAIN, submit_due_at=tx.now + outcome.decide_ms)
            tx.step(row["id"], "task.submission_uncertain", reason=outcome.reason)
        case Undecided() if held and state is State.UNCERTAIN:
            message = "whether the upstream created and charged this task could not be proved"
            end(tx, row, State.FAILED, _error("submission_uncertain", message))
        case _:
            pass  # somebody else moved it on while the call ran


def _error(code: str, message: str) -> model.JSON:
    return {"code": code, "message": message, "type": "task_error"}
