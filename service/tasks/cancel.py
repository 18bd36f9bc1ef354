"""Cancels tasks."""

from collections.abc import Sequence

from sqlalchemy import delete

from service.db.paging import Owned
from service.db.tables import images
from service.db.transaction import Transaction
from service.tasks.state import State
from service.tasks.transitions import change, end, lock, task_error


def cancel_tasks(tx: Transaction, items: Sequence[Owned]) -> list[str | None]:
    """Cancels tasks here, not at the upstream. Returns None, or the reason against it: `missing`,
    or the terminal state of the task.
    """
    rows = lock(tx, (item.id for item in items))
    results: list[str | None] = []
    for item in items:
        row = rows.get(item.id)
        if row is None or item.owner not in (None, row.owner):
            results.append("missing")
        elif row.terminal:
            results.append(row.state.value)
        else:
            query_at = row.settle_due_at if row.upstream_id is not None else None
            tx.connection.execute(delete(images).where(images.c.task_id == row.id))
            end(tx, row, State.CANCELLED, task_error("request_cancelled", "cancelled by its owner"))
            change(tx, row, settle_due_at=query_at)  # its cost is still recorded
            results.append(None)
    return results
