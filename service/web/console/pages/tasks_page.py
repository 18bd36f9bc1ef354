"""The list of tasks, and a task: what happened, what it cost, and the acts on it."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from starlette.responses import Response

from service.errors import ApiError
from service.strict_json import JSON
from service.tasks.state import TERMINAL, State
from service.web.console.task_drawing import difference, offsets, state_drawing, timeline_drawing
from service.web.console.visits import View, Visit

TASK = "/console/tasks/{task_id}"
STEPS, BODY, RAW = 150, 4000, 2000  # shown on a page, so that it stays small
PAGE = 50
NAMES = ("state", "model", "owner", "error", "prompt", "cursor", "since", "until")
STATES = tuple(state.value for state in State)
PERIOD = (
    {"name": "since", "label": "Since (UTC)", "type": "datetime-local"},
    {"name": "until", "label": "Until (UTC)", "type": "datetime-local"},
)

# The acts. Each has its label, the question, what will happen, what was done.
ACTS: Mapping[str, tuple[str, str, str, str]] = {
    "cancel": (
        "Cancel",
        "Cancel this task?",
        """The service ends the task now and deletes what it has downloaded so far. Subscribers get
        image.task.cancelled. The upstream cannot be told: it may still finish and charge the
        task, and the service records that cost.""",
        "The task is cancelled.",
    ),
    "reconcile": (
        "Reconcile",
        "Query the upstream now?",
        """The service asks the upstream for the task's state and fetches missing pictures again,
        also lost ones. That costs no credits. A task that has ended keeps its state and event.""",
        "The upstream is asked now.",
    ),
    "resolve": (
        "Resolve",
        "Settle this submission by hand?",
        """It is not known whether the upstream accepted the submission. Look there first. With an
        id, the service takes that task over. Failed ends the task. Submit again may pay twice.""",
        "The submission is settled.",
    ),
    "erase": (
        "Erase",
        "Erase what this task contains?",
        """The prompt, the metadata, the pictures, the bodies of callbacks and the content of events
        are deleted for good. Links to the pictures answer 410. Figures and costs stay.""",
        "The task is erased.",
    ),
}


def filter_fields(*, admin: bool) -> list[dict[str, Any]]:
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
    return text if not text or text.endswith("Z") or "+" in text else f"{text}Z"


def chosen(names: Iterable[str], values: Mapping[str, str]) -> dict[str, Any]:
    """What a query or a form gives of a filter."""
    filters: dict[str, Any] = {name: values[name] for name in names if values.get(name)}
    return filters | {name: utc(filters[name]) for name in ("since", "until") if name in filters}


async def tasks(visit: Visit) -> Response:
    query = visit.query
    filters = chosen(NAMES, query)
    if query.get("key"):
        filters[f"metadata.{query['key']}"] = query.get("value", "")
    admin = "admin" in visit.caller.scopes
    page, error = await visit.list_of("GET /v1/tasks", {**filters, "limit": PAGE})
    fields = filter_fields(admin=admin)
    return visit.render("tasks.html", error=error, page=page, fields=fields, admin=admin)


async def optional(
    visit: Visit, operation: str, query: JSON | None = None, **path: str
) -> list[JSON]:
    """The rows of a list, none if the key lacks its scope."""
    try:
        rows: list[JSON] = (await visit.call(operation, query, **path))["data"]
    except ApiError:
        return []
    return rows


def acts_of(visit: Visit, task: JSON) -> list[tuple[str, str]]:
    admin, submits, state = visit.caller.has(()), visit.caller.has(["submit"]), State(task["state"])
    unnamed = state in (State.UNCERTAIN, State.FAILED) and not task["upstream_id"]
    may = {
        "cancel": submits and state not in TERMINAL,
        "reconcile": admin and bool(task["upstream_id"]),
        "resolve": admin and unnamed and task["erased_at"] is None,
        "erase": submits and state in TERMINAL and task["erased_at"] is None,
    }
    return [(name, ACTS[name][0]) for name, allowed in may.items() if allowed]


def cut(text: str | None, most: int = BODY) -> str | None:
    if text is None or len(text) <= most:
        return text
    return f"{text[:most]}\n… {len(text) - most} more characters"


def pretty(body: str | None) -> str | None:
    try:
        return cut(json.dumps(json.loads(body or ""), indent=2, ensure_ascii=False))
    except (ValueError, RecursionError):
        return cut(body)


async def task(visit: Visit) -> Response:
    id = visit.path("task_id")
    task = await visit.call("GET /v1/tasks/{task_id}", task_id=id)
    if "state" not in task:  # a task that only the upstream knows
        raise ApiError(404, "not_found", "no task of yours has that id")
    id = task["id"]
    steps = await optional(visit, "GET /v1/tasks/{task_id}/timeline", task_id=id)
    calls = await optional(visit, "GET /v1/tasks/{task_id}/callbacks", task_id=id)
    sent = await optional(visit, "GET /v1/deliveries", {"task": id, "limit": 20})
    entries = await optional(visit, "GET /v1/ledger", {"task": id, "limit": 50})
    shown = steps[-STEPS:]
    first = next((each for each in calls if each["verdict"] != "conflict" and each["body"]), None)
    conflicts = [
        (each, difference(first["body"], each["body"]))
        for each in calls
        if each["verdict"] == "conflict" and first is not None
    ]
    return visit.render(
        "task.html",
        task=task,
        steps=list(zip(offsets(shown), shown, strict=True)) if shown else [],
        more=len(steps) - len(shown),
        drawing=timeline_drawing(shown) if shown else None,
        machine=state_drawing(task["state"]),
        callbacks=[
            each | {"body": pretty(each["body"]), "raw": cut(each["body"], RAW)}
            for each in calls[:8]
        ],
        callback_count=len(calls),
        first=first,
        conflicts=conflicts[:3],
        deliveries=sent,
        ledger=entries,
        acts=acts_of(visit, task),
        request=pretty(json.dumps(task["request"])),
    )


async def ask(visit: Visit, error: ApiError | None = None) -> Response:
    name, texts = visit.act(ACTS)
    task = await visit.call("GET /v1/tasks/{task_id}", task_id=visit.path("task_id"))
    return visit.render("task_act.html", error=error, task=task, name=name, act=texts)


async def act(visit: Visit) -> Response:
    id, (name, texts) = visit.path("task_id"), visit.act(ACTS)
    method, path = ("DELETE", "") if name == "erase" else ("POST", f"/{name}")
    outcome, body = visit.form.get("outcome"), None
    if name == "resolve":
        decided = outcome in ("failed", "resubmit")
        body = {"as": outcome} if decided else {"upstream_id": visit.form.get("upstream_id")}
    try:
        await visit.call(f"{method} /v1/tasks/{{task_id}}{path}", body=body, task_id=id)
    except ApiError as error:
        return await ask(visit, error)
    return visit.redirect(TASK.format(task_id=id), texts[3])


VIEWS = (
    View("GET /console/tasks", tasks, "read", "Tasks", "tasks"),
    View(f"GET {TASK}", task, "read"),
    View(f"GET {TASK}/{{act}}", ask, "submit"),
    View(f"POST {TASK}/{{act}}", act, "submit"),
)
