"""Tasks for clients. Their shape is the upstream's, so that the upstream's clients work here."""

import re
from contextlib import nullcontext
from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from structlog.contextvars import bind_contextvars

from service.db.paging import Owned
from service.errors import ApiError, invalid_request
from service.images.downloads import quarantined_bodies
from service.links import is_data, with_links
from service.strict_json import JSON, LARGE, compact_json
from service.tasks import task_queries
from service.tasks.admin import cancel_tasks
from service.tasks.audit import unless_refused
from service.tasks.document import task_document
from service.tasks.rows import ImageRow, TaskRow
from service.tasks.state import State
from service.tasks.transitions import HELD
from service.tasks.waits import attempted, ended, wait_for
from service.upkeep.retention import erase
from service.upstreams.field_values import shown as named
from service.web.acts import perform
from service.web.auth import caller_of
from service.web.bodies import MAX_BODY, parsed, query_text, read_body
from service.web.context import context_of, resources_of
from service.web.error_responses import error_response
from service.web.list_page import Position, page
from service.web.parameters import IDEMPOTENCY_KEY
from service.web.routes import upstream_routes

FIRST_OUTCOME_S = 10.0
MAX_SUBMISSION = 32 << 20  # bytes with `data:` URLs: two images of 10 MB in base64
MAX_WAIT_S = 120
METADATA, METADATA_FILTERS = "metadata.", 16
# JSON escapes these characters, and SQLite compares names as written.
ESCAPED = re.compile(r'["\\\x00-\x1f]')

Found = tuple[TaskRow, list[ImageRow]]


def shown(request: Request, row: TaskRow, images: list[ImageRow]) -> JSON:
    document = with_links(task_document(row, images), resources_of(request).links)
    data = [{"url": url} for url in document["results"]] if row.terminal else None
    context, reason = context_of(request), None
    if row.state is State.QUEUED:
        reason = context.pause.pause.message or (HELD if context.breaker.is_open else None)
    return {**document, "prompt": row.prompt, "held": reason, "data": data, "quarantine": None}


def preferences(request: Request) -> tuple[float | None, str | None]:
    """Seconds to wait by `Prefer` (None: by default), and the preference that was applied."""
    wait, asynchronous = None, False
    for preference in ",".join(request.headers.getlist("prefer")).split(","):
        name, _, value = preference.partition(";")[0].partition("=")
        seconds = re.fullmatch('"?([0-9]{1,99})"?', value.strip())
        asynchronous |= name.strip().lower() == "respond-async"
        if wait is None and name.strip().lower() == "wait" and seconds:  # the first one counts
            wait = min(int(seconds[1]), MAX_WAIT_S)
    if wait is not None:
        return float(wait), f"wait={wait}"
    return (0.0, "respond-async") if asynchronous else (None, None)


async def submit(request: Request) -> Response:
    """Submit a task."""
    context, caller = context_of(request), caller_of(request)
    keys = dict.fromkeys(request.headers.getlist("idempotency-key"))
    key = ", ".join(keys) if keys else None  # two keys are refused: which one is meant is unknown
    if key is not None and not re.fullmatch(IDEMPOTENCY_KEY, key):
        message = f"Idempotency-Key must be 1 to 255 visible ASCII characters, not {named(key)}"
        raise invalid_request(message, "Idempotency-Key")
    wait_s, applied = preferences(request)
    task_id, new = await accepted(request, key)
    context.shedder.bodies.forget(request.state.body)
    bind_contextvars(task_id=task_id)
    waits = context.shedder.submissions
    if wait_s != 0 and not waits.left(caller.owner, caller.key):
        wait_s, applied = 0.0, None  # a task that is accepted is not refused
    headers = {"Preference-Applied": applied} if applied else {}
    if new is None:
        headers["Idempotency-Replayed"] = "true"
    done, wait_s = (attempted, FIRST_OUTCOME_S) if wait_s is None else (ended, wait_s)
    if new is not None and not wait_s:
        row, images = new, list[ImageRow]()
    else:
        is_new, new = new is not None, None  # its memory is free while the request waits
        share = waits.take(caller.owner, caller.key) if wait_s else nullcontext()
        looking = context.resources, task_id, done, wait_s, request.is_disconnected
        with share, context.shedder.idle():
            row, images = await wait_for(*looking, new=is_new)
    bind_contextvars(**row.origin.ids)
    if row.refusal_status is None:
        return JSONResponse(shown(request, row, images), headers=headers)
    error = row.error  # the upstream's own
    assert error is not None
    more = {"type": error.get("type"), "param": error.get("param"), "task_id": row.id}
    status, code, message = row.refusal_status, error["code"], error["message"]
    return error_response(request, status, code, message, headers, **more)


async def accepted(request: Request, key: str | None) -> tuple[str, TaskRow | None]:
    """The task's id, and its row unless it existed before. The body is in memory only here."""
    intake, caller = context_of(request).intake, caller_of(request)
    body, size = await read_submission(request)
    admin = caller.sees is None
    return await intake.accept(caller.owner, body, key, admin=admin, large=size > LARGE)


