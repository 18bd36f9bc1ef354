"""Events from a place on, in sequence: by pull, held until something is there if the reader wants,
or as a stream.
"""

import asyncio

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.errors import ApiError
from service.events.feed import read_events
from service.events.tail import StreamFilter
from service.ids import sequence_text
from service.web.bodies import query_limit, query_seconds, query_text
from service.web.context import context_of
from service.web.event_stream import stream
from service.web.routes.task_routes import caller_of
from service.web.schemas import known_pattern

MAX_WAIT_S = 60
STOPPING_S = 1.0


def sequence(text: str | None, param: str) -> int | None:
    if not text:
        return None
    if not (text.isascii() and text.isdigit()) or len(text) > 20 or int(text) >= 2**63:
        raise ApiError(
            400,
            "invalid_request",
            f"{param} must be a sequence that an answer gave: up to 20 digits",
            param=param,
        )
    return int(text)


async def events(request: Request) -> Response:
    context = context_of(request)
    resources, access = context.resources, context.access
    after = sequence(query_text(request, "after"), "after")
    types = [
        pattern
        for text in request.query_params.getlist("type")
        for pattern in text.split(",")
        if pattern
    ]
    try:
        types = [known_pattern(pattern) for pattern in types]
    except ValueError as error:
        raise ApiError(400, "invalid_request", f"type {error}", param="type") from None
    sees, task_id = caller_of(request).sees, query_text(request, "task")
    if "text/event-stream" in request.headers.get("accept", ""):
        last = sequence(
            request.headers.get("last-event-id"), "Last-Event-ID"
        )  # of a reader that comes back to the same URL
        wanted = StreamFilter(sees, types, task_id)
        return stream(
            request,
            context.tail,
            after if last is None else last,
            wanted,
            lambda: access.caller(request, *request.state.scopes),
        )
    stopping, wait_s = resources.store.signals.stopping, query_seconds(request, "wait", MAX_WAIT_S)
    limit = query_limit(request)
    with context.admission.wait():
        page = await read_events(
            resources.store, resources.links, sees, after, limit, types, task_id, wait_s
        )
        if (
            stopping and not page.events
            # nobody is held any longer, and nobody is to ask again and again until the process has
            # ended
        ):
            await asyncio.sleep(min(wait_s, STOPPING_S))
    if wait_s:
        await access.caller(
            request, *request.state.scopes
        )  # the key may have been revoked while it was held
    return JSONResponse(
        {"data": page.events, "next_after": sequence_text(page.next_after), "resync": page.resync}
    )
