"""The results of a task: expected, confirmed, waited for while they are missing, finished."""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from sqlalchemy import bindparam, delete

from service.credits import credits_number
from service.db.tables import images
from service.db.transaction import Transaction
from service.events import outbox
from service.links import usable
from service.queue import leases
from service.queue.backoff import results_wait
from service.strict_json import JSON
from service.tasks.rows import ImageRow, TaskRow, image_rows, select_images
from service.tasks.state import State
from service.tasks.transitions import change, end, task_error
from service.upstreams.base import Report, Status

# A link lives one such time, and the upstream gives links for one more: the last one dies after
# two.
LIVES = 2


def anticipate(tx: Transaction, task: TaskRow, urls: Sequence[str], ttl_ms: int) -> None:
    """Starts the downloads of results that only a callback named so far. They count once a query
    agrees. An earlier query may have named some of them.
    """
    before = [] if task.incomplete_since is None else task_images(tx, task.id)
    positions = {row.position for row in before}
    for position, url in enumerate(urls):
        if usable(url) and position not in positions:
            _insert(tx, task, position, url, confirmed=False, ttl_ms=ttl_ms)


_OF_TASK = select_images(images.c.task_id == bindparam("task_id"))
_LOCKING = _OF_TASK.with_for_update()


def task_images(tx: Transaction, task_id: str) -> list[ImageRow]:
    """The images of the task, as this transaction has left them."""
    tx.write()
    return image_rows(tx.connection, _OF_TASK, {"task_id": task_id})


def named_so_far(tx: Transaction, task_id: str) -> list[str]:
    """Empty links for the results that the task has rows for, so that `expect` confirms these."""
    return [""] * (1 + max((row.position for row in task_images(tx, task_id)), default=-1))


def expect(
    tx: Transaction, task: TaskRow, urls: Sequence[str], ttl_ms: int, *, last: bool = True
) -> list[ImageRow]:
    """Makes the rows of `images` agree with the results of a query, in the upstream's order.
    Returns the rows as they are then.

    A row that a callback named is confirmed if the address is the same, and fetched anew if not. A
    confirmed row keeps its outcome, but a missing image gets the fresh link. The link lives
    `ttl_ms` from now, and at most `LIVES` times that from the submission, however often the
    upstream renews it.

    A link that cannot be used changes no row. If the query was the `last` one, it confirms the link
    that a callback named for the same result. Without that, its result is lost.
    """
    last_ms = (task.submitted_at or task.created_at) + LIVES * ttl_ms
    locked = image_rows(tx.connection, _LOCKING, {"task_id": task.id})
    rows = {row.position: row for row in locked}
    kept: list[ImageRow] = []
    for position, url in enumerate(urls):
        row = rows.pop(position, None)
        kept += [] if row is None else [row]
        if row is not None and not usable(url):
            if last and not row.confirmed:
                _renew(tx, row, row.source_url, row.link_dies_at)
        elif row is None:
            if last or usable(url):
                kept.append(_insert(tx, task, position, url, confirmed=True, ttl_ms=ttl_ms))
        elif row.confirmed or row.source_url == url:
            _renew(tx, row, url, min(tx.now + ttl_ms, last_ms))
        else:
            _replace(tx, row, url, tx.now + ttl_ms)
    invented = [row.id for row in rows.values() if last and not row.confirmed]
    if invented:
        tx.connection.execute(delete(images).where(images.c.id.in_(invented)))
    return kept + [row for row in rows.values() if row.id not in invented]


def _renew(tx: Transaction, row: ImageRow, url: str, dies_at: int) -> None:
    """Confirms a result. A fresh link waits for its turn, or each query would start the next
    download.
    """
    values: dict[str, Any] = {"confirmed": True}
    if row.state == "pending":
        if row.source_url != url:
            values |= {"source_url": url, "link_dies_at": max(row.link_dies_at, dies_at)}
        if row.due_at is None or awaits_link(tx, row):
            values |= leases.requeue(tx, "download", row.id, row)
    change(tx, row, **values)


def awaits_link(tx: Transaction, row: ImageRow) -> bool:
    """Whether a lost image is to be fetched again once a query has brought a fresh link."""
    return row.attempts == 0 and row.due_at is not None and row.due_at > tx.now


