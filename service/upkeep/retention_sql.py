"""The SQL of erasure and retention. A row with a task's figures stays.

Each operation takes a small, fixed number of rows, so that no transaction holds the writer for
long. The body of a callback is small, because the inbox keeps few bodies and caps them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, Table, and_, delete, exists, func, select, update

from service.db.paging import Owned, Row
from service.db.tables import (
    attempts,
    callbacks,
    counters,
    deliveries,
    events,
    images,
    replays,
    sinks,
    steps,
    tasks,
)
from service.db.transaction import Transaction, one_by_one
from service.ids import rfc3339
from service.strict_json import JSON
from service.tasks.files import InputCopy, forget_copies
from service.tasks.state import TERMINAL, State

# Rows that one transaction takes: about 50 ms, if each task and event has its MiB (decision 31).
TASKS, EVENTS, DELIVERIES, IMAGES, REPLAYS = 4, 16, 50, 50, 100
ERASED = "erased"
# The row stays, so that the image's link can respond 410.
GONE = {"state": ERASED, "blob": None, "source_url": "", "sha256": None, "error": None}
# The columns of a task that a removal reads. The rest may be large.
COLUMNS = tuple(
    tasks.c[name] for name in ("id", "owner", "state", "upstream_id", "error", "erased_at")
)
OWN_PENDING = and_(deliveries.c.endpoint_id.is_(None), deliveries.c.state == "pending")


# --- a task that its owner erases ---


@dataclass(frozen=True, slots=True)
class Erased:
    """`refused` is `missing`, or the state of a task that has not ended. `blobs` are deleted after
    the commit, and so are the upstream's `copies` of images that other tasks had as inputs.
    """

    refused: str | None = None
    blobs: tuple[str, ...] = ()
    copies: tuple[InputCopy, ...] = ()
    upstream_id: str | None = None


def erase_tasks(tx: Transaction, items: Sequence[Owned]) -> list[Erased]:
    """Erases terminal tasks: images, prompt, metadata and everything else that came from the client
    or shows what it asked for. Erasing again changes nothing.

    Events stay in their places without content, and pending deliveries send them so. The delivery
    to the task's own `callback_url` becomes dead, because the address is erased. Callbacks stay as
    counted, without bodies.
    """
    ids = {item.id for item in items}
    statement = select(*COLUMNS).where(tasks.c.id.in_(ids)).order_by(tasks.c.id).with_for_update()
    rows = {row["id"]: row for row in tx.connection.execute(statement).mappings()}
    return [_erase(tx, rows.get(item.id), item) for item in items]


def _erase(tx: Transaction, row: Row | None, item: Owned) -> Erased:
    if row is None or item.owner not in (None, row["owner"]):
        return Erased("missing")
    task_id, execute = row["id"], tx.connection.execute
    # The event of a task that ends in this transaction is not written yet.
    ending = any(event.terminal and event.task_id == task_id for event in tx.emitted)
    if State(row["state"]) not in TERMINAL or ending:
        return Erased(row["state"])
    tx.write()
    ids = list(execute(select(images.c.id).where(images.c.task_id == task_id)).scalars())
    blobs = _forget_task_images(tx, task_id)
    copies = tuple(forget_copies(tx, ids))  # after the images, as a worker locks them that records
    filled = and_(callbacks.c.task_id == task_id, func.length(callbacks.c.body) > 0)
    execute(update(callbacks).where(filled).values(body=b""))
    execute(delete(steps).where(steps.c.task_id == task_id))
    own = and_(deliveries.c.task_id == task_id, OWN_PENDING)
    execute(update(deliveries).where(own).values(state="dead", finished_at=tx.now, due_at=None))
    of_task = select(deliveries.c.id).where(deliveries.c.task_id == task_id)
    # The key of an ordered delivery is a hash of metadata, which a reader could guess.
    keyed = and_(deliveries.c.task_id == task_id, deliveries.c.order_key.is_not(None))
    execute(update(deliveries).where(keyed, deliveries.c.state != "pending").values(order_key=None))
    answered = and_(attempts.c.delivery_id.in_(of_task), attempts.c.answer.is_not(None))
    execute(update(attempts).where(answered).values(answer=None))
    about = and_(events.c.task_id == task_id, events.c.type.startswith("image.task."))
    erased_at = row["erased_at"] or tx.now
    for event in execute(select(events.c.id, events.c.data).where(about)):
        tx.change(events, event.id, {"data": bare_document(event.data, erased_at)})
    _strip(tx, row)
    return Erased(None, blobs, copies, row["upstream_id"])


def _forget_task_images(tx: Transaction, task_id: str) -> tuple[str, ...]:
    """Marks shown images as erased and deletes the rest. Returns the blobs of all."""
    mine = images.c.task_id == task_id
    named = select(images.c.blob).where(mine, images.c.blob.is_not(None))
    blobs = tuple(tx.connection.execute(named.order_by(images.c.id).with_for_update()).scalars())
    shown = and_(images.c.confirmed, images.c.state.in_(("stored", ERASED)))
    tx.connection.execute(delete(images).where(mine, ~shown))
    tx.connection.execute(update(images).where(mine).values(GONE))
    return blobs


def _strip(tx: Transaction, row: Row) -> None:
    values = {
        "prompt": None,
        "request": {},
        "warnings": None,
        "inputs": None,
        "metadata": {},
        "body": b"",
        "callback_url": None,
        "error": bare_error(row["error"]),
        "erased_at": row["erased_at"] or tx.now,
    }
    tx.change(tasks, row["id"], values)
    tx.touched[row["id"]] = None


def bare_error(error: JSON | None) -> JSON | None:
    """An error without its message, which may quote the prompt."""
    return error and {"code": error["code"], "message": ERASED, "type": error["type"]}


def bare_document(document: JSON, erased_at: int) -> JSON:
    """An event's task without content: ids, times, state and figures."""
    content: JSON = {"metadata": {}, "request": {}, "warnings": [], "inputs": [], "images": []}
    erased = {"erased_at": rfc3339(erased_at), "error": bare_error(document["error"])}
    return {**document, **erased, **content}


