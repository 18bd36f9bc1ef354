"""The effects of one write on leases, and the check for each operation."""

from collections.abc import Callable
from typing import Any

from service.db.queues import QUEUES
from service.db.transaction import Lease
from service.events.deliveries import record_attempts
from service.images.downloads import record_downloads
from service.queue import crashes, leases
from service.queue.crashes import DeadLetter, Fault, claim_candidates, record_faults
from service.queue.leases import LEASE_MS
from service.tasks.account_breaker import hold_submissions, resume_submissions
from service.tasks.admin import cancel_tasks, reconcile_tasks, resolve_tasks
from service.tasks.settlements import record_settlements
from service.tasks.submissions import record_submissions, start_submissions
from service.upkeep.retention_sql import erase_tasks, strip_tasks
from tests.contract.subject import accept_callbacks
from tests.property.life_checks import Snapshot
from tests.property.life_content import (
    check_download,
    check_erased,
    check_reconciled,
    check_resolution,
    check_stripped,
)
from tests.property.life_inbox import ENDED
from tests.property.life_step import Step, check_late
from tests.property.life_writes import (
    check_accept,
    check_cancellation,
    check_hold,
    check_settlement,
    check_start,
    check_submission,
)

ALONE = 2  # crashes after which a row runs alone
FINISHING = (
    record_submissions,
    record_settlements,
    record_downloads,
    record_attempts,
    hold_submissions,
    leases.done,
)


def lease_of(snapshot: Snapshot, lease: Lease) -> dict[str, Any]:
    """The row's lease columns, without their prefix."""
    prefix, row = QUEUES[lease.stage].prefix, snapshot.row(lease)
    names = ("due_at", "lease_until", "lease_owner", "fence", "attempts", "deaths", "faults")
    return {name: row[prefix + name] for name in names} if row else {}


def check_write(step: Step) -> None:
    operation, lease = step.write.operation, step.write.lease
    if lease is not None and not step.held:
        check_late(step)
    if lease is not None and step.held and operation in FINISHING:
        now = lease_of(step.now, lease)
        assert not step.now.holds(lease), "a finished row still has its lease"
        assert not now or not now["deaths"], "a finished row still counts its crashes"
    if operation in CHECKS:
        CHECKS[operation](step, step.write.item)


# --- leases ---


def check_claim(step: Step, stage: str) -> None:
    """A claim takes due rows up to the free places, and no row that must run alone."""
    assert len(step.leased) <= step.places, "more leases than free places"
    for lease in step.leased:
        was, now = lease_of(step.before, lease), lease_of(step.now, lease)
        assert lease.stage == stage
        assert was["due_at"] is not None
        assert was["due_at"] <= step.time, "not due yet"
        died = was["lease_until"] is not None
        assert was["deaths"] + died < ALONE, "the row must run alone"
        assert (now["deaths"], now["attempts"], lease.attempts) == (
            was["deaths"] + died,
            was["attempts"] + 1,
            was["attempts"] + 1,
        )
        assert now["lease_until"] == step.time + LEASE_MS


def check_candidate(step: Step, item: tuple[str, DeadLetter]) -> None:
    stage, _ = item
    found = step.result
    emitted = [event for event in step.emitted("task.parked") if event["data"]["stage"] == stage]
    assert len(emitted) == (found is not None and found.dead_lettered), "parked without an event"
    if found is None:
        return
    was, now = lease_of(step.before, found.lease), lease_of(step.now, found.lease)
    assert found.lease.stage == stage
    assert found.crashes == was["deaths"] + (was["lease_until"] is not None) >= ALONE, (
        "a crash was not counted"
    )
    assert found.dead_lettered == (found.crashes >= crashes.CRASH_LIMIT), (
        "parked at the wrong count"
    )
    if found.dead_lettered:
        check_parked(step, found.lease)
    else:
        assert now["due_at"] == step.time + leases.CANDIDATE_WAITS_MS.get(
            found.crashes, leases.LONGEST_WAIT_MS
        ), "not snoozed"


