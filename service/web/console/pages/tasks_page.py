"""The list of tasks. Every filter is in the URL."""

from collections.abc import Iterable, Mapping
from typing import Any

from starlette.responses import Response

from service.tasks.state import State
from service.web.console.visits import View, Visit

PAGE = 50
NAMES = ("state", "model", "owner", "error", "prompt", "cursor", "since", "until")
STATES = tuple(state.value for state in State)
PERIOD = (
    {"name": "since", "label": "Since (UTC)", "type": "datetime-local"},
    {"name": "until", "label": "Until (UTC)", "type": "datetime-local"},
)


def filter_fields(*, admin: bool) -> list[dict[str, Any]]:
    """The filter form."""
    return [
        {"name": "prompt", "label": "Text of your prompts"},
        {"name": "state", "label": "State", "options": STATES},
        {"name": "model", "label": "Model"},
        *([{"name": "owner", "label": "Owner"}] if admin else []),
        {"name": "error", "label": "Error code"},
        {"name": "key", "label": "Metadata name"},
        {"name": "value", "label": "Metadata value"},
        *PERIOD,
    ]


def utc(text: str | None) -> str | None:
    """The text of a field for a time, as RFC 3339. It has no offset."""
    if not text or text.endswith("Z") or "+" in text:
        return text or None
    return f"{text}:00Z" if len(text) == len("2026-01-01T00:00") else f"{text}Z"


def chosen(names: Iterable[str], values: Mapping[str, str]) -> dict[str, Any]:
    """What a query or a form gives of a filter."""
    given: dict[str, Any] = {name: values[name] for name in names if values.get(name)}
    return given | {name: utc(given[name]) for name in ("since", "until") if name in given}


async def tasks(visit: Visit) -> Response:
    query = visit.query
    wanted = chosen(NAMES, query)
    if query.get("key"):
        wanted[f"metadata.{query['key']}"] = query.get("value", "")
    admin = "admin" in visit.caller.scopes
    found, error = await visit.list_of("GET /v1/tasks", {**wanted, "limit": PAGE})
    return visit.render(
        "tasks.html",
        tasks=found["data"],
        cursor=found["next_cursor"],
        fields=filter_fields(admin=admin),
        admin=admin,
        error=error,
    )


VIEWS = (View("GET /console/tasks", tasks, "read", "Tasks", "tasks"),)
