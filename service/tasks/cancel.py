"""Cancels tasks."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import delete

from service.db.tables import images
from service.db.transaction import Transaction
from service.tasks.state import TERMINAL, State
from service.tasks.transitions import change, end, lock


@dataclass(frozen=True, slots=True)
class Cancellation:
    task_id: str
    owner: str | None  # None: whoever owns it (admin)


def cancel_tasks(tx: Transaction, items: Sequence[Cancellation]) -> list[str | None]:
    """Stops waiting for tasks, here alone: None, or why not: `missing`, or the terminal state that
    was there first.
    """
    rows = lock(tx, (item.task_id for item in items))
    results: list[str | None] = []
    for item in items:
        row = rows.get(item.task_id)
        if row is None or item.owner not in (None, row.owner):
            results.append("missing")
        elif row.state in TERMINAL:
            results.append(str(row.state))
        else:
            error = {
                "code": "request_cancelled",
                "message": "cancelled by its owner",
                "type": "task_error",
            }
            asked = row.settle_due_at if row.upstream_id is not None else None
            tx.connection.execute(delete(images).where(images.c.task_id == row.id))
            end(tx, row, State.CANCELLED, error)
            change(tx, row, settle_due_at=asked)  # what it cost is still recorded
            results.append(None)
    return results