async def read_submission(request: Request) -> tuple[JSON, int]:
    """The body of a submission, and its size in bytes. Raises ApiError 413 if more than `MAX_BODY`
    bytes of it are no `data:` URLs of input images.
    """
    text = await read_body(request, MAX_SUBMISSION)
    body, size = await parsed(text), len(text)
    beside = size
    if size > MAX_BODY and (rest := without_data(body)) != body:
        beside = len(compact_json(rest).encode())
    if beside > MAX_BODY:
        message = f"the body has at most {MAX_BODY} bytes beside the data: URLs of its images"
        raise ApiError(413, "body_too_large", message)
    return body, size


def without_data(body: JSON) -> JSON:
    """The body with the same number of input images, whose `data:` URLs are empty."""
    urls, rest = body.get("image_urls"), {**body}
    if isinstance(urls, list):
        rest["image_urls"] = ["data:," if inline(each) else each for each in urls]
    if inline(body.get("mask_url")):
        rest["mask_url"] = "data:,"
    return rest


def inline(entry: object) -> bool:
    return isinstance(entry, str) and is_data(entry.lstrip())


async def find_task(request: Request) -> Found | None:
    store, task_id = resources_of(request).store, request.path_params["task_id"]
    pair = await store.look_up(task_queries.task, task_id, caller_of(request).sees)
    if pair is not None:
        bind_contextvars(task_id=pair[0].id)
    return pair


async def known_task(request: Request) -> Found:
    if (pair := await find_task(request)) is None:
        raise upstream_routes.unknown_task()
    return pair


async def task(request: Request) -> Response:
    """Show a task, by its own id or the upstream's id."""
    owner, task_id = caller_of(request).sees, request.path_params["task_id"]
    if (item := await find_task(request)) is not None:
        document = shown(request, *item)
        if owner is None:  # an operator
            read = resources_of(request).store.read
            document["quarantine"] = await read(quarantined_bodies, item[0].id) or None
        return JSONResponse(document)
    return await upstream_routes.task(context_of(request), owner, task_id)


async def generation(request: Request) -> Response:
    """Show a task, under the address of its submission."""
    return await task(request)


async def tasks(request: Request) -> Response:
    """List tasks, newest first."""
    names = [name for name in request.query_params if name.startswith(METADATA)]
    if len(names) > METADATA_FILTERS:
        message = f"at most {METADATA_FILTERS} metadata filters are allowed, not {len(names)}"
        raise invalid_request(message, "metadata")
    if any(ESCAPED.search(name) for name in names):
        message = "metadata names with quotes, backslashes or control characters cannot be"
        raise invalid_request(f"{message} searched for", "metadata")
    metadata = {name.removeprefix(METADATA): query_text(request, name) or "" for name in names}
    part = query_text(request, "prompt")
    rows = partial(
        task_queries.task_list,
        state=query_text(request, "state", [state.value for state in State]),
        model_name=query_text(request, "model"),
        metadata=metadata,
        error=query_text(request, "error"),
        prompt=(caller_of(request).owner, part) if part else None,
    )

    def position(item: Found) -> Position:
        return item[0].created_at, item[0].id

    return await page(request, rows, position, lambda item: shown(request, *item))


async def timeline(request: Request) -> Response:
    """Show every step of a task."""
    store, task_id = resources_of(request).store, (await known_task(request))[0].id
    steps = await store.read(task_queries.timeline, task_id, caller_of(request).sees)
    return JSONResponse({"data": steps})


async def callbacks(request: Request) -> Response:
    """List the callbacks of a task with their verdicts."""
    caller, task = caller_of(request), (await known_task(request))[0]
    rows = await resources_of(request).store.read(task_queries.callback_list, task.id)
    data = [task_queries.callback_document(row, bodies=caller.sees is None) for row in rows]
    return JSONResponse({"data": data})


async def cancel(request: Request) -> Response:
    """Cancel a task."""
    row, caller = (await known_task(request))[0], caller_of(request)
    task_id, cancellation = row.id, Owned(row.id, caller.sees)
    if row.owner == caller.owner:
        ended_as = await resources_of(request).store.write(cancel_tasks, cancellation)
    else:  # an operator
        act = "task.cancel", task_id, cancel_tasks, cancellation, unless_refused
        ended_as = await perform(request, *act)
    if ended_as is not None:
        message = f"the task is {ended_as}: nothing is left to cancel"
        raise ApiError(409, "task_ended", message, task_id=task_id)
    return JSONResponse({**shown(request, *await known_task(request)), "cancel": "local"})


async def delete(request: Request) -> Response:
    """Erase a terminal task. A row with its figures stays."""
    row = (await known_task(request))[0]
    task_id = row.id
    if await erase(resources_of(request), task_id, caller_of(request).sees) is not None:
        message = "the task has not ended: cancel it first, or wait for its end"
        raise ApiError(409, "task_not_ended", message, task_id=task_id)
    if row.owner != caller_of(request).owner:  # an operator
        await perform(request, "task.erase", task_id)
    return Response(status_code=204)
