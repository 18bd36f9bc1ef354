"""What was delivered, to whom, and how it went."""

import structlog
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.errors import ApiError
from service.events.deliveries import delivery_list
from service.events.delivery_worker import send_manually
from service.events.documents import delivery_document
from service.strict_json import JSON
from service.web.bodies import page, place_of, query_limit, query_text, read_cursor
from service.web.context import context_of
from service.web.routes.task_routes import caller_of

log = structlog.get_logger()


async def deliveries(request: Request) -> Response:
    limit, caller = query_limit(request), caller_of(request)
    asked = {
        "endpoint_id": query_text(request, "endpoint"),
        "event_id": query_text(request, "event"),
        "task_id": query_text(request, "task"),
        "state": query_text(request, "state", ("pending", "delivered", "dead")),
    }
    where = {name: value for name, value in asked.items() if value is not None}
    store = context_of(request).resources.store
    found = await store.read(delivery_list, caller.sees, limit + 1, read_cursor(request), where)
    return page(
        found,
        limit,
        lambda each: place_of(each[0]),
        lambda each: delivery_document(*each, answers=caller.sees is None),
    )


async def delivery(request: Request) -> Response:
    return JSONResponse(await _shown(request))


async def _shown(request: Request) -> JSON:
    caller, where = caller_of(request), {"id": request.path_params["delivery_id"]}
    found = await context_of(request).resources.store.read(
        delivery_list, caller.sees, 1, None, where
    )
    if not found:
        raise ApiError(404, "delivery_not_found", "no delivery of yours has that id")
    return delivery_document(*found[0], answers=caller.sees is None)


async def retry(request: Request) -> Response:
    """One attempt now, whatever became of those before it and whatever is planned; answers the
    delivery with it.
    """
    shown = await _shown(request)
    context = context_of(request)
    with context.admission.by_hand_of(caller_of(request).owner):
        sent = await send_manually(context.sender, shown["id"])
    if not sent:
        raise ApiError(
            409, "nothing_to_send", "its event is no longer kept, or its endpoint is gone"
        )
    log.info("admin.action", action="delivery.retry", subject=shown["id"])
    return JSONResponse(await _shown(request))
