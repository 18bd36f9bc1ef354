"""Endpoints: rows, changes, and the deliveries that wait for them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from sqlalchemy import Connection, Label, Update, case, delete, func, insert, select, update

from service.db.paging import Row, Selection, matching, page
from service.db.tables import ZERO, attempts, counters, deliveries, endpoints
from service.db.transaction import Transaction, one_by_one
from service.events import failures
from service.strict_json import JSON

# Waiting deliveries that are due at once when their endpoint works again, and then for each of them
# that is delivered.
FORWARD, MORE = 1000, 2
MAX_ENDPOINTS = 100  # of one owner
HEALTH_MS, SAMPLE = 24 * 3_600_000, 500  # the attempts that count for the success rate


@dataclass(frozen=True, slots=True)
class EndpointRow:
    """The columns that decide about deliveries and replays. `owner` None: all owners' events."""

    id: str
    owner: str | None
    url: str
    types: Sequence[str]
    status: str  # enabled | paused | disabled
    created_at: int
    failing_since: int | None  # every attempt has failed since
    paused_until: int | None  # asked for by Retry-After
    recovered_at: int | None  # of the last `endpoint.recovered`
    options: JSON | None  # see `endpoint_options.py`


@dataclass(frozen=True, slots=True)
class DeliveryAttempt:
    """One request to a subscriber. `status` None: no response came, and `error` says why.

    `ours`: the fault is on this side and says nothing about the subscriber. `pause_ms`: how long
    the response's Retry-After pauses the endpoint. `url`: where the request went. The response of
    an old address is not counted against the endpoint's new one.
    """

    id: str
    status: int | None
    duration_ms: int
    error: str | None
    answer: bytes = b""  # the first 2 KiB of the response
    ours: bool = False
    pause_ms: int = 0
    url: str | None = None


COLUMNS = [endpoints.c[field.name] for field in fields(EndpointRow)]


def lock_endpoint(tx: Transaction, id: str, owner: str | None = None) -> EndpointRow | None:
    """Locks an endpoint's row. `owner` None: any owner's (admin).

    The row of another owner is not locked, because the time of the wait would tell that it exists.
    """
    statement = matching(select(*COLUMNS), endpoints, id=id, owner=owner)
    row = tx.connection.execute(statement.with_for_update()).first()
    return EndpointRow(*row) if row is not None else None


def success_rate(now: int) -> Label[float | None]:
    """The column `success_rate` of endpoints: the share of the same attempts that succeeded."""
    mine = (attempts.c.endpoint_id == endpoints.c.id, attempts.c.time >= now - HEALTH_MS)
    share = case((attempts.c.error.is_(None), 1.0), else_=0.0)
    latest = select(share.label("good")).where(*mine).order_by(attempts.c.time.desc()).limit(SAMPLE)
    sample = latest.correlate(endpoints).subquery()
    return select(func.avg(sample.c.good)).scalar_subquery().label("success_rate")


def endpoint_row(connection: Connection, id: str, owner: str | None) -> Row | None:
    statement = matching(select(endpoints), endpoints, id=id, owner=owner)
    return connection.execute(statement).mappings().first()


def endpoint_view(connection: Connection, id: str, owner: str | None, now: int) -> Row | None:
    statement = matching(select(endpoints, success_rate(now)), endpoints, id=id, owner=owner)
    return connection.execute(statement).mappings().first()


def endpoint_list(connection: Connection, wanted: Selection, *, now: int) -> list[Row]:
    statement = page(select(endpoints, success_rate(now)), endpoints, wanted)
    return list(connection.execute(statement).mappings())


def update_endpoint(tx: Transaction, endpoint_id: str, **values: Any) -> None:
    if values:
        tx.connection.execute(update(endpoints).where(endpoints.c.id == endpoint_id).values(values))


def end_pending_deliveries(tx: Transaction, endpoint_id: str) -> None:
    values = failures.ended(tx.now, "endpoint disabled")
    tx.connection.execute(_pending(endpoint_id).values(values))


