"""Replays of the deliveries that match a filter, of any endpoint.

A dead delivery's event is delivered anew, unless the endpoint has it by now. One that waits for its
retry is due now. A delivered one is sent again. The pages go by the time of creation up to the
start of the replay, so that a replay ends.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, exists, func, insert, or_, select, update

from service.db import paging
from service.db.paging import Row
from service.db.tables import deliveries, events
from service.db.transaction import Transaction
from service.events.endpoint_options import order_keys
from service.events.endpoints import EndpointRow, lock_endpoint
from service.events.failures import supersede

MOST = 100_000  # deliveries of one replay
NAMES = ("id", "event_id", "endpoint_id", "task_id", "owner", "created_at", "state")
columns = deliveries.c


@dataclass(frozen=True, slots=True)
class DeliveryFilter:
    """`state` None: deliveries that failed and have not arrived since, whether they are dead or are
    retried. `error`: their cause. `status`: of the last response. Times are milliseconds.
    """

    owner: str | None
    endpoint: str | None = None
    state: str | None = None
    error: str | None = None
    status: int | None = None
    type: str | None = None
    since: int | None = None
    until: int | None = None


def conditions(wanted: DeliveryFilter) -> list[ColumnElement[bool]]:
    found = paging.conditions(
        deliveries,
        owner=wanted.owner,
        endpoint_id=wanted.endpoint,
        state=wanted.state,
        cause=wanted.error,
        last_status=wanted.status,
        since=wanted.since,
        until=wanted.until,
    )
    if wanted.state in (None, "dead"):
        found.append(columns.cause.is_not(None))
    if wanted.type is not None:
        named = and_(events.c.id == columns.event_id, events.c.type == wanted.type)
        found.append(exists().where(named))
    return found


def count_selected(connection: Connection, wanted: DeliveryFilter) -> int:
    """How many deliveries match, at most one more than a replay may have."""
    some = select(columns.id).where(*conditions(wanted)).limit(MOST + 1).subquery()
    count: int = connection.execute(select(func.count()).select_from(some)).scalar_one()
    return count


def selected_page(connection: Connection, replay: Row, limit: int) -> list[Row]:
    """The next deliveries of a replay, the oldest first."""
    position, after = replay["position"], replay["after"] or ""
    statement = select(*(columns[name] for name in NAMES)).where(
        *conditions(DeliveryFilter(**replay["filter"])),
        columns.created_at >= position,
        or_(columns.created_at > position, columns.id > after),
        columns.created_at <= replay["created_at"],
        columns.replay_id.is_distinct_from(replay["id"]),
    )
    statement = statement.order_by(columns.created_at, columns.id).limit(limit)
    return list(connection.execute(statement).mappings())


def record_selected(tx: Transaction, replay: Row, found: Sequence[Row]) -> int:
    """Makes the deliveries of a page, and returns how many it made or brought forward."""
    ids = [row["id"] for row in found]
    mine = columns.id.in_(ids)
    locked = select(columns.id, columns.state).where(mine).order_by(columns.id).with_for_update()
    states = {row.id: row.state for row in tx.connection.execute(locked)}
    named = {row["endpoint_id"] for row in found} - {None}
    rows_of = {id: lock_endpoint(tx, id) for id in sorted(named)}
    open_ids = {id for id, row in rows_of.items() if row is not None and row.status != "disabled"}
    reachable = [
        row
        for row in found
        if row["endpoint_id"] in open_ids | {None} and states.get(row["id"]) == row["state"]
    ]
    forward = [row["id"] for row in reachable if row["state"] == "pending"]
    _bring_forward(tx, replay, forward)
    kept = {row["event_id"] for row in reachable}
    there = select(events.c.id, events.c.sequence).where(events.c.id.in_(kept)).with_for_update()
    sequences = {event.id: event.sequence for event in tx.connection.execute(there)}
    done = _on_their_way(tx, replay, kept)
    rows = []
    for row in reachable:
        key = row["event_id"], row["endpoint_id"]
        if row["state"] != "pending" and row["event_id"] in sequences and key not in done:
            done.add(key)
            rows.append(_new_row(tx, replay, row))
    _put_in_order(tx, rows, rows_of, sequences)
    if rows:
        supersede(tx, rows)
        tx.connection.execute(insert(deliveries), rows)
    tx.due.add("redeliver")
    return len(forward) + len(rows)


def _bring_forward(tx: Transaction, replay: Row, ids: Sequence[str]) -> None:
    free = and_(columns.id.in_(ids), columns.lease_until.is_(None), columns.due_at.is_not(None))
    values: dict[Any, Any] = {
        columns.replay_id: func.coalesce(columns.replay_id, replay["id"]),
        columns.due_at: tx.now,
        columns.attempts: 0,
        columns.planned_at: None,
    }
    tx.connection.execute(update(deliveries).where(free).values(values))


def _on_their_way(tx: Transaction, replay: Row, event_ids: set[str]) -> set[tuple[str, str | None]]:
    """Events and endpoints that need no new delivery: what is delivered or pending, or, if the
    replay repeats delivered ones, what it has made itself.
    """
    made = columns.replay_id == replay["id"]
    reached = made if replay["only"] == "all" else or_(made, columns.state != "dead")
    statement = select(columns.event_id, columns.endpoint_id)
    found = tx.connection.execute(statement.where(columns.event_id.in_(event_ids), reached))
    return {(row.event_id, row.endpoint_id) for row in found}


def _put_in_order(
    tx: Transaction,
    rows: list[dict[str, Any]],
    endpoints: Mapping[str, EndpointRow | None],
    sequences: Mapping[str, int],
) -> None:
    """Gives new deliveries the keys of their endpoints' present options. A key of former options
    would let them pass by the events of their task or value that wait now.
    """
    for id, endpoint in endpoints.items():
        mine = [row for row in rows if row["endpoint_id"] == id]
        options = endpoint.options if endpoint is not None else None
        keys = order_keys(tx, options, [row["event_id"] for row in mine])
        for row in mine:
            if row["event_id"] in keys:
                row["order_key"] = keys[row["event_id"]]
                row["sequence"] = sequences[row["event_id"]]


def _new_row(tx: Transaction, replay: Row, row: Row) -> dict[str, Any]:
    names = ("owner", "endpoint_id", "event_id", "task_id")
    copied = {name: row[name] for name in names} | {"order_key": None, "sequence": None}
    zero = dict.fromkeys(("attempts", "fence", "deaths", "faults"), 0)
    times = {"created_at": tx.now, "due_at": tx.now}
    more = {"id": tx.id("delivery"), "state": "pending", "replay_id": replay["id"]}
    return {**copied, **zero, **times, **more}
