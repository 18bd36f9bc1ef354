"""What an operator decides by hand: what became of an uncertain submission, and that a task is
looked after now.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import select

from service.db.tables import images, tasks
from service.db.transaction import Transaction
from service.queue import leases
from service.tasks.rows import TaskRow, image_rows, select_images
from service.tasks.state import State
from service.tasks.submissions import end_uncertain
from service.tasks.transitions import ask, change, lock, submitted
from service.upstreams.base import Report


@dataclass(frozen=True, slots=True)
class Resolution:
    """`upstream_id`: the upstream has it under this id. Without one it failed or, with `resubmit`,
    is sent again.
    """

    task_id: str
    upstream_id: str | None = None
    resubmit: bool = False


def resolve_tasks(tx: Transaction, items: Sequence[Resolution]) -> list[str | None]:
    """Settles uncertain tasks; None, or why not: `missing`, `taken` (another task has the id), or
    the state the task is in.

    A task that ended without proof that nothing was created (`submission_uncertain`, parked) may be
    given its id still: its pictures are then saved as a late result. An id by hand may be given
    anew, whatever the state, until the upstream answers to it.
    """
    rows = lock(tx, (item.task_id for item in items))
    results: list[str | None] = []
    for item in items:
        row = rows.get(item.task_id)
        results.append(_resolve(tx, row, item) if row else "missing")
    return results


def _resolve(tx: Transaction, row: TaskRow, item: Resolution) -> str | None:
    state = row.state
    if state is not State.UNCERTAIN and not (item.upstream_id and _nameless(row)):
        return state.value
    if item.upstream_id is not None:
        taken = select(tasks.c.id).where(
            tasks.c.upstream == row.upstream, tasks.c.upstream_id == item.upstream_id
        )
        if tx.connection.scalar(taken.where(tasks.c.id != row.id)) is not None:
            return "taken"
        submitted(tx, row, item.upstream_id, "hand", Report(upstream_id=item.upstream_id), None)
        tx.write()  # the next item may name the same id
        ask(tx, row)
    elif item.resubmit:
        change(tx, row, resubmit=True, **leases.requeue(tx, "submit", row.id, row))
    else:
        end_uncertain(tx, row)
    return None


def _nameless(row: TaskRow) -> bool:
    """Whether a task that is not uncertain may be given an id: it may have been created before it
    was given up, or has one by hand.
    """
    parked = row.error is not None and row.error["code"] == "internal_error"
    given_up = (
        row.state == State.FAILED
        and row.upstream_id is None
        and (row.doubted_at is not None or parked)
    )
    return given_up or row.upstream_id_from == "hand"


def reconcile_tasks(tx: Transaction, items: Sequence[str]) -> list[str | None]:
    """The upstream is asked about tasks and their missing pictures are fetched, both now;
    `missing`, `unsubmitted`: without an id yet.
    """
    rows = lock(tx, items)
    results: list[str | None] = []
    for task_id in items:
        row = rows.get(task_id)
        if row is None or row.upstream_id is None:
            results.append("unsubmitted" if row else "missing")
            continue
        ask(tx, row)
        tx.write()  # what is granted here is granted once, though the same task be named twice
        pending = select_images(images.c.task_id == task_id, images.c.state == "pending")
        for image in image_rows(tx.connection, pending.order_by(images.c.id).with_for_update()):
            change(tx, image, **leases.requeue(tx, "download", image.id, image))
        results.append(None)
    return results
