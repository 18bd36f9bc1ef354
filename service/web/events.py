"""Events by pull: from a place on, in sequence, held until something is there if the reader wants."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.errors import ApiError
from service.model import sequence_text
from service.pipeline.outbox import read_events
from service.web.api import caller_of
from service.web.bodies import query_limit, query_seconds, query_text
from service.web.context import context_of
from service.web.schemas import known_pattern

MAX_WAIT_S = 60


async def events(request: Request) -> Response:
    resources = context_of(request).resources
    after = query_text(request, "after") or None
    if after is not None and (not (after.isascii() and after.isdigit()) or len(after) > 20 or int(after) >= 2**63):
        raise ApiError(400, "invalid_request", "after must be a sequence that an answer gave: up to 20 digits", param="after")
    types = [pattern for text in request.query_params.getlist("type") for pattern in text.split(",") if pattern]
    try:
        types = [known_pattern(pattern) for pattern in types]
    except ValueError as error:
        raise ApiError(400, "invalid_request", f"type {error}", param="type") from None
    page = await read_events(
        resources.store,
        resources.links,
        caller_of(request).sees,
        None if after is None else int(after),
        query_limit(request),
        types,
        query_text(request, "task"),
        query_seconds(request, "wait", MAX_WAIT_S),
    )
    return JSONResponse({"data": page.events, "next_after": sequence_text(page.next_after), "resync": page.resync})