# --- by time ---


@dataclass(frozen=True, slots=True)
class Stripped:
    """How many tasks. `blobs` are deleted after the commit."""

    tasks: int
    blobs: list[str]


@one_by_one
def strip_tasks(tx: Transaction, before: int) -> Stripped:
    """Removes the content of tasks that ended by this time.

    Prompt, body, metadata, callbacks, timeline and bodies in quarantine go. Images stay. A task
    keeps its content while the upstream is queried about it, an image is pending, or its own
    callback is to be delivered.
    """
    busy = (
        exists().where(deliveries.c.task_id == tasks.c.id, OWN_PENDING),
        exists().where(images.c.task_id == tasks.c.id, images.c.state == "pending"),
    )
    old = select(*COLUMNS).where(
        tasks.c.terminal_at <= before,
        tasks.c.erased_at.is_(None),
        tasks.c.settle_due_at.is_(None),
        *(~each for each in busy),
    )
    oldest = old.order_by(tasks.c.terminal_at).limit(TASKS)
    # A row that another transaction holds is in use. The next run looks at it again.
    oldest = oldest.with_for_update(skip_locked=True)
    rows = list(tx.connection.execute(oldest).mappings())
    ids = [row["id"] for row in rows]
    for table in (callbacks, steps):
        tx.connection.execute(delete(table).where(table.c.task_id.in_(ids)))
    mine, kept = images.c.task_id.in_(ids), and_(images.c.confirmed, images.c.state != "lost")
    named = select(images.c.blob).where(mine, ~kept, images.c.blob.is_not(None))
    blobs = list(tx.connection.execute(named.order_by(images.c.id).with_for_update()).scalars())
    # An unconfirmed image of a settled task is never confirmed.
    tx.connection.execute(delete(images).where(mine, ~images.c.confirmed))
    quarantined = and_(mine, images.c.state == "lost", images.c.blob.is_not(None))
    tx.connection.execute(update(images).where(quarantined).values(blob=None, sha256=None))
    for row in rows:
        _strip(tx, row)
    tx.write()  # before the next item looks for old tasks
    return Stripped(len(rows), blobs)


