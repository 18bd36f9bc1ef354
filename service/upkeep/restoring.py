"""Makes a store that was restored from a backup fit to be served: nothing that happened after the
backup may be paid or numbered twice.
"""

from dataclasses import dataclass

from sqlalchemy import select, update

from service.db.tables import counters, tasks
from service.db.transaction import Transaction, one_by_one
from service.queue import leases
from service.tasks.rows import TaskRow
from service.tasks.state import UNPROVED, State
from service.tasks.transitions import change, lock, move

SEQUENCES = 10**9
PAGE = 500
REASON = "restored from a backup: it may have been submitted since"


@dataclass(frozen=True, slots=True)
class Restoration:
    """A backup of `made_at` is restored. An uncertain task is decided after `decide_ms`, but not
    before it is `give_up_ms` old.

    `moved`: no process served the store after the backup, so no task is uncertain.
    """

    made_at: int
    decide_ms: int
    give_up_ms: int
    moved: bool = False


@dataclass(frozen=True, slots=True)
class Restored:
    """How many tasks became or stayed `uncertain`, and the sequence after which events go on."""

    uncertain: int
    sequence: int


@one_by_one
def restore_stores(tx: Transaction, item: Restoration) -> Restored:
    return Restored(0 if item.moved else _doubt(tx, item), _raise_sequence(tx, item))


def _raise_sequence(tx: Transaction, item: Restoration) -> int:
    """Raises the sequence past any that consumers saw after the backup, at up to 1000 events per
    second. This holds for an earlier restoration of the same backup too.
    """
    value = counters.c.value + SEQUENCES + max(0, tx.now - item.made_at)
    statement = update(counters).where(counters.c.name == "events").values(value=value)
    sequence: int = tx.connection.execute(statement.returning(counters.c.value)).scalar_one()
    return sequence


def _doubt(tx: Transaction, item: Restoration) -> int:
    """Makes every task without a proved submission uncertain. It may have been submitted after
    the backup, so it waits for proof and is not submitted again by itself.
    """
    unproved = tasks.c.state.in_([state.value for state in UNPROVED])
    statement = select(tasks.c.id).where(unproved).order_by(tasks.c.id)
    ids = list(tx.connection.execute(statement).scalars())
    for start in range(0, len(ids), PAGE):
        for row in lock(tx, ids[start : start + PAGE]).values():
            _doubt_one(tx, row, item)
        tx.write()
    return len(ids)


def _doubt_one(tx: Transaction, row: TaskRow, item: Restoration) -> None:
    if row.state is State.QUEUED:
        move(tx, row, State.SUBMITTING)
    if row.state is State.SUBMITTING:
        move(tx, row, State.UNCERTAIN)
    due_at = max(tx.now + item.decide_ms, row.created_at + item.give_up_ms)
    # With this age and two outcomes, DARKROOM_UNCERTAIN=resubmit does not submit the task either.
    outcomes, doubted_at = max(2, row.submit_outcomes), row.doubted_at or tx.now
    change(tx, row, doubted_at=doubted_at, resubmit=False, submit_outcomes=outcomes)
    change(tx, row, **leases.release("submit", due_at))
    tx.step(row.id, "task.submission_uncertain", reason=REASON)
