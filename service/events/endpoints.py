"""Endpoints: rows, changes, what attempts do to them, and the deliveries that wait for them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from sqlalchemy import Connection, Update, case, delete, func, insert, select, update

from service.db.paging import Row, Selection, matching, page
from service.db.tables import ZERO, counters, deliveries, endpoints, events
from service.db.transaction import Transaction, one_by_one
from service.events import failures, outbox
from service.events.endpoint_health import success_rate
from service.ids import rfc3339
from service.strict_json import JSON

# Waiting deliveries that are due at once when their endpoint works again, and then for each of them
# that is delivered.
FORWARD, MORE = 1000, 2
MAX_ENDPOINTS = 100  # of one owner
QUIET_MS = 60_000  # an endpoint recovers at most once in so long


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


def endpoint_row(connection: Connection, id: str, owner: str | None) -> Row | None:
    statement = matching(select(endpoints), endpoints, id=id, owner=owner)
    return connection.execute(statement).mappings().first()


def endpoint_view(connection: Connection, id: str, owner: str | None, now: int) -> Row | None:
    """The row with its `success_rate`."""
    statement = matching(select(endpoints, success_rate(now)), endpoints, id=id, owner=owner)
    return connection.execute(statement).mappings().first()


def endpoint_list(connection: Connection, wanted: Selection, *, now: int) -> list[Row]:
    """Rows with their `success_rate`."""
    statement = page(select(endpoints, success_rate(now)), endpoints, wanted)
    return list(connection.execute(statement).mappings())


def update_endpoint(tx: Transaction, endpoint_id: str, **values: Any) -> None:
    if values:
        tx.connection.execute(update(endpoints).where(endpoints.c.id == endpoint_id).values(values))


def disable(tx: Transaction, endpoint_id: str, reason: str) -> None:
    """Disables an endpoint: its pending deliveries are dead, and it gets no new ones."""
    values = {"disabled_at": tx.now, "disabled_reason": reason}
    update_endpoint(tx, endpoint_id, status="disabled", status_since=tx.now, **values)
    end_pending_deliveries(tx, endpoint_id)
    data = {"endpoint_id": endpoint_id, "reason": reason, "disabled_at": rfc3339(tx.now)}
    outbox.emit_operators(tx, "endpoint.disabled", data)


def recovered(tx: Transaction, endpoint: EndpointRow, *, tell: bool) -> None:
    """The endpoint takes deliveries again. The operators' event comes at most once a minute, so
    that an endpoint that fails now and then does not fill the outbox.
    """
    since, last = endpoint.failing_since, endpoint.recovered_at
    assert since is not None
    tell = tell and (last is None or not 0 <= tx.now - last < QUIET_MS)
    told = {"recovered_at": tx.now} if tell else {}
    update_endpoint(tx, endpoint.id, failing_since=None, **told)
    bring_forward(tx, endpoint)
    if tell:
        data: JSON = {"endpoint_id": endpoint.id, "failing_since": rfc3339(since)}
        data |= {"recovered_at": rfc3339(tx.now), "seconds": round((tx.now - since) / 1000, 1)}
        outbox.emit_operators(tx, "endpoint.recovered", data)


def end_pending_deliveries(tx: Transaction, endpoint_id: str) -> None:
    values = failures.ended(tx.now, "endpoint disabled")
    tx.connection.execute(_pending(endpoint_id).values(values))


def _release_held_deliveries(tx: Transaction, endpoint_id: str) -> None:
    """Makes due what was held while the endpoint was paused."""
    held = _pending(endpoint_id).where(deliveries.c.due_at.is_(None))
    tx.connection.execute(held.values(due_at=tx.now))
    tx.due.update(("deliver", "redeliver"))


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


def type_of(tx: Transaction, row: Row) -> str | None:
    """The type of a delivery's event."""
    return tx.connection.scalar(select(events.c.type).where(events.c.id == row["event_id"]))


def note_attempt(
    tx: Transaction,
    row: Row,
    result: str,
    attempt: DeliveryAttempt,
    disable_after_ms: int = 0,
    *,
    manual: bool = False,
    more: bool = False,
) -> None:
    """Notes success and failure of a delivery on its endpoint. Disables it after 410, or when every
    attempt has failed for `disable_after_ms`. A failed manual attempt does not start that time.

    The first success after failures brings waiting deliveries forward. Each of them that succeeds
    brings `more` of them.
    """
    endpoint = lock_endpoint(tx, endpoint_id := row["endpoint_id"])
    if endpoint is None or endpoint.status == "disabled":
        return
    if attempt.url not in (None, endpoint.url):
        return
    if result == "delivered":
        if endpoint.failing_since is not None:
            recovered(tx, endpoint, tell=type_of(tx, row) != "endpoint.recovered")
        elif more:
            bring_forward(tx, endpoint, more=True)
        return
    since = endpoint.failing_since
    values = {"failing_since": tx.now} if since is None and not manual else {}
    if attempt.pause_ms:
        values["paused_until"] = max(tx.now + attempt.pause_ms, endpoint.paused_until or 0)
    update_endpoint(tx, endpoint_id, **values)
    if result == "gone":
        disable(tx, endpoint_id, "the endpoint answered 410 Gone")
    elif since is not None and tx.now - since >= disable_after_ms > 0:
        disable(tx, endpoint_id, f"every attempt failed since {rfc3339(since)}")


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


def _ask_again_for_times(tx: Transaction, endpoint_id: str) -> None:
    """Makes the deliveries due that wait for a time of the endpoint's former rate."""
    waiting = update(deliveries).where(
        deliveries.c.endpoint_id == endpoint_id,
        deliveries.c.state == "pending",
        deliveries.c.slot_at > tx.now,
    )
    tx.connection.execute(waiting.values(slot_at=None, due_at=tx.now))
    tx.due.update(("deliver", "redeliver"))


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
            _ask_again_for_times(tx, item.id)
    if item.headers is not None:
        values["headers"] = item.headers or None
    status = item.status if item.status != row.status else None
    if status is not None:
        values |= {"status": status, "status_since": tx.now}
        values |= {"disabled_at": None, "disabled_reason": None}
    if status == "enabled" or item.url not in (None, row.url):  # failures of the old URL
        values |= {"failing_since": None, "paused_until": None}
    if status == "enabled":
        _release_held_deliveries(tx, item.id)
    if status == "disabled":
        values |= {"disabled_at": tx.now, "disabled_reason": "by its owner"}
        end_pending_deliveries(tx, item.id)
    update_endpoint(tx, item.id, **values)
    if "failing_since" in values:
        bring_forward(tx, replace(row, paused_until=None))
    return True
