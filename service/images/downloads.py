"""Images in the store: what a download reads, and how its outcome is recorded."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, and_, bindparam, func, or_, select, update

from service.db.prepared import run
from service.db.tables import images
from service.db.tables import tasks as task_table
from service.db.transaction import Lease, Transaction
from service.events import outbox
from service.ids import rfc3339
from service.ops.tracing import NO_ORIGIN, Origin
from service.queue import leases
from service.strict_json import JSON
from service.tasks.results import finish_if_done
from service.tasks.rows import IMAGE_COLUMNS, ImageRow, TaskRow, counts, image_rows, select_images
from service.tasks.transitions import ask, change, lock

STALE_LIMIT, STALE_MS = 10, 30 * 60 * 1000
WRONG_LIMIT, WRONG_MS = 3, 10 * 60 * 1000
# An image is at risk when its host or link is refused, when the same wrong bytes came WRONG_LIMIT
# times, or when its link dies this soon or was dead so often.
AT_RISK_MS, AT_RISK_STALE = 2 * 3600 * 1000, 3
REFUSED = and_(images.c.refused_host.is_not(None), images.c.state == "pending")


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
    """A failure that is retried after `wait_ms`, as long as the link lives.

    `stale` (403, 404, 410): the upstream is asked for a fresh link, also when the link's time is
    up. Ten of them over at least 30 minutes are final. `unreadable`: it is asked, too, because the
    link cannot be read. `wrong_sha256`: the bytes were no image. The
    same bytes three times over at least 10 minutes are final. `refused`: the guard refused the host
    for now.
    """

    reason: str
    wait_ms: int = 0
    stale: bool = False
    unreadable: bool = False
    wrong_sha256: str | None = None
    quarantined: "Quarantined | None" = None
    refused: "Refusal | None" = None


@dataclass(frozen=True, slots=True)
class Lost:
    reason: str
    quarantined: "Quarantined | None" = None


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A body that was no image. The blob store keeps it for the operator."""

    blob: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """A host that the guard refuses, until the `setting` lists it or its name server names another
    address.
    """

    host: str
    setting: str | None


@dataclass(frozen=True, slots=True)
class Download:
    lease: Lease
    task_id: str
    source_url: str
    outcome: Stored | Retry | Lost


_WITH_ORIGIN = (
    select(*IMAGE_COLUMNS, *outbox.ORIGIN)
    .outerjoin_from(images, task_table, task_table.c.id == images.c.task_id)
    .where(images.c.id.in_(bindparam("ids", expanding=True)))
)


def images_and_origins(
    connection: Connection, ids: Sequence[str]
) -> dict[str, tuple[ImageRow, Origin]]:
    count, rows = len(IMAGE_COLUMNS), run(connection, _WITH_ORIGIN, {"ids": list(ids)})
    pairs = ((ImageRow(*row[:count]), Origin(*row[count:])) for row in rows)
    return {image.id: (image, origin) for image, origin in pairs}


def image_and_origin(connection: Connection, image_id: str) -> tuple[ImageRow | None, Origin]:
    return images_and_origins(connection, [image_id]).get(image_id, (None, NO_ORIGIN))


def quarantined_bodies(connection: Connection, task_id: str) -> list[JSON]:
    kept = and_(images.c.state.in_(("pending", "lost")), images.c.blob.is_not(None))
    statement = select_images(images.c.task_id == task_id, kept).order_by(images.c.position)
    return [
        {
            "index": row.position,
            "blob": row.blob,
            "bytes": row.bytes,
            "sha256": row.sha256,
            "reason": row.error,
        }
        for row in image_rows(connection, statement)
    ]


def host_refused(connection: Connection) -> bool:
    """Whether an image waits because the guard refuses its host for now."""
    refused = select(images.c.id).where(REFUSED).limit(1)
    return connection.execute(refused).first() is not None


def retry_refused(tx: Transaction, items: Sequence[None]) -> list[None]:
    """Makes downloads from refused hosts due now: the settings may have changed since."""
    waiting = select(images.c.id).where(REFUSED, images.c.due_at > tx.now).order_by(images.c.id)
    free = waiting.with_for_update(skip_locked=True).cte("free").prefix_with("MATERIALIZED")
    statement = update(images).where(images.c.id.in_(select(free.c.id)))
    tx.connection.execute(statement.values(due_at=tx.now, attempts=0))
    tx.due.add("download")
    return [None] * len(items)


def shown_image(connection: Connection, image_id: str) -> ImageRow | None:
    """An image that a task shows, or showed before it was erased."""
    shown = or_(counts, images.c.state == "erased")
    return next(iter(image_rows(connection, select_images(images.c.id == image_id, shown))), None)


def record_downloads(tx: Transaction, items: Sequence[Download]) -> list[str | None]:
    """Records downloads and returns the images' states.

    None: the lease had ended or the address was replaced, so the outcome does not count.
    """
    tasks = lock(tx, (item.task_id for item in items))
    ids = [item.lease.key for item in items]
    rows, of_task = lock_images(tx.connection, ids)
    return [
        _record(tx, tasks.get(item.task_id), rows.get(item.lease.key), item, of_task)
        for item in items
    ]


