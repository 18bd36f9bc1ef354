"""Images of a task: expected, stored, put off, lost. A task ends when none is left to fetch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, select

from service.model import TERMINAL, State, credits_number, rfc3339
from service.store import Grant, Transaction
from service.store.operations import leases, outbox
from service.store.operations.tasks import Row, ask, end, lock
from service.store.tables import images

STALE_LIMIT, STALE_MS = 10, 30 * 60 * 1000
WRONG_LIMIT = 3
# a link lives a day, and the upstream gives links for a day after the submission: the last one dies
# after two (upstream.md)
LIVES = 2
AT_RISK_MS, AT_RISK_STALE = (
    2 * 3600 * 1000,
    3,
)  # time for somebody to act: this little left, or the link dead so often


def anticipate(tx: Transaction, task: Row, urls: Sequence[str], ttl_ms: int) -> None:
    """Starts fetching what only a callback named, for a task without results yet; it counts once a
    query agrees.
    """
    for position, url in enumerate(urls):
        _insert(tx, task, position, url, confirmed=False, ttl_ms=ttl_ms)


def expect(tx: Transaction, task: Row, urls: Sequence[str], ttl_ms: int) -> None:
    """Makes one row a result that a query named, in the upstream's order, and gets the missing ones
    fetched.

    A row that a callback named counts now if the address is the same; another address wins over it.
    What is confirmed stays: a link may be renewed while the picture is missing, but what was stored
    or lost is so for good. Another address is a fresh link: it lives `ttl_ms` from now, but not
    past `LIVES` such lives from the submission, however often one is given.
    """
    last_ms = (task["submitted_at"] or task["created_at"]) + LIVES * ttl_ms
    statement = select(images).where(images.c.task_id == task["id"]).with_for_update()
    known = {row["position"]: row for row in tx.connection.execute(statement).mappings()}
    for position, url in enumerate(urls):
        row = known.pop(position, None)
        if row is None:
            _insert(tx, task, position, url, confirmed=True, ttl_ms=ttl_ms)
        elif row["source_url"] == url:
            retry = (
                {}
                if row["state"] != "pending" or row["due_at"] is not None
                else leases.wanted(tx, "download", row["id"], row)
            )
            tx.change(images, row["id"], {"confirmed": True, **retry})
        elif not row["confirmed"]:  # what went wrong was another address's fault
            fresh = {
                "source_url": url,
                "confirmed": True,
                "state": "pending",
                "blob": None,
                "error": None,
                "link_dies_at": tx.now + ttl_ms,
            }
            blameless = {
                "stale_since": None,
                "stale_count": 0,
                "wrong_sha256": None,
                "wrong_count": 0,
            }
            tx.change(
                images,
                row["id"],
                {**fresh, **blameless, **leases.wanted(tx, "download", row["id"], row)},
            )
        elif (
            row["state"] == "pending"
        ):  # a fresh link; tried when its turn comes, or each answer would start the next try
            again = leases.wanted(tx, "download", row["id"], row) if row["due_at"] is None else {}
            dies_at = max(row["link_dies_at"], min(tx.now + ttl_ms, last_ms))
            tx.change(images, row["id"], {"source_url": url, "link_dies_at": dies_at, **again})
    if invented := [row["id"] for row in known.values() if not row["confirmed"]]:
        tx.connection.execute(delete(images).where(images.c.id.in_(invented)))


def awaited(tx: Transaction, task_id: str) -> bool:
    """Whether a picture of the task is still to be fetched."""
    tx.write()
    return (
        tx.connection.execute(
            select(images.c.id).where(images.c.task_id == task_id, images.c.state == "pending")
        ).first()
        is not None
    )


def finish_if_done(tx: Transaction, task: Row) -> None:
    """Ends a task that is `storing` when each of its results is stored or lost; tells of those that
    came after its end.
    """
    late = State(task["state"]) in TERMINAL
    if task["settled_digest"] is None or not (late or State(task["state"]) is State.STORING):
        return
    tx.write()
    statement = (
        select(images.c.position, images.c.state, images.c.error)
        .where(images.c.task_id == task["id"])
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
    end(
        tx,
        task,
        State.FAILED,
        {
            "code": "results_lost",
            "message": f"results could not be saved: {which}"[:2000],
            "type": "task_error",
        },
    )


def tell_late(tx: Transaction, task: Row, stored: int = 0, lost: int = 0) -> None:
    """Tells operators what the upstream said of a task that we had given up: its state and its
    event stand.
    """
    told = {"status": task["upstream_status"], "stored": stored, "lost": lost}
    tx.step(task["id"], "task.late_result", **told)
    known = {name: task[name] for name in ("owner", "state", "upstream_id")} | {
        "credits_used": credits_number(task["credits_used"])
    }
    outbox.emit_operators(
        tx, "task.late_result", {"task_id": task["id"], **known, **told}, task_id=task["id"]
    )


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

    grant: Grant
    task_id: str
    source_url: str
    outcome: Stored | Retry | Lost


def record_downloads(tx: Transaction, items: Sequence[Download]) -> list[str | None]:
    """Records downloads; the images' states, or None where the lease had ended or the address was
    replaced: nothing changed.
    """
    tasks = lock(tx, (item.task_id for item in items))
    statement = (
        select(images)
        .where(images.c.id.in_([item.grant.key for item in items]))
        .order_by(images.c.id)
        .with_for_update()
    )
    rows = {row["id"]: row for row in tx.connection.execute(statement).mappings()}
    results = []
    for item in items:
        row, task = rows.get(item.grant.key), tasks.get(item.task_id)
        known = row is not None and task is not None and leases.holds(item.grant, row)
        results.append(_record(tx, task, dict(row), item) if known and row and task else None)
    return results


def _record(tx: Transaction, task: Row, row: Row, item: Download) -> str | None:
    if row["state"] != "pending" or row["source_url"] != item.source_url:
        tx.change(
            images,
            row["id"],
            leases.freed("download", tx.now if row["state"] == "pending" else None),
        )
        return None
    step = {"image_id": row["id"], "index": row["position"]}
    values: dict[str, Any]
    match item.outcome:
        case Stored() as stored:
            figures = {name: getattr(stored, name) for name in Stored.__slots__}
            values = {
                "state": "stored",
                "stored_at": tx.now,
                "error": None,
                **figures,
                **leases.freed("download", None),
            }
            tx.step(task["id"], "image.stored", **step, bytes=stored.bytes, sha256=stored.sha256)
        case Retry() as retry:
            values = {**_blame(tx, row, retry), **leases.freed("download", tx.now + retry.wait_ms)}
            if values["state"] == "lost":
                values["due_at"] = None
            tx.step(
                task["id"],
                "image.lost" if values["state"] == "lost" else "image.retry",
                **step,
                reason=retry.reason,
            )
            if values["state"] == "pending":
                values |= _at_risk(tx, task, row | values)
            if retry.stale and values["state"] == "pending" and task["settled_digest"] is not None:
                ask(tx, task)
        case Lost() as lost:
            values = {"state": "lost", "error": lost.reason, **leases.freed("download", None)}
            tx.step(task["id"], "image.lost", **step, reason=lost.reason)
    tx.change(images, row["id"], values)
    finish_if_done(tx, task)
    return str(values["state"])


def _blame(tx: Transaction, row: Row, retry: Retry) -> dict[str, Any]:
    """What a passing failure leaves in the row; final when it came too often, or when the link's
    time is up and no other was asked for.
    """
    values: dict[str, Any] = {"error": retry.reason, "state": "pending"}
    final = tx.now >= row["link_dies_at"] and not retry.stale
    if retry.stale:
        since = tx.now if row["stale_since"] is None else row["stale_since"]
        values |= {"stale_since": since, "stale_count": row["stale_count"] + 1}
        final |= values["stale_count"] >= STALE_LIMIT and tx.now - since >= STALE_MS
    if retry.wrong_sha256 is not None:
        again = retry.wrong_sha256 == row["wrong_sha256"]
        values |= {
            "wrong_sha256": retry.wrong_sha256,
            "wrong_count": row["wrong_count"] + 1 if again else 1,
        }
        final |= values["wrong_count"] >= WRONG_LIMIT
    return values | ({"state": "lost"} if final else {})


def _at_risk(tx: Transaction, task: Row, row: Row) -> dict[str, Any]:
    """Operators are told once, while there is time, of a picture that could not be fetched so far
    and whose link dies soon.
    """
    dying = tx.now >= row["link_dies_at"] - AT_RISK_MS or row["stale_count"] >= AT_RISK_STALE
    if row["at_risk_at"] is not None or not dying:
        return {}
    data = {
        "task_id": task["id"],
        "owner": task["owner"],
        "image_id": row["id"],
        "index": row["position"],
        "reason": row["error"],
    }
    outbox.emit_operators(
        tx,
        "image.at_risk",
        data | {"link_dies_at": rfc3339(row["link_dies_at"])},
        task_id=task["id"],
    )
    return {"at_risk_at": tx.now}


def _insert(
    tx: Transaction, task: Row, position: int, url: str, *, confirmed: bool, ttl_ms: int
) -> None:
    image_id = tx.id("image")
    row = {
        "id": image_id,
        "task_id": task["id"],
        "owner": task["owner"],
        "position": position,
        "state": "pending",
        "confirmed": confirmed,
        "source_url": url,
        "link_dies_at": tx.now + ttl_ms,
    }
    tx.insert(images, row | leases.born(tx, "download", image_id))
