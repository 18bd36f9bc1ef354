"""The results of a task: expected, confirmed, finished."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import delete, select

from service.credits import credits_number
from service.db.tables import images
from service.db.transaction import Transaction
from service.events import outbox
from service.queue import leases
from service.tasks.rows import ImageRow, TaskRow, image_rows, select_images
from service.tasks.state import TERMINAL, State
from service.tasks.transitions import change, end, task_error

# a link lives a day, and the upstream gives links for a day after the submission: the last one dies
# after two (upstream.md)
LIVES = 2


def anticipate(tx: Transaction, task: TaskRow, urls: Sequence[str], ttl_ms: int) -> None:
    """Starts fetching what only a callback named, for a task without results yet; it counts once a
    query agrees.
    """
    for position, url in enumerate(urls):
        _insert(tx, task, position, url, confirmed=False, ttl_ms=ttl_ms)


def expect(tx: Transaction, task: TaskRow, urls: Sequence[str], ttl_ms: int) -> None:
    """Makes one row a result that a query named, in the upstream's order, and gets the missing ones
    fetched.

    A row that a callback named counts now if the address is the same; another address wins over it.
    What is confirmed stays: a link may be renewed while the picture is missing, but what was stored
    or lost is so for good. Another address is a fresh link: it lives `ttl_ms` from now, but not
    past `LIVES` such lives from the submission, however often one is given.
    """
    last_ms = (task.submitted_at or task.created_at) + LIVES * ttl_ms
    statement = select_images(images.c.task_id == task.id).with_for_update()
    rows = {row.position: row for row in image_rows(tx.connection, statement)}
    for position, url in enumerate(urls):
        row = rows.pop(position, None)
        if row is None:
            _insert(tx, task, position, url, confirmed=True, ttl_ms=ttl_ms)
        elif row.confirmed or row.source_url == url:
            _renew(tx, row, url, min(tx.now + ttl_ms, last_ms))
        else:
            _replace(tx, row, url, tx.now + ttl_ms)
    if invented := [row.id for row in rows.values() if not row.confirmed]:
        tx.connection.execute(delete(images).where(images.c.id.in_(invented)))


def _renew(tx: Transaction, row: ImageRow, url: str, dies_at: int) -> None:
    """Confirms a result. A fresh link waits for its turn, or each query would start the next
    download.
    """
    values: dict[str, Any] = {"confirmed": True}
    if row.state == "pending":
        if row.source_url != url:
            values |= {"source_url": url, "link_dies_at": max(row.link_dies_at, dies_at)}
        if row.due_at is None:
            values |= leases.requeue(tx, "download", row.id, row)
    change(tx, row, **values)


def _replace(tx: Transaction, row: ImageRow, url: str, dies_at: int) -> None:
    """Fetches a result from the address that a query named instead of the one in a callback. The
    failures of that one do not count.
    """
    cleared = dict.fromkeys(("blob", "error", "stale_since", "wrong_sha256"))
    counts = {"stale_count": 0, "wrong_count": 0}
    values = {"source_url": url, "confirmed": True, "state": "pending", "link_dies_at": dies_at}
    change(tx, row, **values, **cleared, **counts, **leases.requeue(tx, "download", row.id, row))


def awaited(tx: Transaction, task_id: str) -> bool:
    """Whether a picture of the task is still to be fetched."""
    tx.write()
    return (
        tx.connection.execute(
            select(images.c.id).where(images.c.task_id == task_id, images.c.state == "pending")
        ).first()
        is not None
    )


def finish_if_done(tx: Transaction, task: TaskRow) -> None:
    """Ends a task that is `storing` when each of its results is stored or lost; tells of those that
    came after its end.
    """
    late = task.state in TERMINAL
    if task.settled_digest is None or not (late or task.state is State.STORING):
        return
    tx.write()
    statement = (
        select(images.c.position, images.c.state, images.c.error)
        .where(images.c.task_id == task.id)
        .order_by(images.c.position)
    )
    rows = list(tx.connection.execute(statement))
    if any(row.state == "pending" for row in rows):
        return
    lost = [row for row in rows if row.state == "lost"]
    if late:
        tell_late(tx, task, stored=len(rows) - len(lost), lost=len(lost))
        return
    if not lost:
        end(tx, task, State.COMPLETED, progress=100)
        return
    which = "; ".join(f"{row.position}: {row.error}" for row in lost)
    error = task_error("results_lost", f"results could not be saved: {which}"[:2000])
    end(tx, task, State.FAILED, error)


def tell_late(tx: Transaction, task: TaskRow, stored: int = 0, lost: int = 0) -> None:
    """Tells operators what the upstream said of a task that we had given up: its state and its
    event stand.
    """
    outcome = {"status": task.upstream_status, "stored": stored, "lost": lost}
    tx.step(task.id, "task.late_result", **outcome)
    data = {
        "task_id": task.id,
        "owner": task.owner,
        "state": task.state,
        "upstream_id": task.upstream_id,
        "credits_used": credits_number(task.credits_used),
    }
    outbox.emit_operators(tx, "task.late_result", data | outcome, task_id=task.id)


def _insert(
    tx: Transaction, task: TaskRow, position: int, url: str, *, confirmed: bool, ttl_ms: int
) -> None:
    image_id = tx.id("image")
    row = {
        "id": image_id,
        "task_id": task.id,
        "owner": task.owner,
        "position": position,
        "state": "pending",
        "confirmed": confirmed,
        "source_url": url,
        "link_dies_at": tx.now + ttl_ms,
    }
    tx.insert(images, row | leases.enqueue(tx, "download", image_id))
