"""Exceptions that nobody foresaw: counted on the row, tried again, and parked when they don't stop."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import select

from service.model import State
from service.store import Grant, Transaction
from service.store.operations import leases, outbox
from service.store.operations.images import finish_if_done
from service.store.operations.tasks import end, forget_downloads, lock
from service.store.tables import QUEUES, deliveries, images

FAULT_LIMIT = 10


@dataclass(frozen=True, slots=True)
class Fault:
    """An exception while working under a grant; tried again after `wait_ms`."""

    grant: Grant
    wait_ms: int


def record_faults(tx: Transaction, items: Sequence[Fault]) -> list[int]:
    """Counts faults: how many the row has now; 0 where the lease had ended. At `FAULT_LIMIT` the row is parked."""
    return [_record(tx, item) for item in items]


def _record(tx: Transaction, item: Fault) -> int:
    queue = QUEUES[item.grant.stage]
    count: int = tx.connection.execute(select(queue.column("faults")).where(queue.table.c.id == item.grant.key)).scalar() or 0
    parked = count + 1 >= FAULT_LIMIT
    values = {"lease_until": None, "lease_owner": None, "due_at": None if parked else tx.now + item.wait_ms, "faults": count + 1}
    if not leases.change(tx, item.grant, values):
        return 0
    if parked:
        _park(tx, item.grant, count + 1)
    return count + 1


def _park(tx: Transaction, grant: Grant, faults: int) -> None:
    """Takes a row out of its queue for good: its task fails, its image is lost or its delivery is dead; operators are told."""
    task_id: str | None = grant.key
    if grant.stage in ("deliver", "redeliver"):
        task_id = tx.connection.execute(select(deliveries.c.task_id).where(deliveries.c.id == grant.key)).scalar()
        tx.change(deliveries, grant.key, {"state": "dead", "finished_at": tx.now})
    elif grant.stage == "download":
        task_id = tx.connection.execute(select(images.c.task_id).where(images.c.id == grant.key)).scalar_one()
        task = lock(tx, [task_id])[task_id]
        tx.change(images, grant.key, {"state": "lost", "error": "internal_error"})
        finish_if_done(tx, task)
    else:
        task = lock(tx, [grant.key])[grant.key]
        if State(task["state"]) in (State.QUEUED, State.SUBMITTING, State.UNCERTAIN, State.SUBMITTED, State.STORING):
            forget_downloads(tx, grant.key)
            error = {"code": "internal_error", "message": f"parked after {faults} faults", "type": "server_error"}
            end(tx, task, State.FAILED, error)
    outbox.emit_operators(
        tx, "task.parked", {"task_id": task_id, "stage": grant.stage, "key": grant.key, "faults": faults}, task_id=task_id
    )
