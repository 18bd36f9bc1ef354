"""The order of deliveries to an ordered endpoint, and the pace of one with a rate.

Deliveries of one key go one after another, by the sequence of their events. A delivery waits
behind the pending ones before it. Every transaction that ends a delivery makes the next one of its
key due.

Both sides lock the first delivery alone and pass over it if it is locked, so that neither waits for
the other: a delivery that finds the one in front locked looks again after `LOOK_MS`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import (
    ColumnElement,
    Connection,
    RowMapping,
    Select,
    and_,
    func,
    select,
    tuple_,
    update,
)

from service.db.paging import Row
from service.db.tables import deliveries, endpoints
from service.db.transaction import Transaction
from service.strict_json import JSON

LOOK_MS, LATE_MS, PLACES = 500, 60_000, 30
LOCKED_MS, AHEAD_MS = 20, 5000
columns = deliveries.c


def _in_front(row: Row) -> Select[tuple[str, int | None]]:
    """The pending deliveries before this one, the first of them first."""
    earlier = tuple_(columns.sequence, columns.id) < tuple_(row["sequence"], row["id"])
    return _pending(row["endpoint_id"], row["order_key"], earlier)


def _pending(endpoint_id: str, key: str, where: ColumnElement[bool]) -> Select[tuple[str, int]]:
    statement = select(columns.id, columns.due_at).where(
        columns.endpoint_id == endpoint_id,
        columns.order_key == key,
        columns.state == "pending",
        where,
    )
    return statement.order_by(columns.sequence, columns.id).limit(1)


def is_behind(connection: Connection, row: Row) -> bool:
    return connection.execute(_in_front(row)).first() is not None


def _locked(tx: Transaction, first: Select[tuple[str, int | None]]) -> RowMapping | None:
    """The first delivery of these, locked. None: there is none, or a transaction holds its lock.
    The second is never locked instead: if the first ends then, its end would skip the second.
    """
    id = tx.connection.execute(first).scalar()
    mine = select(columns.id, columns.due_at, columns.attempts).where(
        columns.id == id, columns.state == "pending"
    )
    return tx.connection.execute(mine.with_for_update(skip_locked=True)).mappings().first()


def wait_behind(tx: Transaction, row: Row) -> int:
    """How long a delivery waits for the first one in front of it, if nothing makes it due earlier.
    The further back it is, the longer. A look costs some milliseconds, so that thousands of waiting
    deliveries that all looked every minute would leave no time to send.
    """
    first = _locked(tx, _in_front(row))
    if first is None:  # it has ended, or another transaction records it now
        return LOOK_MS
    some = _in_front(row).limit(PLACES).subquery()
    position: int = tx.connection.execute(select(func.count()).select_from(some)).scalar_one()
    return max(0, (first["due_at"] or 0) - tx.now) + LATE_MS * max(1, position)


def release_next(tx: Transaction, row: Row) -> None:
    """Makes the first pending delivery of the key due, after one of them has ended."""
    if row["order_key"] is None or row["endpoint_id"] is None:
        return
    first = _locked(tx, _pending(row["endpoint_id"], row["order_key"], columns.id != row["id"]))
    if first is None or first["attempts"] or (first["due_at"] or 0) <= tx.now:
        return
    mine = update(deliveries).where(columns.id == first["id"])
    tx.connection.execute(mine.values(due_at=tx.now))
    tx.due.update(("deliver", "redeliver"))


def release_waiting(tx: Transaction, endpoint_ids: Sequence[str]) -> None:
    """Makes the deliveries due that wait behind others, after many of them have ended."""
    waiting = and_(columns.endpoint_id.in_(endpoint_ids), columns.order_key.is_not(None))
    waiting = and_(waiting, columns.state == "pending", columns.attempts == 0)
    values = {columns.due_at: tx.now}
    tx.connection.execute(update(deliveries).where(waiting, columns.due_at > tx.now).values(values))
    tx.due.update(("deliver", "redeliver"))


@dataclass(frozen=True, slots=True)
class RateRequest:
    """A delivery that wants to be sent now to an endpoint with a rate."""

    delivery_id: str
    endpoint_id: str
    slot_at: int | None  # what an earlier request got
    later: bool = False  # a retry or a replay


def take_times(tx: Transaction, items: Sequence[RateRequest]) -> list[int]:
    """How many milliseconds each delivery waits for its turn, 0: it is sent now.

    The endpoint's row has the next free time, so that all processes together keep the rate. A
    delivery keeps the time that it got. A time that has passed by more than a second is void, or
    the deliveries of an outage would come all at once. Retries and replays take no time that is
    more than `AHEAD_MS` away, so that first attempts do not wait behind all of them.
    """
    # Rows are locked in the order of their ids, as the renewal of leases locks them.
    waits = {item: _take(tx, item) for item in sorted(items, key=lambda item: item.delivery_id)}
    return [waits[item] for item in items]


def _take(tx: Transaction, item: RateRequest) -> int:
    mine = endpoints.c.id == item.endpoint_id
    interval = interval_ms(tx.connection.execute(select(endpoints.c.options).where(mine)).scalar())
    if not interval:
        return 0
    if item.slot_at is not None and item.slot_at > tx.now - max(1000, interval):
        return max(0, item.slot_at - tx.now)
    # A transaction that waited here for another could make a deadlock of its other endpoints.
    locked = select(endpoints.c.slot_at).where(mine).with_for_update(skip_locked=True)
    row = tx.connection.execute(locked).first()
    if row is None:
        return LOCKED_MS
    slot = max(tx.now, row.slot_at or 0)
    if item.later and slot - tx.now > max(AHEAD_MS, interval):
        return AHEAD_MS
    tx.connection.execute(update(endpoints).where(mine).values(slot_at=slot + interval))
    statement = update(deliveries).where(columns.id == item.delivery_id).values(slot_at=slot)
    tx.connection.execute(statement)
    return slot - tx.now


def interval_ms(options: JSON | None) -> int:
    rate = (options or {}).get("rate_per_s")
    return math.ceil(1000 / rate) if rate else 0
