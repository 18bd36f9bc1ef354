"""The results of a task: expected, confirmed, finished."""

from collections.abc import Sequence

from sqlalchemy import delete, select

from service.credits import credits_number
from service.db.tables import images
from service.db.transaction import Transaction
from service.events import outbox
from service.queue import leases
from service.tasks.state import TERMINAL, State
from service.tasks.transitions import Row, end

# a link lives a day, and the upstream gives links for a day after the submission: the last one dies
# after two (upstream.md)
LIVES = 2


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
                else leases.requeue(tx, "download", row["id"], row)
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
                {**fresh, **blameless, **leases.requeue(tx, "download", row["id"], row)},
            )
        elif (
            row["state"] == "pending"
        ):  # a fresh link; tried when its turn comes, or each answer would start the next try
            again = leases.requeue(tx, "download", row["id"], row) if row["due_at"] is None else {}
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
    tx.insert(images, row | leases.enqueue(tx, "download", image_id))
