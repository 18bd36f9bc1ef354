"""Failures of deliveries: their causes, and groups of them by endpoint and cause.

A delivery has a cause from its first failed attempt until the endpoint has its event.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, and_, func, select, update

from service.db.paging import Row, matching
from service.db.tables import deliveries
from service.db.transaction import Transaction

GROUPED = 20_000  # of the latest failures, in groups
CAUSE_CHARS = 64
CAUSES = {
    "CallTimedOut": "timed out",
    "ConnectionLost": "connection lost",
    "NotConnected": "not connected",
    "NoRoute": "no route",
    "NoPlace": "too many connections",
    "EgressRefused": "address refused",
}
SETTLED = {"cause": None, "failed_since": None, "failed_at": None}
columns = deliveries.c


def cause_of(status: int | None, error: str | None) -> str:
    """A short text without what differs between attempts: `answered 503`, `timed out`."""
    if status is not None:
        return f"answered {status}"
    kind = (error or "unknown").partition(":")[0]
    return CAUSES.get(kind, kind)[:CAUSE_CHARS]


def failed(row: Row, cause: str, now: int) -> dict[str, Any]:
    since = row["failed_since"] if row["cause"] == cause else None
    return {"cause": cause, "failed_at": now, "failed_since": now if since is None else since}


def after(
    tx: Transaction, row: Row, result: str, status: int | None, error: str | None
) -> dict[str, Any]:
    """The columns after an attempt, or after an end without one: `status` and `error` are None."""
    if result == "delivered":
        if row["replay_id"] is not None or row["cause"] is not None:
            supersede(tx, [row])
        return {**SETTLED, "last_status": status}
    if status is not None or error is not None:
        return {**failed(row, cause_of(status, error), tx.now), "last_status": status}
    return failed(row, "nothing to send", tx.now) if result == "dead" else {}


def ended(now: int, cause: str) -> dict[Any, Any]:
    """The columns of deliveries that end without an attempt. An earlier cause stays."""
    return {
        columns.state: "dead",
        columns.finished_at: now,
        columns.due_at: None,
        columns.cause: func.coalesce(columns.cause, cause),
        columns.failed_since: func.coalesce(columns.failed_since, now),
        columns.failed_at: func.coalesce(columns.failed_at, now),
    }


def failure_groups(connection: Connection, owner: str | None, endpoint: str | None) -> list[Row]:
    """Groups of the latest failures by endpoint and cause, the last seen first. The partial indexes
    over failures have all columns that this reads.
    """
    names = ("endpoint_id", "cause", "failed_since", "failed_at")
    chosen = select(*(columns[name] for name in names)).where(columns.cause.is_not(None))
    chosen = matching(chosen, deliveries, owner=owner, endpoint_id=endpoint)
    latest = chosen.order_by(columns.failed_at.desc()).limit(GROUPED).subquery()
    key = latest.c.endpoint_id, latest.c.cause
    last = func.max(latest.c.failed_at).label("last_seen")
    statement = select(
        latest.c.endpoint_id.label("endpoint"),
        latest.c.cause,
        func.count().label("count"),
        func.min(latest.c.failed_since).label("first_seen"),
        last,
    )
    statement = statement.group_by(*key).order_by(last.desc(), *key)
    return list(connection.execute(statement).mappings())


def supersede(tx: Transaction, rows: Sequence[Row]) -> None:
    """Dead deliveries of the same events and endpoints count no more: these stand for them."""
    for endpoint_id in {row["endpoint_id"] for row in rows}:
        ids = [row["event_id"] for row in rows if row["endpoint_id"] == endpoint_id]
        same = columns.endpoint_id.is_not_distinct_from(endpoint_id)
        dead = and_(columns.event_id.in_(ids), same, columns.state == "dead")
        tx.connection.execute(update(deliveries).where(dead).values(SETTLED))
