"""Deliveries and their attempts."""

import structlog
from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.db.paging import Row, Selection
from service.errors import ApiError
from service.events.deliveries import delivery_list
from service.events.delivery_worker import send_manually
from service.events.documents import delivery_document
from service.strict_json import JSON
from service.web.auth import caller_of
from service.web.bodies import page, position_of, query_text
from service.web.context import context_of, resources_of

log = structlog.get_logger()


async def deliveries(request: Request) -> Response:
    """List deliveries, newest first."""
    caller = caller_of(request)
    filters = {
        "endpoint_id": query_text(request, "endpoint"),
        "event_id": query_text(request, "event"),
        "task_id": query_text(request, "task"),
        "state": query_text(request, "state", ("pending", "delivered", "dead")),
    }
    where = {name: value for name, value in filters.items() if value is not None}

    def rows(connection: Connection, wanted: Selection) -> list[tuple[Row, list[Row]]]:
        return delivery_list(connection, wanted, where)

    def shown(item: tuple[Row, list[Row]]) -> JSON:
        return delivery_document(*item, answers=caller.sees is None)

    return await page(request, rows, lambda item: position_of(item[0]), shown)


async def delivery(request: Request) -> Response:
    """Show a delivery with every attempt."""
    return JSONResponse(await _document(request))


async def retry(request: Request) -> Response:
    """Make one attempt now."""
    delivery_id, context = (await _document(request))["id"], context_of(request)
    with context.shedder.manual.take(caller_of(request).owner):
        sent = await send_manually(context.sender, delivery_id)
    if not sent:
        message = "its event is no longer kept, or its endpoint is gone"
        raise ApiError(409, "nothing_to_send", message)
    log.info("admin.action", action="delivery.retry", subject=delivery_id)
    return JSONResponse(await _document(request))


async def _document(request: Request) -> JSON:
    caller, where = caller_of(request), {"id": request.path_params["delivery_id"]}
    store = resources_of(request).store
    rows = await store.read(delivery_list, Selection(caller.sees, 1), where)
    if not rows:
        raise ApiError(404, "delivery_not_found", "no delivery of yours has that id")
    return delivery_document(*rows[0], answers=caller.sees is None)
