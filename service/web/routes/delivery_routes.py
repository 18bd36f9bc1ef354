"""Deliveries and their attempts."""

from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.db.paging import Row, Selection
from service.errors import ApiError
from service.events.deliveries import delivery_list, delivery_to_send
from service.events.delivery_worker import is_sendable, send_manually
from service.events.documents import delivery_document
from service.events.failures import failure_groups
from service.ids import rfc3339
from service.strict_json import JSON
from service.web.acts import perform
from service.web.auth import caller_of
from service.web.bodies import query_owner, query_text
from service.web.context import context_of, resources_of
from service.web.list_page import page, position_of
from service.web.parameters import HTTP_STATUS


async def deliveries(request: Request) -> Response:
    """List deliveries, newest first."""
    such_as = "an HTTP status from 100 to 599"
    status = query_text(request, "status", pattern=HTTP_STATUS, such_as=such_as)
    filters = {
        "endpoint_id": query_text(request, "endpoint"),
        "event_id": query_text(request, "event"),
        "task_id": query_text(request, "task"),
        "state": query_text(request, "state", ("pending", "delivered", "dead")),
        "cause": query_text(request, "error"),
        "last_status": None if status is None else int(status),
    }
    where = {name: value for name, value in filters.items() if value is not None}
    rows, answers = partial(delivery_list, where=where), caller_of(request).sees is None

    def shown(item: tuple[Row, list[Row]]) -> JSON:
        return delivery_document(*item, answers=answers)

    return await page(request, rows, lambda item: position_of(item[0]), shown)


async def groups(request: Request) -> Response:
    """Group failed deliveries by endpoint and cause."""
    owner, endpoint = query_owner(request), query_text(request, "endpoint")
    rows = await resources_of(request).store.read(failure_groups, owner, endpoint)
    times = ("first_seen", "last_seen")
    data = [{**row, **{name: rfc3339(row[name]) for name in times}} for row in rows]
    return JSONResponse({"data": data})


async def sent(request: Request) -> Response:
    """Show the request of a delivery as it would be sent now."""
    delivery_id, context = (await _document(request))["id"], context_of(request)
    row = await context.resources.store.read(delivery_to_send, delivery_id)
    if row is None or not is_sendable(row):
        raise nothing_to_send()
    url, headers, body = context.sender.signed_request(row)
    return JSONResponse({"method": "POST", "url": url, "headers": headers, "body": body.decode()})


async def delivery(request: Request) -> Response:
    """Show a delivery with every attempt."""
    return JSONResponse(await _document(request))


async def retry(request: Request) -> Response:
    """Make one attempt now."""
    delivery_id, context = (await _document(request))["id"], context_of(request)
    with context.shedder.manual.take(caller_of(request).owner):
        sent = await send_manually(context.sender, delivery_id)
    if not sent:
        raise nothing_to_send()
    await perform(request, "delivery.retry", delivery_id)
    return JSONResponse(await _document(request))


def nothing_to_send() -> ApiError:
    return ApiError(409, "nothing_to_send", "its event is no longer kept, or its endpoint is gone")


async def _document(request: Request) -> JSON:
    caller, where = caller_of(request), {"id": request.path_params["delivery_id"]}
    rows = await resources_of(request).store.read(delivery_list, Selection(caller.sees, 1), where)
    if not rows:
        raise ApiError(404, "delivery_not_found", "no delivery of yours has that id")
    return delivery_document(*rows[0], answers=caller.sees is None)