def links_awaited(tx: Transaction, task_id: str) -> list[ImageRow]:
    tx.write()
    pending = select_images(images.c.task_id == task_id, images.c.state == "pending")
    rows = image_rows(tx.connection, pending.order_by(images.c.id).with_for_update())
    return [row for row in rows if awaits_link(tx, row)]


def _replace(tx: Transaction, row: ImageRow, url: str, dies_at: int) -> None:
    """Fetches a result from the query's address instead of the callback's. The failures at the old
    address do not count.
    """
    change(tx, row, source_url=url, confirmed=True, link_dies_at=dies_at, blob=None)
    forget_failures(tx, row)
    change(tx, row, **leases.requeue(tx, "download", row.id, row))


def forget_failures(tx: Transaction, row: ImageRow) -> None:
    """Makes an image pending. Its failures so far do not count."""
    cleared = dict.fromkeys(("error", "refused_host", "stale_since", "wrong_since", "wrong_sha256"))
    change(tx, row, state="pending", stale_count=0, wrong_count=0, **cleared)


def _insert(
    tx: Transaction, task: TaskRow, position: int, url: str, *, confirmed: bool, ttl_ms: int
) -> ImageRow:
    image_id = tx.id("image")
    values: JSON = {
        "id": image_id,
        "task_id": task.id,
        "owner": task.owner,
        "position": position,
        "state": "pending",
        "confirmed": confirmed,
        "source_url": url,
        "link_dies_at": tx.now + ttl_ms,
    }
    row = ImageRow(**values)
    tx.insert(images, values | leases.enqueue(tx, "download", image_id, (row, task.origin)))
    return row


def await_missing(
    tx: Transaction, task: TaskRow, report: Report, ttl_ms: int, patience_ms: int
) -> int | None:
    """Keeps the results that a completed task has so far, and returns when to ask for the missing
    ones. None: `patience_ms` are up since the first such answer, or the task needs none.
    """
    if task.settled_digest is not None or task.state is State.CANCELLED or task.erased_at:
        return None
    if task.incomplete_since is None:
        change(tx, task, incomplete_since=tx.now)
        tx.step(task.id, "task.results_awaited", results=len(report.results), raw=report.results)
    waited = tx.now - (task.incomplete_since or 0)
    if waited >= patience_ms:
        return None
    if task.state is State.SUBMITTED:
        change(tx, task, upstream_status=Status.PROCESSING)
    expect(tx, task, report.results, ttl_ms, last=False)
    wait_ms = round(results_wait(waited / 1000) * 1000)
    return tx.now + min(wait_ms, patience_ms - waited)


def awaited(tx: Transaction, task_id: str) -> bool:
    """Whether an image of the task is still to be fetched."""
    return any(row.state == "pending" for row in task_images(tx, task_id))


def finish_if_done(tx: Transaction, task: TaskRow, rows: Sequence[ImageRow] | None = None) -> None:
    """Ends a `storing` task when each of its images is stored or lost. If the task ended before,
    tells operators of the late result.

    `rows`: all images of the task, as this transaction leaves them. None: they are read.
    """
    if task.settled_digest is None or not (task.terminal or task.state is State.STORING):
        return
    rows = task_images(tx, task.id) if rows is None else rows
    rows = sorted(rows, key=attrgetter("position"))
    if any(row.state == "pending" for row in rows):
        return
    lost = [row for row in rows if row.state == "lost"]
    which = "; ".join(f"{row.position}: {row.error}" for row in lost)
    message = f"results could not be saved: {which}"[:2000] if lost else None
    if task.terminal:
        tell_late(tx, task, len(rows) - len(lost), len(lost), message)
    elif message is not None:
        end(tx, task, State.FAILED, task_error("results_lost", message), rows)
    else:
        end(tx, task, State.COMPLETED, None, rows, progress=100)


def tell_late(
    tx: Transaction, task: TaskRow, stored: int = 0, lost: int = 0, reason: str | None = None
) -> None:
    """Tells operators the upstream's word on a task that the service had given up. The task's
    state and event stand.
    """
    outcome = {"status": task.upstream_status, "stored": stored, "lost": lost}
    tx.step(task.id, "task.late_result", **outcome, reason=reason)
    data = {
        "task_id": task.id,
        "owner": task.owner,
        "state": task.state,
        "upstream_id": task.upstream_id,
        "credits_used": credits_number(task.credits_used),
    }
    outbox.emit_operators(tx, "task.late_result", data | outcome, task_id=task.id)
