"""Replays: endpoints receive past events again."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.errors import ApiError, invalid_request
from service.events import replays
from service.events.delivery_replays import MOST, DeliveryFilter, count_selected
from service.events.documents import replay_document
from service.events.outbox import OPERATORS
from service.events.replay_filter import ReplayExtent, ReplayFilter, replay_extent
from service.events.replays import NewReplayRow
from service.tasks.audit import unless
from service.web.acts import perform
from service.web.auth import caller_of
from service.web.bodies import filter_of, milliseconds, read_model
from service.web.context import resources_of
from service.web.delivery_schemas import NewDeliveryReplay, NewReplay
from service.web.routes.endpoint_routes import endpoint_of

DISABLED = unless("endpoint_disabled")


async def create(request: Request) -> Response:
    """Replay events, or count them."""
    resources, body = resources_of(request), await read_model(request, NewReplay)
    endpoint = await endpoint_of(request)
    id, owner, types = endpoint["id"], endpoint["owner"], body.types or endpoint["types"]
    since, until = milliseconds(body.since) or 0, milliseconds(body.until)
    filter = ReplayFilter(id, owner, since, until, types, body.only)
    extent = await resources.store.read(replay_extent, filter)
    if body.dry_run:
        return JSONResponse({"id": None, "count": extent.count})
    replay = NewReplayRow(resources.id("replay"), owner or OPERATORS, filter, extent)
    if not await perform(request, "endpoint.replay", id, replays.insert_replays, replay, DISABLED):
        await endpoint_of(request)  # 404 if it was deleted
        raise ApiError(409, "endpoint_disabled", "the endpoint is disabled: enable it first")
    return JSONResponse({"id": replay.id, "count": extent.count})


async def create_by_filter(request: Request) -> Response:
    """Send the deliveries that match a filter again, or count them."""
    resources, caller = resources_of(request), caller_of(request)
    body = await read_model(request, NewDeliveryReplay)
    filter = body.filter
    if filter.endpoint is not None:
        await endpoint_of(request, filter.endpoint)
    chosen = DeliveryFilter(owner=caller.sees, **filter_of(filter))
    count = await resources.store.read(count_selected, chosen)
    if count > MOST:
        message = f"filter: a replay has at most {MOST} deliveries, and more match: narrow it"
        raise invalid_request(message, "filter")
    if body.dry_run:
        return JSONResponse({"id": None, "count": count})
    only = "all" if filter.state == "delivered" else "dead"
    types = [filter.type or "*"]
    since, until = chosen.since or 0, chosen.until
    extent = ReplayFilter(filter.endpoint or "", caller.sees, since, until, types, only)
    none = ReplayExtent(count, 0, 0)
    replay = NewReplayRow(resources.id("replay"), caller.owner, extent, none, chosen)
    act = "deliveries.replay", replay.id, replays.insert_replays, replay, DISABLED
    detail = {"filter": filter.model_dump(mode="json", exclude_none=True), "count": count}
    if not await perform(request, *act, detail=detail):
        raise ApiError(409, "endpoint_disabled", "the endpoint is disabled: enable it first")
    return JSONResponse({"id": replay.id, "count": count})


async def read(request: Request) -> Response:
    """Show the progress of a replay."""
    store, replay_id = resources_of(request).store, request.path_params["replay_id"]
    row = await store.read(replays.replay_row, replay_id, caller_of(request).sees)
    if row is None:
        raise replay_not_found()
    return JSONResponse(replay_document(*row))


async def cancel(request: Request) -> Response:
    """Cancel a replay."""
    replay_id = request.path_params["replay_id"]
    mine = replay_id, caller_of(request).sees
    act = "replay.cancel", replay_id, replays.cancel_replays, mine, unless("missing")
    if not await perform(request, *act):
        raise replay_not_found()
    return Response(status_code=204)


def replay_not_found() -> ApiError:
    return ApiError(404, "replay_not_found", "no replay of yours has that id")
