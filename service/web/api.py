"""Tasks for clients: submitted, shown, listed, cancelled. The shape is the upstream's, so that its clients work here."""

import re

import structlog
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service import model
from service.errors import ApiError
from service.model import JSON
from service.pipeline.submit import attempted, ended, wait_for
from service.store import queries
from service.store.operations.tasks import Cancellation, cancel_tasks
from service.store.records import Row
from service.web.access import Caller
from service.web.bodies import make_cursor, query_limit, query_text, read_cursor, read_json
from service.web.context import Context, context_of

log = structlog.get_logger()

FIRST_OUTCOME_S = 10.0
MAX_WAIT_S = 120
IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")
UPSTREAM_ID = re.compile(r"[A-Za-z0-9._-]{1,200}")


def shown(context: Context, task: model.Task) -> JSON:
    document = model.with_links(model.task_document(task), context.resources.base_url)
    return {**document, "prompt": task.prompt}


def preferences(request: Request) -> tuple[float | None, str | None]:
    """Seconds to wait by `Prefer` (None: not asked), and what was applied; `wait` wins over `respond-async`."""
    wait, asynchronous = None, False
    for part in ",".join(request.headers.getlist("prefer")).split(","):
        name, _, value = part.strip().partition("=")
        if name.strip().lower() == "respond-async":
            asynchronous = True
        elif name.strip().lower() == "wait" and value.strip().strip('"').isascii() and value.strip().strip('"').isdigit():
            wait = min(int(value.strip().strip('"')[:9]), MAX_WAIT_S)
    if wait is not None:
        return float(wait), f"wait={wait}"
    return (0.0, "respond-async") if asynchronous else (None, None)


async def submit(request: Request) -> Response:
    context, caller = context_of(request), caller_of(request)
    key = request.headers.get("idempotency-key")
    if key is not None and not IDEMPOTENCY_KEY.fullmatch(key):
        message = "Idempotency-Key must be 1 to 255 visible ASCII characters"
        raise ApiError(400, "invalid_request", message, param="Idempotency-Key")
    wait_s, applied = preferences(request)
    body = await read_json(request)
    task_id, replayed = await context.intake.accept(caller.owner, body, key)
    headers = {"Preference-Applied": applied} if applied else {}
    if replayed:
        headers["Idempotency-Replayed"] = "true"
    done = attempted if wait_s is None else ended
    task, row = await wait_for(context.resources, task_id, done, FIRST_OUTCOME_S if wait_s is None else wait_s)
    if row["refusal_status"] is not None:
        return refusal(request, task, row, headers)
    return JSONResponse(shown(context, task), headers=headers)


def refusal(request: Request, task: model.Task, row: Row, headers: dict[str, str]) -> Response:
    """The upstream's own refusal, with our task's id."""
    error = task.error or {}
    detail = {
        "code": error.get("code"),
        "message": error.get("message"),
        "type": error.get("type"),
        "param": error.get("param"),
        "request_id": request.scope["request_id"],
        "task_id": task.id,
    }
    return JSONResponse({"error": detail}, row["refusal_status"], headers=headers)


def caller_of(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


async def found_task(request: Request) -> tuple[model.Task, Row] | None:
    task_id = request.path_params["task_id"]
    if not UPSTREAM_ID.fullmatch(task_id):
        return None
    return await context_of(request).resources.store.read(queries.task, task_id, caller_of(request).sees)


async def known_task(request: Request) -> tuple[model.Task, Row]:
    found = await found_task(request)
    if found is None:
        raise ApiError(404, "task_not_found", "no task of yours has that id")
    return found


async def task(request: Request) -> Response:
    context, task_id = context_of(request), request.path_params["task_id"]
    found = await found_task(request)
    if found is not None:
        return JSONResponse(shown(context, found[0]))
    ours = await context.resources.store.read(queries.task_row, task_id, None)
    if ours is not None or not task_id.startswith("task-unified-") or not UPSTREAM_ID.fullmatch(task_id):
        raise ApiError(404, "task_not_found", "no task of yours has that id")
    return await passed_through(context, f"/v1/tasks/{task_id}")


async def passed_through(context: Context, path: str) -> Response:
    """The upstream's own answer, its status and body as they are."""
    answer = await context.resources.upstream.passthrough("GET", path)
    return Response(answer.body, answer.status, media_type=answer.headers.get("content-type", "application/json"))


async def credits(request: Request) -> Response:
    return await passed_through(context_of(request), "/v1/credits")


async def models(request: Request) -> Response:
    return await passed_through(context_of(request), "/v1/models")


async def tasks(request: Request) -> Response:
    context, limit = context_of(request), query_limit(request)
    metadata = {}
    for name in request.query_params:
        if name.startswith("metadata."):
            metadata[name.removeprefix("metadata.")] = query_text(request, name) or ""
    found = await context.resources.store.read(
        queries.task_list,
        caller_of(request).sees,
        limit,
        read_cursor(request),
        query_text(request, "state", [state.value for state in model.State]),
        query_text(request, "model"),
        metadata,
    )
    more = make_cursor(found[-1].created_at, found[-1].id) if len(found) == limit else None
    return JSONResponse({"data": [shown(context, task) for task in found], "next_cursor": more})


async def timeline(request: Request) -> Response:
    task, _ = await known_task(request)
    lines = await context_of(request).resources.store.read(queries.timeline, task.id, caller_of(request).sees)
    return JSONResponse({"data": lines})


async def cancel(request: Request) -> Response:
    context, caller = context_of(request), caller_of(request)
    task, _ = await known_task(request)
    ended_as = await context.resources.store.write(cancel_tasks, Cancellation(task.id, caller.sees))
    if ended_as is not None:
        raise ApiError(409, "task_ended", f"the task is {ended_as}: nothing is left to cancel", task_id=task.id)
    found = await context.resources.store.read(queries.task, task.id, caller.sees)
    assert found is not None
    return JSONResponse({**shown(context, found[0]), "cancel": "local"})
