"""Events, deliveries and replays as their readers get them (docs/api.md)."""

from collections.abc import Mapping, Sequence

from service.db.paging import Row
from service.ids import rfc3339, rfc3339_or_none, sequence_text
from service.links import Links, with_links
from service.strict_json import JSON


def event_document(row: Row, links: Links) -> JSON:
    """An event from its row, as a structured CloudEvent 1.0.

    Links are made now, so that they follow the settings. An event without a task has the endpoint,
    the row or the upstream that it names as its subject, or `submission`, because CloudEvents
    libraries refuse a null subject.
    """
    data = row["data"]
    named = (data[name] for name in ("endpoint_id", "key", "upstream", "owner") if data.get(name))
    return {
        "specversion": "1.0",
        "id": row["id"],
        "source": links.base_url,
        "type": row["type"],
        "subject": row["task_id"] or next(named, row["type"].partition(".")[0]),
        "time": rfc3339(row["time"]),
        "datacontenttype": "application/json",
        "sequence": sequence_text(row["sequence"]),
        **({"traceparent": traceparent} if (traceparent := row.get("traceparent")) else {}),
        "data": with_links(data, links) if "images" in data else data,
    }


def type_matches(pattern: str, type: str) -> bool:
    """Whether an endpoint's pattern (`*`, `image.task.*` or a type itself) takes an event type."""
    return pattern in ("*", type) or (pattern.endswith(".*") and type.startswith(pattern[:-1]))


def delivery_document(row: Row, attempts: Sequence[Row], *, answers: bool) -> JSON:
    """A delivery as clients see it. `answers`: with the start of the subscriber's responses."""
    next_attempt_at = row["due_at"] if row["state"] == "pending" else None
    return {
        "id": row["id"],
        "endpoint": row["endpoint_id"],
        "event": row["event_id"],
        "type": row["type"],
        "task": row["task_id"],
        "state": row["state"],
        "cause": row["cause"],
        "created_at": rfc3339(row["created_at"]),
        "next_attempt_at": rfc3339_or_none(next_attempt_at),
        "attempts": [attempt_document(attempt, answers=answers) for attempt in attempts],
    }


def attempt_document(attempt: Row, *, answers: bool) -> JSON:
    return {
        "id": attempt["id"],
        "time": rfc3339(attempt["time"]),
        **{name: attempt[name] for name in ("status", "duration_ms", "error")},
        "answer": (attempt["answer"] or b"").decode("utf-8", "replace") if answers else None,
    }


def replay_document(row: Row, states: Mapping[str, int]) -> JSON:
    """A replay as clients see it. `states` counts its deliveries by state."""
    return {
        "id": row["id"],
        "endpoint": row["endpoint_id"] or None,
        "filter": row["filter"] and filter_document(row["filter"]),
        "state": row["state"],
        "since": rfc3339(row["since_at"]),
        "until": rfc3339(row["until_at"]),
        "types": row["types"],
        "only": "undelivered" if row["pending"] else row["only"],
        **{name: row[name] for name in ("count", "made")},
        **{state: states.get(state, 0) for state in ("pending", "delivered", "dead")},
        "created_at": rfc3339(row["created_at"]),
        "finished_at": rfc3339_or_none(row["finished_at"]),
    }


def filter_document(row: Row) -> JSON:
    times = {name: rfc3339_or_none(row[name]) for name in ("since", "until")}
    return {**{name: row[name] for name in row if name != "owner"}, **times}
