"""What is the upstream's to answer: credits, models, and its tasks that did not come through here.

All owners share one account there, so an id may be another owner's task. Whoever asks for one is
told what an id that nobody has is told, after the same statements and the same call: the upstream
is then asked for an id that nothing has.
"""

import json
import math
import re
import secrets
import time

from starlette.requests import Request
from starlette.responses import Response

from service import net
from service.errors import ApiError
from service.net.retry_after import retry_after
from service.strict_json import JSON
from service.tasks import task_queries
from service.tasks.account_breaker import CREDITS, note_credits
from service.upstreams.base import throttled
from service.web.context import Context, context_of

PLACE_S = 10.0  # so long it waits for its turn at the upstream
PREFIX = "task-unified-"
UPSTREAM_ID = re.compile(
    PREFIX + "([0-9]{10}(?=-))?[A-Za-z0-9_-]+"
)  # nothing that a proxy on the way could read as more than a name
NO_TASK = (400, 404, 410, 422)
PATIENCE_S = {429: 60, 503: 30}  # as the upstream documents it; others are faults of the moment


def unknown_task() -> ApiError:
    return ApiError(404, "task_not_found", "no task of yours has that id")


async def credits(request: Request) -> Response:
    context = context_of(request)
    answer = await _asked(context, CREDITS)
    note_credits(context.resources.metrics, answer.status, answer.body)
    return as_it_is(answer)


async def models(request: Request) -> Response:
    return as_it_is(await _asked(context_of(request), "/v1/models"))


async def task(context: Context, owner: str | None, task_id: str) -> Response:
    """A task that was not submitted here, in the upstream's own words. `owner` None: whoever may
    see everything (admin).

    ApiError 404: the upstream has none, it may be somebody else's, or nothing can have that id; 429
    and 503: it did not say.
    """
    match = UPSTREAM_ID.fullmatch(task_id)
    if match is None:
        raise unknown_task()
    asked, upstream = task_id, context.resources.upstream.name
    if owner is not None:
        created = int(match[1]) * 1000 if match[1] else None
        if await context.resources.store.read(
            task_queries.may_be_anothers, upstream, task_id, owner, created
        ):
            asked = task_id[: max(len(PREFIX), len(task_id) - 8)] + secrets.token_hex(4)
    answer = await _asked(context, f"/v1/tasks/{asked}")
    document = read(answer.body)
    if answer.status in NO_TASK or (
        200 <= answer.status < 300 and isinstance(document, dict) and document.get("id") != asked
    ):
        raise unknown_task()
    if 200 <= answer.status < 300 and document is not None:
        return Response(answer.body, media_type="application/json")
    raise silent(answer)


async def _asked(context: Context, path: str) -> net.Response:
    async with context.resources.limiter.slot("passthrough", PLACE_S) as record:
        answer = await context.resources.upstream.passthrough("GET", path)
        record(throttled(answer))
    return answer


def as_it_is(answer: net.Response) -> Response:
    """Status and body of an answer in JSON; ApiError 503 for a failure of the upstream's or of what
    stands before it.
    """
    if not (200 <= answer.status < 300 or 400 <= answer.status < 500) or read(answer.body) is None:
        raise silent(answer)
    headers = {"Retry-After": str(patience(answer))} if answer.status == 429 else None
    return Response(answer.body, answer.status, headers, media_type="application/json")


def read(body: bytes) -> JSON | list[object] | None:
    """The document of an answer; None: a page, or nothing."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict | list) else None


def silent(answer: net.Response) -> ApiError:
    """No answer that would help: what a client can do is to come again."""
    if answer.status == 429:
        return ApiError(
            429,
            "rate_limit_exceeded",
            "the upstream takes no more calls for now",
            retry_after=patience(answer),
        )
    return ApiError(
        503,
        "upstream_unavailable",
        f"the upstream gave no answer that can be passed on: {answer.status}",
        retry_after=patience(answer),
    )


def patience(answer: net.Response) -> int:
    """Whole seconds until it is worth another try."""
    asked = retry_after(answer.headers.get("retry-after"), time.time())
    return max(1, math.ceil(asked)) if asked is not None else PATIENCE_S.get(answer.status, 5)
