"""Events as readers get them."""

from service.ids import rfc3339, sequence_text
from service.links import Links, with_links
from service.strict_json import JSON


def event_document(
    *,
    event_id: str,
    sequence: int,
    type: str,
    subject: str | None,
    time: int,
    data: JSON,
    links: Links,
) -> JSON:
    """An event of contract section 3, a structured CloudEvent 1.0; `data` as the outbox keeps it.

    One of no task is about the endpoint or the row that it names: CloudEvents' libraries refuse a
    subject that is null.
    """
    return {
        "specversion": "1.0",
        "id": event_id,
        "source": links.base_url,
        "type": type,
        "subject": subject or data.get("endpoint_id") or data["key"],
        "time": rfc3339(time),
        "datacontenttype": "application/json",
        "sequence": sequence_text(sequence),
        "data": with_links(data, links) if "images" in data else data,
    }


def type_matches(pattern: str, type: str) -> bool:
    """Whether an endpoint's pattern (`*`, `image.task.*`, or a type itself) takes an event type."""
    if pattern in ("*", type):
        return True
    return pattern.endswith(".*") and type.startswith(pattern[:-1])
