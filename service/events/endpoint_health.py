"""The health of an endpoint: what its latest attempts say, and how it fails, is disabled and
recovers.
"""

from sqlalchemy import Connection, select

from service.db.paging import Row
from service.db.tables import attempts, events
from service.db.transaction import Transaction
from service.events import outbox
from service.events.endpoints import (
    HEALTH_MS,
    SAMPLE,
    DeliveryAttempt,
    EndpointRow,
    bring_forward,
    end_pending_deliveries,
    lock_endpoint,
    update_endpoint,
)
from service.ids import rfc3339
from service.strict_json import JSON

BUCKETS = 24  # of the chart
QUIET_MS = 60_000  # operators hear of a recovery at most once in so long


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


def recovered(tx: Transaction, endpoint: EndpointRow, *, tell: bool) -> None:
    """The endpoint takes deliveries again. The operators' event comes at most once a minute, so
    that an endpoint that fails now and then does not fill the outbox.
    """
    since, last = endpoint.failing_since, endpoint.recovered_at
    assert since is not None
    tell = tell and (last is None or not 0 <= tx.now - last < QUIET_MS)
    values = {"recovered_at": tx.now} if tell else {}
    update_endpoint(tx, endpoint.id, failing_since=None, **values)
    bring_forward(tx, endpoint)
    if tell:
        data: JSON = {"endpoint_id": endpoint.id, "failing_since": rfc3339(since)}
        data |= {"recovered_at": rfc3339(tx.now), "seconds": round((tx.now - since) / 1000, 1)}
        outbox.emit_operators(tx, "endpoint.recovered", data)


def disable(tx: Transaction, endpoint_id: str, reason: str) -> None:
    """Disables an endpoint: its pending deliveries are dead, and it gets no new ones."""
    values = {"disabled_at": tx.now, "disabled_reason": reason}
    update_endpoint(tx, endpoint_id, status="disabled", status_since=tx.now, **values)
    end_pending_deliveries(tx, endpoint_id)
    data = {"endpoint_id": endpoint_id, "reason": reason, "disabled_at": rfc3339(tx.now)}
    outbox.emit_operators(tx, "endpoint.disabled", data)


def type_of(tx: Transaction, row: Row) -> str | None:
    return tx.connection.scalar(select(events.c.type).where(events.c.id == row["event_id"]))


def recent_attempts(connection: Connection, endpoint_id: str, now: int) -> list[Row]:
    """The latest attempts of an endpoint within 24 hours, at most `SAMPLE`."""
    columns = attempts.c
    mine = (columns.endpoint_id == endpoint_id, columns.time >= now - HEALTH_MS)
    statement = select(columns.time, columns.error, columns.duration_ms).where(*mine)
    statement = statement.order_by(columns.time.desc()).limit(SAMPLE)
    return list(connection.execute(statement).mappings())


def health_document(rows: list[Row], now: int) -> JSON:
    """Figures of the attempts, and counts for each hour, the oldest first."""
    start, width = now - HEALTH_MS, HEALTH_MS // BUCKETS
    hours = [{"time": rfc3339(start + i * width), "ok": 0, "failed": 0} for i in range(BUCKETS)]
    for row in rows:
        hour = hours[max(0, min((row["time"] - start) // width, BUCKETS - 1))]
        hour["ok" if row["error"] is None else "failed"] += 1
    times = sorted(row["duration_ms"] for row in rows)
    good = sum(row["error"] is None for row in rows)
    return {
        "attempts": len(rows),
        "success_rate": round(good / len(rows), 4) if rows else None,
        "p50_ms": quantile(times, 0.5),
        "p95_ms": quantile(times, 0.95),
        "hours": hours,
    }


def quantile(ordered: list[int], share: float) -> int | None:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None
