"""Records what came of downloads."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import select

from service.db.tables import images
from service.db.transaction import Lease, Transaction
from service.events import outbox
from service.ids import rfc3339
from service.queue import leases
from service.tasks.results import finish_if_done
from service.tasks.rows import ImageRow, TaskRow, image_rows, select_images
from service.tasks.transitions import ask, change, lock

STALE_LIMIT, STALE_MS = 10, 30 * 60 * 1000


WRONG_LIMIT = 3


AT_RISK_MS, AT_RISK_STALE = (
    2 * 3600 * 1000,
    3,
)  # time for somebody to act: this little left, or the link dead so often


@dataclass(frozen=True, slots=True)
class Stored:
    blob: str
    media_type: str
    bytes: int
    sha256: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Retry:
    """A passing failure: tried again after `wait_ms` while the link lives.

    `stale` (403, 404, 410): the upstream is asked for a fresh link, also when the link's time is
    up; final after 10 over 30 minutes. `wrong_sha256`: what came was no image; the same bytes three
    times are final.
    """

    reason: str
    wait_ms: int
    stale: bool = False
    wrong_sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Lost:
    """A final failure."""

    reason: str


@dataclass(frozen=True, slots=True)
class Download:
    """What came of fetching `source_url` for one image."""

    lease: Lease
    task_id: str
    source_url: str
    outcome: Stored | Retry | Lost


def record_downloads(tx: Transaction, items: Sequence[Download]) -> list[str | None]:
    """Records downloads; the images' states, or None where the lease had ended or the address was
    replaced: nothing changed.
    """
    tasks = lock(tx, (item.task_id for item in items))
    ids = [item.lease.key for item in items]
    statement = select_images(images.c.id.in_(ids)).order_by(images.c.id).with_for_update()
    rows = {row.id: row for row in image_rows(tx.connection, statement)}
    results = []
    for item in items:
        row, task = rows.get(item.lease.key), tasks.get(item.task_id)
        known = row is not None and task is not None and leases.holds(item.lease, row)
        results.append(_record(tx, task, row, item) if known and row and task else None)
    return results


def _record(tx: Transaction, task: TaskRow, row: ImageRow, item: Download) -> str | None:
    if row.state != "pending" or row.source_url != item.source_url:
        change(tx, row, **leases.release("download", tx.now if row.state == "pending" else None))
        return None
    step = {"image_id": row.id, "index": row.position}
    values: dict[str, Any]
    match item.outcome:
        case Stored() as stored:
            figures = {name: getattr(stored, name) for name in Stored.__slots__}
            values = {
                "state": "stored",
                "stored_at": tx.now,
                "error": None,
                **figures,
                **leases.release("download", None),
            }
            tx.step(task.id, "image.stored", **step, bytes=stored.bytes, sha256=stored.sha256)
        case Retry() as retry:
            values = {
                **_blame(tx, row, retry),
                **leases.release("download", tx.now + retry.wait_ms),
            }
            if values["state"] == "lost":
                values["due_at"] = None
            tx.step(
                task.id,
                "image.lost" if values["state"] == "lost" else "image.retry",
                **step,
                reason=retry.reason,
            )
            if values["state"] == "pending":
                values |= _at_risk(tx, task, replace(row, **values))
            if retry.stale and values["state"] == "pending" and task.settled_digest is not None:
                ask(tx, task)
        case Lost() as lost:
            values = {"state": "lost", "error": lost.reason, **leases.release("download", None)}
            tx.step(task.id, "image.lost", **step, reason=lost.reason)
    change(tx, row, **values)
    finish_if_done(tx, task)
    return str(values["state"])


def _blame(tx: Transaction, row: ImageRow, retry: Retry) -> dict[str, Any]:
    """What a passing failure leaves in the row; final when it came too often, or when the link's
    time is up and no other was asked for.
    """
    values: dict[str, Any] = {"error": retry.reason, "state": "pending"}
    final = tx.now >= row.link_dies_at and not retry.stale
    if retry.stale:
        since = tx.now if row.stale_since is None else row.stale_since
        values |= {"stale_since": since, "stale_count": row.stale_count + 1}
        final |= values["stale_count"] >= STALE_LIMIT and tx.now - since >= STALE_MS
    if retry.wrong_sha256 is not None:
        again = retry.wrong_sha256 == row.wrong_sha256
        values |= {
            "wrong_sha256": retry.wrong_sha256,
            "wrong_count": row.wrong_count + 1 if again else 1,
        }
        final |= values["wrong_count"] >= WRONG_LIMIT
    return values | ({"state": "lost"} if final else {})


def _at_risk(tx: Transaction, task: TaskRow, row: ImageRow) -> dict[str, Any]:
    """Operators are told once, while there is time, of a picture that could not be fetched so far
    and whose link dies soon.
    """
    dying = tx.now >= row.link_dies_at - AT_RISK_MS or row.stale_count >= AT_RISK_STALE
    if row.at_risk_at is not None or not dying:
        return {}
    data = {
        "task_id": task.id,
        "owner": task.owner,
        "image_id": row.id,
        "index": row.position,
        "reason": row.error,
    }
    outbox.emit_operators(
        tx, "image.at_risk", data | {"link_dies_at": rfc3339(row.link_dies_at)}, task_id=task.id
    )
    return {"at_risk_at": tx.now}


def dead_letter_image(tx: Transaction, lease: Lease, cause: str) -> None:
    """Gives up an image whose row is out of its queue for good, and tells operators."""
    statement = select(images.c.task_id).where(images.c.id == lease.key)
    task_id = tx.connection.execute(statement).scalar_one()
    task = lock(tx, [task_id])[task_id]
    tx.change(images, lease.key, {"state": "lost", "error": "internal_error"})
    finish_if_done(tx, task)
    outbox.emit_dead_letter(tx, lease, cause, task_id)
