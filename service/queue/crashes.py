"""Rows that cause unforeseen exceptions, or crash their process: counted, tried again, and
dead-lettered in the end.

A process that is killed from outside crashes with many rows in work. A row that was in two
crashes is a poison candidate: it runs alone, so that the next crash has one cause.
"""

from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import select

from service.db.queues import QUEUES
from service.db.transaction import Lease, Transaction, one_by_one
from service.queue import leases

FAULT_LIMIT = 10
CRASH_LIMIT = 2 + 5  # among other rows, then alone

# Takes a row out of its queue for good and tells operators the cause, as the last event of the
# transaction so far: `(tx, lease, cause)`. Each stage brings its own.
DeadLetter = Callable[[Transaction, Lease, str], None]


@dataclass(frozen=True, slots=True)
class Fault:
    """An unforeseen exception under a lease. The row is due again after `wait_ms`."""

    lease: Lease
    wait_ms: int
    dead_letter: DeadLetter


@one_by_one
def record_faults(tx: Transaction, item: Fault) -> int:
    """Counts a fault and returns the row's count. At `FAULT_LIMIT` the row is dead-lettered.

    The count is 0, and nothing is recorded, if the lease no longer holds. The same holds if the row
    is no longer due because another transaction moved the task on. The lease then ends as if its
    work were done.
    """
    queue = QUEUES[item.lease.stage]
    columns = (queue.column("due_at"), queue.column("faults"))
    row = tx.connection.execute(
        select(*columns).where(queue.table.c.id == item.lease.key).with_for_update()
    ).first()
    if row is None or row[0] is None:
        leases.done(tx, [item.lease])
        return 0
    count: int = row[1] + 1
    dead = count >= FAULT_LIMIT
    values = {
        "lease_until": None,
        "lease_owner": None,
        "due_at": None if dead else tx.now + item.wait_ms,
        "faults": count,
    }
    if not leases.change(tx, item.lease, values):
        return 0
    if dead:
        item.dead_letter(tx, item.lease, f"{count} faults")
    return count


@dataclass(frozen=True, slots=True)
class PoisonCandidate:
    """A row that runs alone, or that is `dead_lettered` because its process crashed too often."""

    lease: Lease
    crashes: int
    dead_lettered: bool
    tx: Transaction

    def task_ids(self) -> dict[str, str]:
        """The fields of a log line about the task of a dead-lettered row, after the commit."""
        event = self.tx.emitted[-1]  # a `DeadLetter` tells operators last
        origin = self.tx.origins.get(event.task_id or "")
        ids = origin.ids if origin else {}
        return ids | ({"task_id": event.task_id} if event.task_id else {})


@one_by_one
def claim_candidates(tx: Transaction, item: tuple[str, DeadLetter]) -> PoisonCandidate | None:
    stage, dead_letter = item
    claimed = leases.claim_candidate(tx, stage)
    if claimed is None:
        return None
    lease, crashes = claimed
    dead = crashes >= CRASH_LIMIT
    if dead:
        leases.change(tx, lease, {"faults": FAULT_LIMIT})  # marks the row as dead-lettered
        leases.done(tx, [lease])
        dead_letter(tx, lease, f"{crashes} deaths")
    return PoisonCandidate(lease, crashes, dead, tx)
