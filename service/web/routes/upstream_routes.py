"""The upstream's own responses: credits, models, and its tasks that did not come through here.

All owners share one account at the upstream, so an id may be another owner's task. A client that
asks for such a task must not learn that it exists. The service then runs the same statements and
the same call, but asks the upstream for an id that no task has.
"""

import json
import math
import re
import secrets
import time

from starlette.requests import Request
from starlette.responses import Response

from service.errors import ApiError
from service.net.responses import Response as UpstreamResponse
from service.net.responses import retry_after
from service.strict_json import JSON
from service.tasks import task_queries
from service.tasks.account_breaker import CREDITS, note_credits
from service.upstreams.base import throttled
from service.upstreams.catalogue import DEFAULT_UPSTREAM
from service.upstreams.verdicts import refusal_of
from service.web.context import Context, context_of

SLOT_S = 10.0  # the longest wait for a slot of the concurrency limit
PREFIX = "task-unified-"
# No character that a proxy could read as more than a name.
UPSTREAM_ID = re.compile(PREFIX + "([0-9]{10}(?=-))?[A-Za-z0-9_-]+")
NO_TASK = (400, 404, 410, 422)
ACCOUNT_AGAIN_S = 60
RETRY_AFTER_S = {429: 60, 503: 30}  # as the upstream documents them, else 5


def unknown_task() -> ApiError:
    return ApiError(404, "task_not_found", "no task of yours has that id")


async def credits(request: Request) -> Response:
    """Show the upstream's credits."""
    context = context_of(request)
    answer = await _get(context, CREDITS)
    note_credits(context.resources.metrics, answer.status, answer.body)
    return passed_on(answer)


async def models(request: Request) -> Response:
    """Show the upstream's models."""
    return passed_on(await _get(context_of(request), "/v1/models"))


async def task(context: Context, owner: str | None, task_id: str) -> Response:
    """A task that was not submitted here, in the upstream's own words. `owner` None: admin.

    Raises ApiError 404 if the upstream has none, it may be another owner's, or the id is invalid.
    Raises 429 and 503 if the upstream did not say.
    """
    match = UPSTREAM_ID.fullmatch(task_id)
    if match is None:
        raise unknown_task()
    asked, upstream = task_id, DEFAULT_UPSTREAM
    if owner is not None:
        created = int(match[1]) * 1000 if match[1] else None
        query = task_queries.may_be_anothers
        if await context.resources.store.read(query, upstream, task_id, owner, created):
            asked = task_id[: max(len(PREFIX), len(task_id) - 8)] + secrets.token_hex(4)
    answer = await _get(context, f"/v1/tasks/{asked}")
    document, success = read(answer.body), 200 <= answer.status < 300
    other = isinstance(document, dict) and document.get("id") != asked
    if answer.status in NO_TASK or (success and other):
        raise unknown_task()
    if success and document is not None:
        return Response(answer.body, media_type="application/json")
    raise no_answer(answer)


async def _get(context: Context, path: str) -> UpstreamResponse:
    """The upstream's answer. Raises ApiError 503 if it refuses the service's own account."""
    async with context.resources.limiter.slot("passthrough", SLOT_S) as record:
        answer = await context.resources.upstreams[DEFAULT_UPSTREAM].passthrough("GET", path)
        record(throttled(answer))
    if refusal_of(answer) is not None:
        message = "the upstream refuses this service's own key or account. Yours is in order"
        raise ApiError(503, "upstream_account_refused", message, retry_after=ACCOUNT_AGAIN_S)
    return answer


def passed_on(answer: UpstreamResponse) -> Response:
    """Status and body of a JSON response. Raises ApiError 503 for a failure of the upstream."""
    if not (200 <= answer.status < 300 or 400 <= answer.status < 500) or read(answer.body) is None:
        raise no_answer(answer)
    headers = {"Retry-After": str(wait_of(answer))} if answer.status == 429 else None
    return Response(answer.body, answer.status, headers, media_type="application/json")


def read(body: bytes) -> JSON | list[object] | None:
    """The document of a response, or None for a page or an empty body."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict | list) else None


def no_answer(answer: UpstreamResponse) -> ApiError:
    """The client can only come again."""
    status, code = 503, "upstream_unavailable"
    message = f"the upstream gave no answer that can be passed on: {answer.status}"
    if answer.status == 429:
        status, code = 429, "rate_limit_exceeded"
        message = "the upstream takes no more calls for now"
    return ApiError(status, code, message, retry_after=wait_of(answer))


def wait_of(answer: UpstreamResponse) -> int:
    """Whole seconds until the next try."""
    asked = retry_after(answer.headers.get("retry-after"), time.time())
    return RETRY_AFTER_S.get(answer.status, 5) if asked is None else max(1, math.ceil(asked))
