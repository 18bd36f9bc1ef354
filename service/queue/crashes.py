"""Rows that bring down what works on them, by exceptions that nobody foresaw or whole processes:
counted, tried again, parked in the end.

A process that is killed from outside takes many rows with it: a row that outlived two deaths is
worked on alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, select

from service.db.tables import QUEUES, ZERO, deliveries, images, replays
from service.db.transaction import Lease, Transaction
from service.events import outbox
from service.queue import leases
from service.tasks.results import finish_if_done
from service.tasks.state import State
from service.tasks.transitions import end, forget_downloads, lock

FAULT_LIMIT = 10
CRASH_LIMIT = 2 + 5  # among others, then alone


@dataclass(frozen=True, slots=True)
class Fault:
    """An exception while working under a lease; tried again after `wait_ms`."""

    lease: Lease
    wait_ms: int


def record_faults(tx: Transaction, items: Sequence[Fault]) -> list[int]:
    """Counts faults: how many the row has now. At `FAULT_LIMIT` it is parked. 0: nothing is
    counted, for the lease had ended, or nobody wants the work any more: others moved the task on
    meanwhile, and the lease ends as if it were done.
    """
    return [_record(tx, item) for item in items]


def _record(tx: Transaction, item: Fault) -> int:
    queue = QUEUES[item.lease.stage]
    columns = (queue.column("due_at"), queue.column("faults"))
    row = tx.connection.execute(
        select(*columns).where(queue.table.c.id == item.lease.key).with_for_update()
    ).first()
    if row is None or row[0] is None:
        leases.done(tx, [item.lease])
        return 0
    count: int = row[1] + 1
    dead_lettered = count >= FAULT_LIMIT
    values = {
        "lease_until": None,
        "lease_owner": None,
        "due_at": None if dead_lettered else tx.now + item.wait_ms,
        "faults": count,
    }
    if not leases.change(tx, item.lease, values):
        return 0
    if dead_lettered:
        _dead_letter(tx, item.lease, f"{count} faults")
    return count


@dataclass(frozen=True, slots=True)
class PoisonCandidate:
    """A row leased to run alone, or `parked`: it brought its process down too often."""

    lease: Lease
    crashes: int
    dead_lettered: bool


def claim_candidates(tx: Transaction, stages: Sequence[str]) -> list[PoisonCandidate | None]:
    """Leases a row of each stage that is to run alone, if there is one."""
    return [_candidate(tx, leases.claim_candidate(tx, stage)) for stage in stages]


def _candidate(tx: Transaction, found: tuple[Lease, int] | None) -> PoisonCandidate | None:
    if found is None:
        return None
    lease, crashes = found
    dead_lettered = crashes >= CRASH_LIMIT
    if dead_lettered:
        leases.done(tx, [lease])
        _dead_letter(tx, lease, f"{crashes} deaths")
    return PoisonCandidate(lease, crashes, dead_lettered)


def _dead_letter(tx: Transaction, lease: Lease, cause: str) -> None:
    """Takes a row out of its queue for good: its task fails, its image is lost or its delivery is
    dead; operators are told.

    A task that is storing is settled, and goes on with its pictures: what they wait for is in a
    queue of their own.
    """
    task_id: str | None = lease.key
    if lease.stage in ("deliver", "redeliver"):
        task_id = tx.connection.execute(
            select(deliveries.c.task_id).where(deliveries.c.id == lease.key)
        ).scalar()
        tx.change(deliveries, lease.key, {"state": "dead", "finished_at": tx.now})
    elif lease.stage == "replay":
        task_id = None
        tx.change(replays, lease.key, {"state": "cancelled", "finished_at": tx.now})
    elif lease.stage == "download":
        task_id = tx.connection.execute(
            select(images.c.task_id).where(images.c.id == lease.key)
        ).scalar_one()
        task = lock(tx, [task_id])[task_id]
        tx.change(images, lease.key, {"state": "lost", "error": "internal_error"})
        finish_if_done(tx, task)
    else:
        task = lock(tx, [lease.key])[lease.key]
        if task.state in (State.QUEUED, State.SUBMITTING, State.UNCERTAIN, State.SUBMITTED):
            forget_downloads(tx, lease.key)
            error = {
                "code": "internal_error",
                "message": f"parked after {cause}",
                "type": "server_error",
            }
            end(tx, task, State.FAILED, error)
    outbox.emit_operators(
        tx,
        "task.parked",
        {"task_id": task_id, "stage": lease.stage, "key": lease.key, "cause": cause},
        task_id=task_id,
    )


def any_candidate(connection: Connection) -> bool:
    """Whether a row outlived a death of its process and waits to be worked on."""
    for queue in QUEUES.values():
        statement = (
            select(queue.table.c.id)
            .where(queue.column("deaths") > ZERO, queue.column("due_at").is_not(None))
            .limit(1)
        )
        if connection.execute(statement).first() is not None:
            return True
    return False
