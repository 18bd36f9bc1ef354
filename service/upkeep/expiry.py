"""What goes after the end: a task's content when its owner erases it, everything else when its days
are over. A line with figures stays.

What has its time is found by reading (`old_…`) and goes in batches of these ids, looked at again in
the transaction that removes it. No transaction takes more than `portions.LIMIT` says.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, and_, delete, exists, func, select, update

from service.db.paging import Row
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
from service.db.transaction import Transaction
from service.tasks.state import TERMINAL, State
from service.upkeep import batches
from service.upkeep.batches import ERASED, Limit, Old, Part, Weight, bare_document, bare_error

GONE = {
    "state": ERASED,
    "blob": None,
    "source_url": "",
    "sha256": None,
    "error": None,
}  # the row stays: whoever has the link is told

# --- a task's content
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Erasure:
    """`part`: what the task was read to have. If that is not all, it goes before; if it is, with
    the rest.
    """

    task_id: str
    owner: str | None  # None: whoever owns it (admin)
    part: Part | None = None


@dataclass(frozen=True, slots=True)
class Erased:
    """`refused`: `missing`, or the state of a task that has not ended. `blobs` are to be deleted
    after the commit.

    `left`: something is, for another transaction; what was asked for is to be asked for again.
    """

    refused: str | None = None
    blobs: tuple[str, ...] = ()
    left: bool = False


def erase_tasks(tx: Transaction, items: Sequence[Erasure]) -> list[Erased]:
    """Erases tasks that have ended: images, prompt, metadata and whatever else came from the client
    or shows what it asked for.

    Events stay in their places, without content, and pending deliveries take them so. The one to
    the task's own callback_url is dead: its address is erased. Callbacks stay as counted, without
    bodies. Erasing again changes nothing. Who would be too much for this transaction is left to
    another.
    """
    rows = _locked(tx, (item.task_id for item in items))
    results: list[Erased] = []
    taken: list[Weight] = []
    for item in items:
        weight = item.part.weight if item.part else Weight(1, 0)
        if taken and batches.LIMIT.fits([*taken, weight]) <= len(taken):
            results.append(Erased(left=True))
            continue
        results.append(_erase(tx, rows.get(item.task_id), item))
        if results[-1].refused is None:
            taken.append(weight)
    return results


def _locked(tx: Transaction, ids: Iterable[str]) -> dict[str, Row]:
    """The tasks' rows without what is large, locked to the end of the transaction, in the order of
    their ids.
    """
    columns = (
        tasks.c.id,
        tasks.c.owner,
        tasks.c.state,
        tasks.c.error,
        tasks.c.erased_at,
        tasks.c.settle_due_at,
    )
    statement = (
        select(*columns).where(tasks.c.id.in_(set(ids))).order_by(tasks.c.id).with_for_update()
    )
    return {row["id"]: dict(row) for row in tx.connection.execute(statement).mappings()}


def _erase(tx: Transaction, row: Row | None, item: Erasure) -> Erased:
    if row is None or item.owner not in (None, row["owner"]):
        return Erased("missing")
    ending = any(
        event.terminal and event.task_id == row["id"] for event in tx.emitted
    )  # in this transaction: its event is not written yet
    if State(row["state"]) not in TERMINAL or ending:
        return Erased(row["state"])
    if item.part:
        batches.take_erased(tx, item.part)
        if not item.part.whole:
            return Erased(left=True)
    tx.write()
    task_id, execute = row["id"], tx.connection.execute
    blobs = _forget_images(tx, task_id)
    execute(
        update(callbacks)
        .where(callbacks.c.task_id == task_id, func.length(callbacks.c.body) > 0)
        .values(body=b"")
    )
    execute(delete(steps).where(steps.c.task_id == task_id))
    own = and_(
        deliveries.c.task_id == task_id,
        deliveries.c.endpoint_id.is_(None),
        deliveries.c.state == "pending",
    )
    execute(update(deliveries).where(own).values(state="dead", finished_at=tx.now, due_at=None))
    told = select(events.c.id, events.c.data).where(
        events.c.task_id == task_id, events.c.type.startswith("image.task.")
    )
    for event in execute(told):
        tx.change(events, event.id, {"data": bare_document(event.data)})
    _bare(tx, row)
    return Erased(None, blobs)


def _forget_images(tx: Transaction, task_id: str) -> tuple[str, ...]:
    """Those that were shown are erased, others are no more; the blobs of all."""
    mine = images.c.task_id == task_id
    statement = (
        select(images.c.blob)
        .where(mine, images.c.blob.is_not(None))
        .order_by(images.c.id)
        .with_for_update()
    )
    blobs = tuple(tx.connection.execute(statement).scalars())
    shown = and_(images.c.confirmed, images.c.state.in_(("stored", ERASED)))
    tx.connection.execute(delete(images).where(mine, ~shown))
    tx.connection.execute(update(images).where(mine).values(GONE))
    return blobs


def _bare(tx: Transaction, row: Row) -> None:
    erased_at = tx.now if row["erased_at"] is None else row["erased_at"]
    values: dict[str, Any] = {
        "prompt": None,
        "request": {},
        "metadata": {},
        "body": b"",
        "callback_url": None,
    }
    values |= {"error": bare_error(row["error"]), "erased_at": erased_at}
    tx.change(tasks, row["id"], values)
    tx.touched.add(row["id"])


# --- by time
# --------------------------------------------------------------------------------------------------


def old_tasks(connection: Connection, before: int, limit: Limit, most: int) -> Old | None:
    """Tasks that ended by then and have content still; not while the upstream is asked about one,
    or its callback is to be sent.
    """
    own = exists().where(
        deliveries.c.task_id == tasks.c.id,
        deliveries.c.endpoint_id.is_(None),
        deliveries.c.state == "pending",
    )
    awaited = exists().where(images.c.task_id == tasks.c.id, images.c.state == "pending")
    of = tasks.c.id
    called, called_bytes = batches.counted(
        callbacks, callbacks.c.task_id == of, batches.length(callbacks.c.body)
    )
    noted, noted_bytes = batches.counted(
        steps, steps.c.task_id == of, batches.text_length(steps.c.detail)
    )
    shown, _ = batches.counted(images, images.c.task_id == of)
    ended = select(of, 1 + called + noted + shown, batches.OWN + called_bytes + noted_bytes)
    over = ended.where(
        tasks.c.terminal_at <= before,
        tasks.c.erased_at.is_(None),
        tasks.c.settle_due_at.is_(None),
        ~own,
        ~awaited,
    )
    return batches.first(
        connection, over.order_by(tasks.c.terminal_at).limit(most), limit, batches.stripped_part
    )


def strip_tasks(tx: Transaction, items: Sequence[Sequence[str]]) -> list[int]:
    """Takes prompt, body, metadata, callbacks and timeline from such tasks; of how many. Their
    images stay.
    """
    counts = []
    for ids in items:
        rows = [
            row
            for row in _locked(tx, ids).values()
            if row["erased_at"] is None and row["settle_due_at"] is None
        ]
        known = [row["id"] for row in rows]
        for table in (callbacks, steps):
            tx.connection.execute(delete(table).where(table.c.task_id.in_(known)))
        tx.connection.execute(
            delete(images).where(images.c.task_id.in_(known), ~images.c.confirmed)
        )  # nobody will confirm them
        for row in rows:
            _bare(tx, row)
        tx.write()  # the next item may name the same
        counts.append(len(rows))
    return counts


def thin_tasks(tx: Transaction, items: Sequence[Part]) -> list[int]:
    """Takes a part of what such tasks have; how many rows, 0 from one that was taken up again."""
    rows = _locked(tx, (part.of for part in items))
    goes = {
        id for id, row in rows.items() if row["erased_at"] is None and row["settle_due_at"] is None
    }
    return [batches.take_stripped(tx, part) if part.of in goes else 0 for part in items]


@dataclass(frozen=True, slots=True)
class OldEvents:
    """A page of the outbox: the events that may go, once their deliveries have, and the last place
    looked at.
    """

    events: list[str]
    last: int


def old_events(
    connection: Connection, after: int, before: int, limit: int, size: int
) -> OldEvents | None:
    """The next events of the outbox, in their order, as long as they are of that time; None: no
    more are.

    At most `limit`, with so many characters; one that has more comes alone.
    Whoever has not taken an event yet keeps it: a pending delivery, a sink unless nobody has
    published there since then.
    """
    columns = (
        events.c.sequence,
        events.c.id,
        events.c.time,
        batches.text_length(events.c.data).label("size"),
    )
    statement = select(*columns).where(events.c.sequence > after).order_by(events.c.sequence)
    taken = connection.execute(
        select(func.min(sinks.c.position)).where(sinks.c.seen_at > before)
    ).scalar()
    if taken is not None:
        statement = statement.where(events.c.sequence <= taken)
    page = [row for row in connection.execute(statement.limit(limit)) if row.time <= before]
    if not page:
        return None
    del page[max(1, Limit(limit, size).fits(Weight(1, row.size) for row in page)) :]
    pending = and_(
        deliveries.c.event_id.in_([row.id for row in page]), deliveries.c.state == "pending"
    )
    wanted = set(
        connection.execute(select(deliveries.c.event_id).where(pending).distinct()).scalars()
    )
    return OldEvents([row.id for row in page if row.id not in wanted], page[-1].sequence)


def old_deliveries(connection: Connection, ids: Sequence[str], limit: Limit) -> Old | None:
    """Deliveries of these events that have an end."""
    tried, size = batches.counted(
        attempts,
        attempts.c.delivery_id == deliveries.c.id,
        batches.length(attempts.c.answer) + batches.length(attempts.c.error),
    )
    over = select(deliveries.c.id, 1 + tried, size).where(
        deliveries.c.event_id.in_(ids), deliveries.c.state != "pending"
    )
    return batches.first(connection, over.limit(limit.rows), limit, batches.attempts_part)


def thin_deliveries(tx: Transaction, items: Sequence[Part]) -> list[int]:
    """Removes a part of the attempts of deliveries that have an end; how many."""
    ended = exists().where(
        deliveries.c.id == attempts.c.delivery_id, deliveries.c.state != "pending"
    )
    parts = [
        delete(attempts).where(attempts.c.id.in_(part.some(attempts)), ended) for part in items
    ]
    return [tx.connection.execute(statement).rowcount for statement in parts]


def forget_deliveries(tx: Transaction, items: Sequence[Sequence[str]]) -> list[int]:
    """Removes deliveries that have an end, with their attempts; how many."""
    counts = []
    for ids in items:
        statement = select(deliveries.c.id).where(
            deliveries.c.id.in_(ids), deliveries.c.state != "pending"
        )
        over = list(
            tx.connection.execute(statement.order_by(deliveries.c.id).with_for_update()).scalars()
        )
        tx.connection.execute(delete(attempts).where(attempts.c.delivery_id.in_(over)))
        tx.connection.execute(delete(deliveries).where(deliveries.c.id.in_(over)))
        counts.append(len(over))
    return counts


def forget_events(tx: Transaction, items: Sequence[Sequence[str]]) -> list[int]:
    """Removes events that have no delivery any more, and keeps up to where: readers from before
    there are told. How many.
    """
    counts = []
    for ids in items:
        free = and_(events.c.id.in_(ids), ~exists().where(deliveries.c.event_id == events.c.id))
        statement = (
            select(events.c.sequence).where(free).order_by(events.c.sequence).with_for_update()
        )
        gone = list(tx.connection.execute(statement).scalars())
        tx.connection.execute(delete(events).where(events.c.sequence.in_(gone)))
        last = and_(counters.c.name == "forgotten", counters.c.value < max(gone, default=0))
        tx.connection.execute(update(counters).where(last).values(value=max(gone, default=0)))
        counts.append(len(gone))
    return counts


def forget_replays(tx: Transaction, items: Sequence[int]) -> list[int]:
    """Removes replays that ended by then, at most as many as a transaction takes; how many. Their
    deliveries go with the events.
    """
    some = [
        select(replays.c.id).where(replays.c.finished_at <= before).limit(batches.LIMIT.rows)
        for before in items
    ]
    return [
        tx.connection.execute(delete(replays).where(replays.c.id.in_(ids))).rowcount for ids in some
    ]


def old_images(connection: Connection, before: int, limit: int) -> list[str]:
    """Images stored by then, of tasks that have ended."""
    statement = select(images.c.id).join(tasks, tasks.c.id == images.c.task_id)
    old = statement.where(
        images.c.blob.is_not(None), images.c.stored_at <= before, tasks.c.terminal_at.is_not(None)
    )
    return list(connection.execute(old.order_by(images.c.stored_at).limit(limit)).scalars())


def forget_images(tx: Transaction, items: Sequence[Sequence[str]]) -> list[list[str]]:
    """Marks images as erased; their blobs, which are to be deleted after the commit."""
    names = []
    for ids in items:
        statement = select(images.c.id, images.c.blob).where(
            images.c.id.in_(ids), images.c.blob.is_not(None)
        )
        found = list(tx.connection.execute(statement.order_by(images.c.id).with_for_update()))
        tx.connection.execute(
            update(images).where(images.c.id.in_([row.id for row in found])).values(GONE)
        )
        names.append([row.blob for row in found])
    return names
