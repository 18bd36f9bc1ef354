"""A store put back from a backup: what happened after the backup is unknown here, and must not be
paid or numbered twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import select, update

from service.db.tables import counters, tasks
from service.db.transaction import Transaction
from service.queue import leases
from service.tasks.rows import TaskRow
from service.tasks.state import State
from service.tasks.transitions import change, lock, move

SEQUENCES = 10**9
PAGE = 500
UNPROVED = (State.QUEUED, State.SUBMITTING, State.UNCERTAIN)


@dataclass(frozen=True, slots=True)
class Restoration:
    """A backup of `made_at` is put back. What is in doubt is decided after `decide_ms`, but not
    while younger than `give_up_ms`.

    `moved`: nobody served the store after the backup, so nothing is in doubt.
    """

    made_at: int
    decide_ms: int
    give_up_ms: int
    moved: bool = False


@dataclass(frozen=True, slots=True)
class Restored:
    """How many tasks became `uncertain`, or stayed so, and after which sequence events go on."""

    uncertain: int
    sequence: int


def restore_stores(tx: Transaction, items: Sequence[Restoration]) -> list[Restored]:
    """Makes a restored store fit to be served."""
    return [
        Restored(0 if item.moved else _doubt(tx, item), _raise_sequence(tx, item)) for item in items
    ]


def _raise_sequence(tx: Transaction, item: Restoration) -> int:
    """Past whatever consumers saw after the backup: also under an earlier restoration of it, at up
    to 1000 events a second.
    """
    by = SEQUENCES + max(0, tx.now - item.made_at)
    statement = (
        update(counters).where(counters.c.name == "events").values(value=counters.c.value + by)
    )
    sequence: int = tx.connection.execute(statement.returning(counters.c.value)).scalar_one()
    return sequence


def _doubt(tx: Transaction, item: Restoration) -> int:
    """Whatever no answer proved may have been submitted after the backup: it waits for its proof,
    and is not sent again by itself.
    """
    states = [state.value for state in UNPROVED]
    ids = list(
        tx.connection.execute(
            select(tasks.c.id).where(tasks.c.state.in_(states)).order_by(tasks.c.id)
        ).scalars()
    )
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
    # Old enough by then, and with two outcomes: DARKROOM_UNCERTAIN=resubmit does not send it
    # either.
    doubt = {
        "doubted_at": row.doubted_at or tx.now,
        "resubmit": False,
        "submit_outcomes": max(2, row.submit_outcomes),
    }
    change(tx, row, **doubt, **leases.release("submit", due_at))
    tx.step(
        row.id,
        "task.submission_uncertain",
        reason="restored from a backup: it may have been submitted since",
    )
