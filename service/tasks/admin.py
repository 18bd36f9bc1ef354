"""Decisions about a task: its owner cancels it. An operator resolves an uncertain submission, or
has the upstream queried now.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import and_, delete

from service.db.paging import Owned
from service.db.tables import images
from service.db.transaction import Transaction
from service.queue import leases
from service.tasks.results import awaits_link, forget_failures
from service.tasks.rows import TaskRow, image_rows, select_images
from service.tasks.state import State
from service.tasks.submissions import end_uncertain
from service.tasks.transitions import ask, change, end, is_taken, lock, submitted, task_error
from service.upstreams.base import Report

# A lost image waits so long for a query that is answered, then its old link is tried.
REVIVED_MS = 30 * 60 * 1000


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


@dataclass(frozen=True, slots=True)
class TaskResolution:
    """With `upstream_id`, the upstream has the task under that id. Without one the task failed or,
    with `resubmit`, is sent again.
    """

    task_id: str
    upstream_id: str | None = None
    resubmit: bool = False


def resolve_tasks(tx: Transaction, items: Sequence[TaskResolution]) -> list[str | None]:
    """Settles uncertain tasks. Returns None, or the reason against it: `missing`, `taken` (another
    task has the id), or the state of the task.

    A task that failed without proof that nothing was created may still get its id. Its images are
    then saved as a late result. An id by hand may be replaced until the upstream answers to it.
    """
    rows = lock(tx, (item.task_id for item in items))
    results: list[str | None] = []
    for item in items:
        row = rows.get(item.task_id)
        results.append(_resolve(tx, row, item) if row else "missing")
    return results


def _resolve(tx: Transaction, row: TaskRow, item: TaskResolution) -> str | None:
    if row.state is not State.UNCERTAIN and not (item.upstream_id and _nameable(row)):
        return row.state.value
    if item.upstream_id is not None:
        if is_taken(tx, row, item.upstream_id):
            return "taken"
        submitted(tx, row, item.upstream_id, "hand", Report(upstream_id=item.upstream_id))
        ask(tx, row)
    elif item.resubmit:
        change(tx, row, resubmit=True, **leases.requeue(tx, "submit", row.id, row))
    else:
        end_uncertain(tx, row)
    return None


def _nameable(row: TaskRow) -> bool:
    """Whether a task that is not uncertain may get an id: it failed without proof that nothing was
    created, or has an id by hand to which the upstream has not answered.
    """
    parked = row.error is not None and row.error["code"] == "internal_error"
    unnamed = row.state is State.FAILED and row.upstream_id is None
    unproved = unnamed and (row.doubted_at is not None or parked)
    return unproved or row.upstream_id_from == "hand"


def reconcile_tasks(tx: Transaction, items: Sequence[str]) -> list[str | None]:
    """Queries tasks and fetches their missing images now, also the lost ones. Returns None,
    `missing`, or `unsubmitted` for a task without an upstream id and without results.

    A lost image waits for a fresh link. If the upstream gives no answer, it is asked again for
    `REVIVED_MS`. A task that has ended keeps its state and its event. `task.late_result` tells how
    many images are stored in the end, and why the rest is lost.
    """
    rows = lock(tx, items)
    results: list[str | None] = []
    for task_id in items:
        row = rows.get(task_id)
        if row is None or (row.upstream_id is None and row.settled_digest is None):
            results.append("unsubmitted" if row else "missing")
            continue
        change(tx, row, settle_faults=0)  # a dead-lettered row starts anew
        ask(tx, row)
        tx.write()  # one lease, even if the same task is named twice
        _fetch_missing(tx, row)
        results.append(None)
    return results


def _fetch_missing(tx: Transaction, row: TaskRow) -> None:
    missing = images.c.state == "pending"
    if row.state is not State.CANCELLED and row.erased_at is None:
        missing |= and_(images.c.state == "lost", images.c.confirmed)
    statement = select_images(images.c.task_id == row.id, missing).order_by(images.c.id)
    wait_ms = REVIVED_MS if row.upstream_id is not None else 0
    for image in image_rows(tx.connection, statement.with_for_update()):
        if image.state == "pending":
            if not awaits_link(tx, image):
                change(tx, image, **leases.requeue(tx, "download", image.id, image))
            continue
        forget_failures(tx, image)
        dies_at = max(image.link_dies_at, tx.now + REVIVED_MS)
        due = leases.release("download", tx.now + wait_ms, attempts=0)
        change(tx, image, link_dies_at=dies_at, at_risk_at=None, faults=0, **due)
