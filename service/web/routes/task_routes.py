"""Tasks for clients: submitted, shown, listed, cancelled. The shape is the upstream's, so that its
clients work here.
"""

import re
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from structlog.contextvars import bind_contextvars

from service.errors import ApiError
from service.links import with_links
from service.strict_json import JSON
from service.tasks import task_queries
from service.tasks.accept import attempted, ended, wait_for
from service.tasks.cancel import Cancellation, cancel_tasks
from service.tasks.document import task_document
from service.tasks.rows import ImageRow, TaskRow
from service.tasks.state import State
from service.upkeep.retention import erase
from service.web.auth import Caller
from service.web.bodies import page, query_limit, query_text, read_cursor, read_json
from service.web.context import Context, context_of
from service.web.error_responses import answer
from service.web.routes import upstream_routes

FIRST_OUTCOME_S = 10.0
MAX_WAIT_S = 120
IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")
METADATA = "metadata."
ODD_NAME = re.compile(
    r'["\\\x00-\x1f]'
)  # JSON escapes them, and SQLite looks for names as they are written


def shown(context: Context, row: TaskRow, images: Sequence[ImageRow]) -> JSON:
    document = with_links(task_document(row, images), context.resources.links)
    return {**document, "prompt": row.prompt}


def preferences(request: Request) -> tuple[float | None, str | None]:
    """Seconds to wait by `Prefer` (None: not asked), and what was applied; `wait` wins over
    `respond-async`.
    """
    wait, asynchronous = None, False
    for preference in ",".join(request.headers.getlist("prefer")).split(","):
        name, _, value = preference.partition(";")[0].partition("=")
        seconds = re.fullmatch('"?([0-9]{1,9})"?', value.strip())
        asynchronous |= name.strip().lower() == "respond-async"
        if name.strip().lower() == "wait" and seconds:
            wait = min(int(seconds[1]), MAX_WAIT_S)
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
    task_id, replayed = await context.intake.accept(
        caller.owner, body, key, admin=caller.sees is None
    )
    bind_contextvars(task_id=task_id)
    headers = {"Preference-Applied": applied} if applied else {}
    if replayed:
        headers["Idempotency-Replayed"] = "true"
    done = attempted if wait_s is None else ended
    with context.admission.wait():
        row, images = await wait_for(
            context.resources, task_id, done, FIRST_OUTCOME_S if wait_s is None else wait_s
        )
    if row.refusal_status is not None:  # the upstream's own refusal, with our task's id
        assert row.error is not None
        more = {name: row.error.get(name) for name in ("type", "param")}
        return answer(
            request,
            row.refusal_status,
            row.error["code"],
            row.error["message"],
            headers,
            **more,
            task_id=row.id,
        )
    return JSONResponse(shown(context, row, images), headers=headers)


def caller_of(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


async def known_task(request: Request) -> tuple[TaskRow, list[ImageRow]]:
    store, task_id = context_of(request).resources.store, request.path_params["task_id"]
    found = await store.read(task_queries.task, task_id, caller_of(request).sees)
    if found is None:
        raise upstream_routes.unknown_task()
    bind_contextvars(task_id=found[0].id)
    return found


async def task(request: Request) -> Response:
    context, owner, task_id = (
        context_of(request),
        caller_of(request).sees,
        request.path_params["task_id"],
    )
    found = await context.resources.store.read(task_queries.task, task_id, owner)
    if found is None:
        return await upstream_routes.task(context, owner, task_id)
    bind_contextvars(task_id=found[0].id)
    return JSONResponse(shown(context, *found))


async def tasks(request: Request) -> Response:
    context, limit = context_of(request), query_limit(request)
    named = [name for name in request.query_params if name.startswith(METADATA)]
    if any(ODD_NAME.search(name) for name in named):
        message = (
            "metadata names with quotes, backslashes or control characters cannot be searched for"
        )
        raise ApiError(400, "invalid_request", message, param="metadata")
    found = await context.resources.store.read(
        task_queries.task_list,
        caller_of(request).sees,
        limit + 1,
        read_cursor(request),
        query_text(request, "state", [state.value for state in State]),
        query_text(request, "model"),
        {name.removeprefix(METADATA): query_text(request, name) or "" for name in named},
    )
    return page(
        found,
        limit,
        lambda item: (item[0].created_at, item[0].id),
        lambda item: shown(context, *item),
    )


async def timeline(request: Request) -> Response:
    task, _ = await known_task(request)
    lines = await context_of(request).resources.store.read(
        task_queries.timeline, task.id, caller_of(request).sees
    )
    return JSONResponse({"data": lines})


async def cancel(request: Request) -> Response:
    context, caller = context_of(request), caller_of(request)
    task, _ = await known_task(request)
    ended_as = await context.resources.store.write(cancel_tasks, Cancellation(task.id, caller.sees))
    if ended_as is not None:
        raise ApiError(
            409, "task_ended", f"the task is {ended_as}: nothing is left to cancel", task_id=task.id
        )
    return JSONResponse({**shown(context, *await known_task(request)), "cancel": "local"})


async def delete(request: Request) -> Response:
    context, (task, _) = context_of(request), await known_task(request)
    if await erase(context.resources, task.id, caller_of(request).sees) is not None:
        raise ApiError(
            409,
            "task_not_ended",
            "the task has not ended: cancel it first, or wait for its end",
            task_id=task.id,
        )
    return Response(status_code=204)
