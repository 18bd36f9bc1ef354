"""Replays of the deliveries that match a filter, of any endpoint.

A dead delivery's event is delivered anew, unless the endpoint has it by now. One that waits for its
retry is due now. A delivered one is sent again. The pages go by the time of creation up to the
start of the replay, so that a replay ends.
"""

from collections.abc import Collection, Mapping, Sequence
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
from service.events.feed import type_conditions
from service.strict_json import JSON

MOST = 100_000  # deliveries of one replay
NAMES = ("id", "event_id", "endpoint_id", "task_id", "owner", "created_at", "state")
columns = deliveries.c


@dataclass(frozen=True, slots=True)
class DeliveryFilter:
    """`state` None: deliveries that failed and have not arrived since, whether they are dead or are
    retried. `error`: their cause. `status`: of the last response. `type`: an endpoint's pattern.
    Times are milliseconds.
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
    clauses = paging.conditions(
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
        clauses.append(columns.cause.is_not(None))
    if wanted.type is not None:
        named = and_(events.c.id == columns.event_id, type_conditions([wanted.type]))
        clauses.append(exists().where(named))
    return clauses


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
    sequences = lock_events(tx, {row["event_id"] for row in reachable})
    done, rows = on_their_way(tx, replay, sequences), []
    for row in reachable:
        key = row["event_id"], row["endpoint_id"]
        if row["state"] != "pending" and row["event_id"] in sequences and key not in done:
            done.add(key)
            names = ("owner", "endpoint_id", "event_id", "task_id")
            rows.append({name: row[name] for name in names})
    insert_deliveries(tx, replay, rows, rows_of, sequences)
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


def lock_events(tx: Transaction, ids: Collection[str]) -> dict[str, int]:
    """The sequences of the events that retention has not deleted. Locks them until the commit."""
    there = select(events.c.id, events.c.sequence).where(events.c.id.in_(ids)).with_for_update()
    return {event.id: event.sequence for event in tx.connection.execute(there)}


def on_their_way(
    tx: Transaction, replay: Row, event_ids: Collection[str]
) -> set[tuple[str, str | None]]:
    """Events and endpoints that need no new delivery: what is delivered or pending, or, if the
    replay repeats delivered ones, what it has made itself.
    """
    own = columns.replay_id == replay["id"]
    reached = own if replay["only"] == "all" else or_(own, columns.state != "dead")
    statement = select(columns.event_id, columns.endpoint_id)
    rows = tx.connection.execute(statement.where(columns.event_id.in_(event_ids), reached))
    return {(row.event_id, row.endpoint_id) for row in rows}


def insert_deliveries(
    tx: Transaction,
    replay: Row,
    wanted: Sequence[JSON],
    endpoints: Mapping[str, EndpointRow | None],
    sequences: Mapping[str, int],
) -> None:
    """Inserts deliveries of a replay, with the keys of their endpoints' present options. A key of
    former options would let them pass by the events of their task or value that wait now.
    """
    keys: dict[tuple[str, str], str] = {}
    for id, endpoint in endpoints.items():
        mine = [row["event_id"] for row in wanted if row["endpoint_id"] == id]
        by_event = order_keys(tx, endpoint.options if endpoint else None, mine)
        keys |= {(id, event_id): key for event_id, key in by_event.items()}
    rows = []
    for row in wanted:
        key = keys.get((row["endpoint_id"], row["event_id"]))
        order: JSON = {"order_key": key, "sequence": sequences[row["event_id"]] if key else None}
        zero = dict.fromkeys(("attempts", "fence", "deaths", "faults"), 0)
        new = {"id": tx.id("delivery"), "state": "pending", "replay_id": replay["id"]}
        rows.append({**row, **new, **order, **zero, "created_at": tx.now, "due_at": tx.now})
    if rows:
        supersede(tx, rows)
        tx.connection.execute(insert(deliveries), rows)
    tx.due.add("redeliver")
