"""The list of tasks. Every filter is in the URL."""

from typing import Any

from starlette.responses import Response

from service.errors import ApiError
from service.tasks.state import State
from service.web.console.visits import View, Visit

PAGE = 50
NAMES = ("state", "model", "owner", "error", "prompt", "cursor")
STATES = tuple(state.value for state in State)


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
        {"name": "since", "label": "Since (UTC)", "type": "datetime-local"},
        {"name": "until", "label": "Until (UTC)", "type": "datetime-local"},
    ]


def utc(text: str | None) -> str | None:
    """The text of a field for a time, as RFC 3339. It has no offset."""
    if not text or text.endswith("Z") or "+" in text:
        return text or None
    return f"{text}:00Z" if len(text) == len("2026-01-01T00:00") else f"{text}Z"


async def tasks(visit: Visit) -> Response:
    query = visit.query
    wanted = {name: query.get(name) for name in NAMES}
    wanted |= {name: utc(query.get(name)) for name in ("since", "until")}
    if query.get("key"):
        wanted[f"metadata.{query['key']}"] = query.get("value", "")
    admin, error = "admin" in visit.caller.scopes, None
    try:
        found = await visit.call("GET /v1/tasks", {**wanted, "limit": PAGE})
    except ApiError as refused:
        error, found = str(refused), {"data": [], "next_cursor": None}
    return visit.render(
        "tasks.html",
        400 if error else 200,
        tasks=found["data"],
        cursor=found["next_cursor"],
        fields=filter_fields(admin=admin),
        admin=admin,
        error=error,
    )


VIEWS = (View("GET /console/tasks", tasks, "read", "Tasks", "tasks"),)