@dataclass(frozen=True, slots=True)
class OldEvents:
    """A page of the outbox: the events that may go, and the last sequence that was looked at."""

    events: list[str]
    last: int


def old_events(connection: Connection, after: int, before: int) -> OldEvents | None:
    """The next old events of the outbox, in their order. None: there are no more.

    An event stays while a delivery of it is pending. It also stays until every sink has published
    it, except a sink that no process has served since that time.
    """
    statement = select(events.c.sequence, events.c.id, events.c.time)
    statement = statement.where(events.c.sequence > after).order_by(events.c.sequence)
    position = select(func.min(sinks.c.position)).where(sinks.c.seen_at > before)
    published = connection.execute(position).scalar()
    if published is not None:
        statement = statement.where(events.c.sequence <= published)
    page = [row for row in connection.execute(statement.limit(EVENTS)) if row.time <= before]
    if not page:
        return None
    ids = [row.id for row in page]
    pending = and_(deliveries.c.event_id.in_(ids), deliveries.c.state == "pending")
    pending_ids = set(connection.execute(select(deliveries.c.event_id).where(pending)).scalars())
    return OldEvents([id for id in ids if id not in pending_ids], page[-1].sequence)


@one_by_one
def forget_deliveries(tx: Transaction, event_ids: Sequence[str]) -> int:
    """Deletes finished deliveries of these events, with their attempts. Returns how many, at most
    DELIVERIES.
    """
    finished = and_(deliveries.c.event_id.in_(event_ids), deliveries.c.state != "pending")
    statement = select(deliveries.c.id).where(finished).order_by(deliveries.c.id).limit(DELIVERIES)
    ids = list(tx.connection.execute(statement.with_for_update()).scalars())
    tx.connection.execute(delete(attempts).where(attempts.c.delivery_id.in_(ids)))
    return _delete(tx, deliveries, deliveries.c.id.in_(ids))


@one_by_one
def forget_events(tx: Transaction, ids: Sequence[str]) -> int:
    """Deletes events that have no delivery any more, and returns how many. Readers from before the
    last deleted sequence get `resync`.
    """
    free = and_(events.c.id.in_(ids), ~exists().where(deliveries.c.event_id == events.c.id))
    statement = select(events.c.sequence).where(free).order_by(events.c.sequence)
    sequences = list(tx.connection.execute(statement.with_for_update()).scalars())
    last = max(sequences, default=0)
    behind = and_(counters.c.name == "forgotten", counters.c.value < last)
    tx.connection.execute(update(counters).where(behind).values(value=last))
    return _delete(tx, events, events.c.sequence.in_(sequences))


@one_by_one
def forget_replays(tx: Transaction, before: int) -> int:
    """Deletes replays that finished by this time, and returns how many, at most REPLAYS. Their
    deliveries go with the events.
    """
    old = select(replays.c.id).where(replays.c.finished_at <= before).limit(REPLAYS)
    return _delete(tx, replays, replays.c.id.in_(old))


@one_by_one
def forget_images(tx: Transaction, before: int) -> list[str]:
    """Erases images of terminal tasks that were stored by this time, at most IMAGES. Returns their
    blobs, which are deleted after the commit.
    """
    old = select(images.c.id, images.c.blob).join(tasks, tasks.c.id == images.c.task_id)
    old = old.where(
        images.c.blob.is_not(None), images.c.stored_at <= before, tasks.c.terminal_at.is_not(None)
    )
    oldest = old.order_by(images.c.stored_at).limit(IMAGES)
    rows = list(tx.connection.execute(oldest.with_for_update(of=images, skip_locked=True)))
    erased = images.c.id.in_([row.id for row in rows])
    tx.connection.execute(update(images).where(erased).values(GONE))
    return [row.blob for row in rows]


def _delete(tx: Transaction, table: Table, where: ColumnElement[bool]) -> int:
    return tx.connection.execute(delete(table).where(where)).rowcount
