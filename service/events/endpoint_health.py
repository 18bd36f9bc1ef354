"""The health of an endpoint: what its latest attempts say."""

from sqlalchemy import Connection, Float, Label, func, literal_column, select

from service.db.paging import Row
from service.db.tables import attempts, endpoints
from service.ids import rfc3339
from service.strict_json import JSON

HEALTH_MS, BUCKETS, SAMPLE = 24 * 3_600_000, 24, 500


def recent_attempts(connection: Connection, endpoint_id: str, now: int) -> list[Row]:
    """The latest attempts of an endpoint within 24 hours, at most `SAMPLE`."""
    columns = attempts.c
    mine = (columns.endpoint_id == endpoint_id, columns.time >= now - HEALTH_MS)
    statement = select(columns.time, columns.error, columns.duration_ms).where(*mine)
    statement = statement.order_by(columns.time.desc()).limit(SAMPLE)
    return list(connection.execute(statement).mappings())


def success_rate(now: int) -> Label[float | None]:
    """The column `success_rate` of endpoints: the share of the same attempts that succeeded."""
    mine = (attempts.c.endpoint_id == endpoints.c.id, attempts.c.time >= now - HEALTH_MS)
    share = literal_column("CASE WHEN error IS NULL THEN 1.0 ELSE 0.0 END", Float)
    latest = select(share.label("good")).where(*mine).order_by(attempts.c.time.desc()).limit(SAMPLE)
    sample = latest.correlate(endpoints).subquery()
    return select(func.avg(sample.c.good)).scalar_subquery().label("success_rate")


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