def check_fault(step: Step, item: Fault) -> None:
    if not step.held:
        assert step.result == 0
        return
    was, now = lease_of(step.before, item.lease), lease_of(step.now, item.lease)
    emitted = step.emitted("task.parked")
    assert not step.now.holds(item.lease)
    if was["due_at"] is None:  # another transaction has ended the row's work
        assert (step.result, now["due_at"], now["faults"], emitted) == (0, None, was["faults"], [])
        return
    parked = was["faults"] + 1 >= crashes.FAULT_LIMIT
    assert (step.result, now["faults"], len(emitted)) == (
        was["faults"] + 1,
        was["faults"] + 1,
        parked,
    )
    if parked:
        check_parked(step, item.lease)
    else:
        assert now["due_at"] == step.time + item.wait_ms


def check_parked(step: Step, lease: Lease) -> None:
    """A parked row is not due, and its task goes on without it."""
    was, row = step.before.row(lease), step.now.row(lease)
    assert was
    assert row
    assert not step.now.holds(lease)
    assert row[QUEUES[lease.stage].prefix + "due_at"] is None, "a parked row is due"
    match QUEUES[lease.stage].table.name:
        case "tasks":
            stands = was["state"] == "storing" or was["state"] in ENDED
            assert row["state"] == (was["state"] if stands else "failed"), (
                "parking ended a task that goes on at another stage"
            )
            assert stands or row["error"]["code"] == "internal_error"
        case "images":
            assert (row["state"], row["error"]) == ("lost", "internal_error")
        case _:
            assert row["state"] in ("dead", "cancelled")


def check_renewal(step: Step, lease: Lease) -> None:
    assert step.result == step.held
    if step.held:
        was, now = lease_of(step.before, lease), lease_of(step.now, lease)
        assert now == was | {"lease_until": max(was["lease_until"], step.time + LEASE_MS)}, (
            "the renewal shortened the lease"
        )


def check_release(step: Step, lease: Lease) -> None:
    assert step.result == step.held
    if step.held:
        was = lease_of(step.before, lease)
        due = None if was["due_at"] is None else min(was["due_at"], step.time)
        freed = {
            "lease_until": None,
            "lease_owner": None,
            "attempts": was["attempts"] - 1,
            "due_at": due,
        }
        assert lease_of(step.now, lease) == was | freed, "the release changed the row"


def check_done(step: Step, lease: Lease) -> None:
    assert step.result == step.held
    assert not step.held or lease_of(step.now, lease).get("due_at") is None, (
        "a row without work is due"
    )


def check_freed(before: Snapshot, now: Snapshot) -> None:
    """The leases of due rows have ended with their process, and each counts as a crash."""
    for queue in QUEUES.values():
        until, deaths = queue.prefix + "lease_until", queue.prefix + "deaths"
        for key, row in now.table(queue.table).items():
            was = before.table(queue.table)[key]
            due = was[queue.prefix + "due_at"] is not None
            freed = (None, was[deaths] + (was[until] is not None))
            assert (row[until], row[deaths]) == (freed if due else (was[until], was[deaths])), (
                "a crash was not counted"
            )


def check_resumed(step: Step, most: int) -> None:
    process = step.process
    for key, row in step.now.tasks.items():
        was = step.before.tasks[key]
        held = (
            was["submit_lease_until"] is None
            and was["submit_lease_owner"] == process
            and (was["submit_due_at"] or 0) > step.time
        )
        assert row["submit_due_at"] == (step.time if held else was["submit_due_at"]), (
            "resumed another process's task, or not its own"
        )
    assert step.result <= most


CHECKS: dict[Callable[..., Any], Callable[[Step, Any], None]] = {
    start_submissions: check_start,
    record_submissions: check_submission,
    hold_submissions: check_hold,
    resume_submissions: check_resumed,
    record_settlements: check_settlement,
    record_downloads: check_download,
    accept_callbacks: check_accept,
    cancel_tasks: check_cancellation,
    leases.claim: check_claim,
    claim_candidates: check_candidate,
    record_faults: check_fault,
    leases.renew: check_renewal,
    leases.give_back: check_release,
    leases.done: check_done,
    resolve_tasks: check_resolution,
    reconcile_tasks: check_reconciled,
    erase_tasks: check_erased,
    strip_tasks: check_stripped,
}
