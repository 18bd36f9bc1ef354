"""What goes after the end: a task's content when its owner erases it, everything else when its days are over. A line with figures stays.

What has its time is found by reading (`old_…`) and goes in batches of these ids, looked at again in the transaction that removes it.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from sqlalchemy import Connection, Text, and_, cast, delete, exists, func, select, update

from service.model import JSON, TERMINAL, State
from service.store import Transaction
from service.store.operations.tasks import Row, change, lock
from service.store.tables import attempts, callbacks, counters, deliveries, events, images, replays, sinks, steps, tasks

ERASED = "erased"
GONE = {"state": ERASED, "blob": None, "source_url": "", "sha256": None, "error": None}  # the row stays: whoever has the link is told

# --- a task's content -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Erasure:
    task_id: str
    owner: str | None  # None: whoever owns it (admin)


@dataclass(frozen=True, slots=True)
class Erased:
    """`refused`: `missing`, or the state of a task that has not ended. `blobs` are to be deleted after the commit."""

    refused: str | None = None
    blobs: tuple[str, ...] = ()


def erase_tasks(tx: Transaction, items: Sequence[Erasure]) -> list[Erased]:
    """Erases tasks that have ended: images, prompt, metadata and whatever else came from the client or shows what it asked for.

    Events stay in their places, without content, and pending deliveries take them so. The one to the task's own callback_url is dead:
    its address is erased. Callbacks stay as counted, without bodies. Erasing again changes nothing.
    """
    rows = lock(tx, (item.task_id for item in items))
    return [_erase(tx, rows.get(item.task_id), item.owner) for item in items]


def _erase(tx: Transaction, row: Row | None, owner: str | None) -> Erased:
    if row is None or owner not in (None, row["owner"]):
        return Erased("missing")
    ending = any(event.terminal and event.task_id == row["id"] for event in tx.emitted)  # in this transaction: its event is not written yet
    if State(row["state"]) not in TERMINAL or ending:
        return Erased(row["state"])
    task_id, execute = row["id"], tx.connection.execute
    blobs = _forget_images(tx, task_id)
    execute(update(callbacks).where(callbacks.c.task_id == task_id).values(body=b""))
    execute(delete(steps).where(steps.c.task_id == task_id))
    own = and_(deliveries.c.task_id == task_id, deliveries.c.endpoint_id.is_(None), deliveries.c.state == "pending")
    execute(update(deliveries).where(own).values(state="dead", finished_at=tx.now, due_at=None))
    sent = select(deliveries.c.id).where(deliveries.c.task_id == task_id)
    execute(update(attempts).where(attempts.c.delivery_id.in_(sent)).values(answer=None))
    told = select(events.c.id, events.c.data).where(events.c.task_id == task_id, events.c.type.startswith("image.task."))
    for event in execute(told):
        tx.change(events, event.id, {"data": bare_document(event.data)})
    _bare(tx, row)
    return Erased(None, blobs)


def _forget_images(tx: Transaction, task_id: str) -> tuple[str, ...]:
    """Those that were shown are erased, others are no more; the blobs of all."""
    mine = images.c.task_id == task_id
    statement = select(images.c.blob).where(mine, images.c.blob.is_not(None)).order_by(images.c.id).with_for_update()
    blobs = tuple(tx.connection.execute(statement).scalars())
    shown = and_(images.c.confirmed, images.c.state.in_(("stored", ERASED)))
    tx.connection.execute(delete(images).where(mine, ~shown))
    tx.connection.execute(update(images).where(mine).values(GONE))
    return blobs


def bare_error(error: JSON | None) -> JSON | None:
    """An error without its message, which may quote the prompt."""
    return error and {"code": error["code"], "message": ERASED, "type": error["type"]}


def bare_document(document: JSON) -> JSON:
    """An event's task without content: ids, times, state and figures."""
    return {**document, "error": bare_error(document["error"]), "metadata": {}, "request": {}, "images": []}


def _bare(tx: Transaction, row: Row) -> None:
    erased_at = tx.now if row["erased_at"] is None else row["erased_at"]
    values: dict[str, Any] = {"prompt": None, "request": {}, "metadata": {}, "body": b"", "callback_url": None}
    change(tx, row, **values, error=bare_error(row["error"]), erased_at=erased_at)


# --- by time ----------------------------------------------------------------------------------------------------------


def old_tasks(connection: Connection, before: int, limit: int, size: int) -> list[str]:
    """Tasks that ended by then and have content still; not while the upstream is asked about one, or its callback is to be sent.

    At most `limit`, with so many bytes of bodies; one that has more comes alone.
    """
    own = exists().where(deliveries.c.task_id == tasks.c.id, deliveries.c.endpoint_id.is_(None), deliveries.c.state == "pending")
    awaited = exists().where(images.c.task_id == tasks.c.id, images.c.state == "pending")
    called = select(func.sum(func.length(callbacks.c.body))).where(callbacks.c.task_id == tasks.c.id).scalar_subquery()
    ended = select(tasks.c.id, func.length(tasks.c.body) + func.coalesce(called, 0))
    over = ended.where(tasks.c.terminal_at <= before, tasks.c.erased_at.is_(None), tasks.c.settle_due_at.is_(None), ~own, ~awaited)
    rows = list(connection.execute(over.order_by(tasks.c.terminal_at).limit(limit)))
    return [id for id, _ in rows[: fitting([bytes for _, bytes in rows], size)]]