def bring_forward(tx: Transaction, endpoint: EndpointRow, *, more: bool = False) -> None:
    """The endpoint works again: deliveries that wait for it are due now, or when a pause that it
    asked for ends. Each that is delivered brings `more` of them.

    A delivery is brought forward once before each planned attempt. One that always fails would
    otherwise use up its schedule at the pace of the others' successes.
    """
    planned_at = deliveries.c.planned_at
    due_at, tried = deliveries.c.due_at, deliveries.c.attempts > ZERO
    soon = max(tx.now, endpoint.paused_until or 0)
    waiting = (
        select(deliveries.c.id)
        .where(
            deliveries.c.endpoint_id == endpoint.id,
            due_at > soon,
            deliveries.c.lease_until.is_(None),
            planned_at.is_(None) if more else func.coalesce(planned_at, ZERO) == ZERO,
        )
        .order_by(due_at)
        .limit(MORE if more else FORWARD)
        .with_for_update(skip_locked=True)
    )
    # Materialized: a plan that ran the subquery for each row would bring more than `limit` forward.
    due = waiting.cte("due").prefix_with("MATERIALIZED")
    values = {due_at: soon, planned_at: case((tried, due_at), else_=ZERO)}
    tx.connection.execute(
        update(deliveries).where(deliveries.c.id.in_(select(due.c.id))).values(values)
    )
    tx.due.update(("deliver", "redeliver"))


def _pending(endpoint_id: str) -> Update:
    mine = (deliveries.c.endpoint_id == endpoint_id, deliveries.c.state == "pending")
    return update(deliveries).where(*mine)


@dataclass(frozen=True, slots=True)
class NewEndpointRow:
    """An endpoint to insert, if its owner then has at most `most`. `secret` is encrypted."""

    id: str
    owner: str | None
    url: str
    types: Sequence[str]
    description: str
    secret: bytes
    options: JSON | None = None
    headers: bytes | None = None  # encrypted
    most: int = MAX_ENDPOINTS


@one_by_one
def insert_endpoints(tx: Transaction, item: NewEndpointRow) -> bool:
    """Inserts an endpoint. False: the owner has as many as it may have."""
    # Another transaction that inserts endpoints must not count at the same time.
    tx.connection.execute(select(counters).where(counters.c.name == "clock").with_for_update())
    owners = endpoints.c.owner.is_not_distinct_from(item.owner)
    ids = set(tx.connection.execute(select(endpoints.c.id).where(owners)).scalars())
    if item.id in ids or len(ids) >= item.most:
        return item.id in ids
    row = asdict(item)
    del row["most"]
    row |= {"status": "enabled", "status_since": tx.now, "created_at": tx.now}
    tx.connection.execute(insert(endpoints).values(row))
    return True


@dataclass(frozen=True, slots=True)
class EndpointChange:
    """New values for an endpoint, or its deletion. `owner` None: any owner's (admin)."""

    id: str
    owner: str | None
    url: str | None = None
    types: Sequence[str] | None = None
    description: str | None = None
    status: str | None = None  # enabled | paused | disabled
    delete: bool = False
    options: JSON | None = None  # the changed ones
    headers: bytes | None = None  # encrypted; empty: none


@one_by_one
def change_endpoints(tx: Transaction, item: EndpointChange) -> bool:
    """Changes an endpoint. False: this owner has no such endpoint."""
    row = lock_endpoint(tx, item.id, item.owner)
    if row is None:
        return False
    if item.delete:
        end_pending_deliveries(tx, item.id)
        tx.connection.execute(delete(endpoints).where(endpoints.c.id == item.id))
        return True
    named = {"url": item.url, "types": item.types, "description": item.description}
    values: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    if item.options:
        values["options"] = {**(row.options or {}), **item.options}
        if "rate_per_s" in item.options:
            values["slot_at"] = None
            # Deliveries that wait for a time of the former rate ask for another.
            waiting = _pending(item.id).where(deliveries.c.slot_at > tx.now)
            tx.connection.execute(waiting.values(slot_at=None, due_at=tx.now))
    if item.headers is not None:
        values["headers"] = item.headers or None
    status = item.status if item.status != row.status else None
    if status is not None:
        values |= {"status": status, "status_since": tx.now}
        values |= {"disabled_at": None, "disabled_reason": None}
    if status == "enabled" or item.url not in (None, row.url):  # failures of the old URL
        values |= {"failing_since": None, "paused_until": None}
    if status == "enabled":
        waiting = _pending(item.id).where(deliveries.c.due_at.is_(None))
        tx.connection.execute(waiting.values(due_at=tx.now))
    if status == "disabled":
        values |= {"disabled_at": tx.now, "disabled_reason": "by its owner"}
        end_pending_deliveries(tx, item.id)
    update_endpoint(tx, item.id, **values)
    if "failing_since" in values:
        bring_forward(tx, replace(row, paused_until=None))
    tx.due.update(("deliver", "redeliver"))
    return True