_OTHERS = images.alias()
_LOCKING = (
    select_images(images.c.id.in_(bindparam("ids", expanding=True)))
    .add_columns(
        select(func.count()).where(_OTHERS.c.task_id == images.c.task_id).scalar_subquery()
    )
    .order_by(images.c.id)
    .with_for_update()
)


def lock_images(
    connection: Connection, ids: Sequence[str]
) -> tuple[dict[str, ImageRow], dict[str, list[ImageRow]]]:
    """Locked images by their id, and by task where these are all images of the task."""
    rows, numbers = {}, {}
    for *values, count in run(connection, _LOCKING, {"ids": list(ids)}):
        row = ImageRow(*values)
        rows[row.id], numbers[row.task_id] = row, count
    of_task: dict[str, list[ImageRow]] = {}
    for row in rows.values():
        of_task.setdefault(row.task_id, []).append(row)
    whole = {key: mine for key, mine in of_task.items() if len(mine) == numbers[key]}
    return rows, whole


def _record(
    tx: Transaction,
    task: TaskRow | None,
    row: ImageRow | None,
    item: Download,
    of_task: Mapping[str, list[ImageRow]],
) -> str | None:
    if row is None or task is None or not leases.holds(item.lease, row):
        return None
    if row.state != "pending" or row.source_url != item.source_url:
        change(tx, row, **leases.release("download", tx.now if row.state == "pending" else None))
        return None
    outcome = item.outcome
    retry = outcome if isinstance(outcome, Retry) else None
    if isinstance(outcome, Stored):
        stored = {"state": "stored", "stored_at": tx.now, "error": None, "refused_host": None}
        change(tx, row, **stored, **asdict(outcome))
        detail: dict[str, Any] = {"bytes": outcome.bytes, "sha256": outcome.sha256}
    else:
        values = _count_failure(tx, row, retry) if retry else {"state": "lost"}
        refused_host = retry.refused.host if retry and retry.refused else None
        kept = asdict(outcome.quarantined) if outcome.quarantined else {}
        change(tx, row, error=outcome.reason, refused_host=refused_host, **values, **kept)
        detail = {"reason": outcome.reason}
    step = "image.retry" if row.state == "pending" else f"image.{row.state}"
    tx.step(task.id, step, image_id=row.id, index=row.position, **detail)
    due_at = None
    if retry and row.state == "pending":
        due_at = tx.now + retry.wait_ms
        _warn_of_loss(tx, task, row, retry)
        if (retry.stale or retry.unreadable) and task.settled_digest is not None:
            ask(tx, task)
    change(tx, row, **leases.release("download", due_at))
    finish_if_done(tx, task, of_task.get(task.id))
    return row.state


def _count_failure(tx: Transaction, row: ImageRow, retry: Retry) -> dict[str, Any]:
    """The columns that count failures. The image is lost if there were too many, or if the link's
    time is up and no fresh link was asked for.
    """
    values: dict[str, Any] = {}
    final = tx.now >= row.link_dies_at and not retry.stale
    if retry.stale:
        since = tx.now if row.stale_since is None else row.stale_since
        values |= {"stale_since": since, "stale_count": row.stale_count + 1}
        final |= values["stale_count"] >= STALE_LIMIT and tx.now - since >= STALE_MS
    if retry.wrong_sha256 is not None:
        same = retry.wrong_sha256 == row.wrong_sha256
        count = row.wrong_count + 1 if same else 1
        since = row.wrong_since if same and row.wrong_since is not None else tx.now
        wrong = {"wrong_sha256": retry.wrong_sha256, "wrong_count": count, "wrong_since": since}
        values |= wrong
        final |= count >= WRONG_LIMIT and tx.now - since >= WRONG_MS
    return values | ({"state": "lost"} if final else {})


def _warn_of_loss(tx: Transaction, task: TaskRow, row: ImageRow, retry: Retry) -> None:
    """Emits `image.at_risk` once, while there is time to act."""
    refused = retry.refused
    dying = tx.now >= row.link_dies_at - AT_RISK_MS or row.stale_count >= AT_RISK_STALE
    refusal = refused is not None or retry.unreadable
    at_risk = dying or refusal or row.wrong_count >= WRONG_LIMIT
    if row.at_risk_at is not None or not at_risk:
        return
    data = {
        "task_id": task.id,
        "owner": task.owner,
        "image_id": row.id,
        "index": row.position,
        "reason": row.error,
        "link_dies_at": rfc3339(row.link_dies_at),
        "host": refused.host if refused else None,
        "setting": refused.setting if refused else None,
    }
    outbox.emit_operators(tx, "image.at_risk", data, task_id=task.id)
    change(tx, row, at_risk_at=tx.now)


def dead_letter_image(tx: Transaction, lease: Lease, cause: str) -> None:
    """Marks an image lost that left its queue for good, and tells operators."""
    statement = select(images.c.task_id).where(images.c.id == lease.key)
    task_id = tx.connection.execute(statement).scalar_one()
    task = lock(tx, [task_id])[task_id]
    tx.change(images, lease.key, {"state": "lost", "error": "internal_error"})
    finish_if_done(tx, task)
    outbox.emit_dead_letter(tx, lease, cause, task_id)
