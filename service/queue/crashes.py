"""Rows that bring down what works on them, by exceptions that nobody foresaw or whole processes:
counted, tried again, parked in the end.

A process that is killed from outside takes many rows with it: a row that outlived two deaths is
worked on alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, select

from service.db.tables import QUEUES, ZERO, deliveries, images, replays
from service.db.transaction import Grant, Transaction
from service.events import outbox
from service.queue import leases
from service.tasks.results import finish_if_done
from service.tasks.state import State
from service.tasks.transitions import end, forget_downloads, lock

FAULT_LIMIT = 10
DEATH_LIMIT = 2 + 5  # among others, then alone


@dataclass(frozen=True, slots=True)
class Fault:
    """An exception while working under a grant; tried again after `wait_ms`."""

    grant: Grant
    wait_ms: int


def record_faults(tx: Transaction, items: Sequence[Fault]) -> list[int]:
    """Counts faults: how many the row has now. At `FAULT_LIMIT` it is parked. 0: nothing is
    counted, for the lease had ended, or nobody wants the work any more: others moved the task on
    meanwhile, and the lease ends as if it were done.
    """
    return [_record(tx, item) for item in items]


def _record(tx: Transaction, item: Fault) -> int:
    queue = QUEUES[item.grant.stage]
    columns = (queue.column("due_at"), queue.column("faults"))
    row = tx.connection.execute(
        select(*columns).where(queue.table.c.id == item.grant.key).with_for_update()
    ).first()
    if row is None or row[0] is None:
        leases.done(tx, [item.grant])
        return 0
    count: int = row[1] + 1
    parked = count >= FAULT_LIMIT
    values = {
        "lease_until": None,
        "lease_owner": None,
        "due_at": None if parked else tx.now + item.wait_ms,
        "faults": count,
    }
    if not leases.change(tx, item.grant, values):
        return 0
    if parked:
        _park(tx, item.grant, f"{count} faults")
    return count


@dataclass(frozen=True, slots=True)
class Suspect:
    """A row leased to run alone, or `parked`: it brought its process down too often."""

    grant: Grant
    deaths: int
    parked: bool


def claim_suspects(tx: Transaction, stages: Sequence[str]) -> list[Suspect | None]:
    """Leases a row of each stage that is to run alone, if there is one."""
    return [_suspect(tx, leases.claim_suspect(tx, stage)) for stage in stages]


def _suspect(tx: Transaction, found: tuple[Grant, int] | None) -> Suspect | None:
    if found is None:
        return None
    grant, deaths = found
    parked = deaths >= DEATH_LIMIT
    if parked:
        leases.done(tx, [grant])
        _park(tx, grant, f"{deaths} deaths")
    return Suspect(grant, deaths, parked)


def _park(tx: Transaction, grant: Grant, cause: str) -> None:
    """Takes a row out of its queue for good: its task fails, its image is lost or its delivery is
    dead; operators are told.

    A task that is storing is settled, and goes on with its pictures: what they wait for is in a
    queue of their own.
    """
    task_id: str | None = grant.key
    if grant.stage in ("deliver", "redeliver"):
        task_id = tx.connection.execute(
            select(deliveries.c.task_id).where(deliveries.c.id == grant.key)
        ).scalar()
        tx.change(deliveries, grant.key, {"state": "dead", "finished_at": tx.now})
    elif grant.stage == "replay":
        task_id = None
        tx.change(replays, grant.key, {"state": "cancelled", "finished_at": tx.now})
    elif grant.stage == "download":
        task_id = tx.connection.execute(
            select(images.c.task_id).where(images.c.id == grant.key)
        ).scalar_one()
        task = lock(tx, [task_id])[task_id]
        tx.change(images, grant.key, {"state": "lost", "error": "internal_error"})
        finish_if_done(tx, task)
    else:
        task = lock(tx, [grant.key])[grant.key]
        if State(task["state"]) in (
            State.QUEUED,
            State.SUBMITTING,
            State.UNCERTAIN,
            State.SUBMITTED,
        ):
            forget_downloads(tx, grant.key)
            error = {
                "code": "internal_error",
                "message": f"parked after {cause}",
                "type": "server_error",
            }
            end(tx, task, State.FAILED, error)
    outbox.emit_operators(
        tx,
        "task.parked",
        {"task_id": task_id, "stage": grant.stage, "key": grant.key, "cause": cause},
        task_id=task_id,
    )


def suspects(connection: Connection) -> bool:
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