def fitting(sizes: Sequence[int], limit: int) -> int:
    """How many of the first are within the limit together; one at least."""
    return max(1, bisect_right(list(accumulate(sizes)), limit))


def strip_tasks(tx: Transaction, items: Sequence[Sequence[str]]) -> list[int]:
    """Takes prompt, body, metadata, callbacks and timeline from such tasks; of how many. Their images stay."""
    counts = []
    for ids in items:
        rows = [row for row in lock(tx, ids).values() if row["erased_at"] is None and row["settle_due_at"] is None]
        known = [row["id"] for row in rows]
        for table in (callbacks, steps):
            tx.connection.execute(delete(table).where(table.c.task_id.in_(known)))
        tx.connection.execute(delete(images).where(images.c.task_id.in_(known), ~images.c.confirmed))  # nobody will confirm them
        for row in rows:
            _bare(tx, row)
        tx.write()  # the next item may name the same
        counts.append(len(rows))
    return counts


@dataclass(frozen=True, slots=True)
class OldEvents:
    """A page of the outbox: the events that may go, their deliveries that have an end, and the last place looked at."""

    events: list[str]
    deliveries: list[str]
    last: int


def old_events(connection: Connection, after: int, before: int, limit: int, size: int) -> OldEvents | None:
    """The next events of the outbox, in their order, as long as they are of that time; None: no more are.

    At most `limit`, with so many characters; one that has more comes alone.
    Whoever has not taken an event yet keeps it: a pending delivery, a sink unless nobody has published there since then.
    """
    columns = (events.c.sequence, events.c.id, events.c.time, func.length(cast(events.c.data, Text)).label("size"))
    statement = select(*columns).where(events.c.sequence > after).order_by(events.c.sequence)
    taken = connection.execute(select(func.min(sinks.c.position)).where(sinks.c.seen_at > before)).scalar()
    if taken is not None:
        statement = statement.where(events.c.sequence <= taken)
    page = [row for row in connection.execute(statement.limit(limit)) if row.time <= before]
    if not page:
        return None
    del page[fitting([row.size for row in page], size) :]
    made = select(deliveries.c.id, deliveries.c.event_id, deliveries.c.state).where(deliveries.c.event_id.in_([row.id for row in page]))
    sent = list(connection.execute(made))
    wanted = {row.event_id for row in sent if row.state == "pending"}
    over = [row.id for row in sent if row.event_id not in wanted]
    return OldEvents([row.id for row in page if row.id not in wanted], over, page[-1].sequence)


def forget_deliveries(tx: Transaction, items: Sequence[Sequence[str]]) -> list[int]:
    """Removes deliveries that have an end, with their attempts; how many."""
    counts = []
    for ids in items:
        statement = select(deliveries.c.id).where(deliveries.c.id.in_(ids), deliveries.c.state != "pending")
        over = list(tx.connection.execute(statement.order_by(deliveries.c.id).with_for_update()).scalars())
        tx.connection.execute(delete(attempts).where(attempts.c.delivery_id.in_(over)))
        tx.connection.execute(delete(deliveries).where(deliveries.c.id.in_(over)))
        counts.append(len(over))
    return counts


def forget_events(tx: Transaction, items: Sequence[Sequence[str]]) -> list[int]:
    """Removes events that have no delivery any more, and keeps up to where: readers from before there are told. How many."""
    counts = []
    for ids in items:
        free = and_(events.c.id.in_(ids), ~exists().where(deliveries.c.event_id == events.c.id))
        statement = select(events.c.sequence).where(free).order_by(events.c.sequence).with_for_update()
        gone = list(tx.connection.execute(statement).scalars())
        tx.connection.execute(delete(events).where(events.c.sequence.in_(gone)))
        last = and_(counters.c.name == "forgotten", counters.c.value < max(gone, default=0))
        tx.connection.execute(update(counters).where(last).values(value=max(gone, default=0)))
        counts.append(len(gone))
    return counts


def forget_replays(tx: Transaction, items: Sequence[int]) -> list[int]:
    """Removes replays that ended by then; how many. Their deliveries go with the events."""
    return [tx.connection.execute(delete(replays).where(replays.c.finished_at <= before)).rowcount for before in items]


def old_images(connection: Connection, before: int, limit: int) -> list[str]:
    """Images stored by then, of tasks that have ended."""
    statement = select(images.c.id).join(tasks, tasks.c.id == images.c.task_id)
    old = statement.where(images.c.blob.is_not(None), images.c.stored_at <= before, tasks.c.terminal_at.is_not(None))
    return list(connection.execute(old.order_by(images.c.stored_at).limit(limit)).scalars())


def forget_images(tx: Transaction, items: Sequence[Sequence[str]]) -> list[list[str]]:
    """Marks images as erased; their blobs, which are to be deleted after the commit."""
    names = []
    for ids in items:
        statement = select(images.c.id, images.c.blob).where(images.c.id.in_(ids), images.c.blob.is_not(None))
        found = list(tx.connection.execute(statement.order_by(images.c.id).with_for_update()))
        tx.connection.execute(update(images).where(images.c.id.in_([row.id for row in found])).values(GONE))
        names.append([row.blob for row in found])
    return names
