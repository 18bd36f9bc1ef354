"""Replays: events that an endpoint is to get again."""

import structlog
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.errors import ApiError
from service.model import JSON
from service.pipeline.replay import replay_document
from service.store.operations.replays import Cancelled, Replay, cancel_replays, insert_replays
from service.store.replays import Wanted, replay_extent, replay_row
from service.web.api import caller_of
from service.web.bodies import read_json, validated
from service.web.context import context_of
from service.web.endpoints import endpoint_of
from service.web.schemas import NewReplay

log = structlog.get_logger()


async def create(request: Request) -> Response:
    resources = context_of(request).resources
    body, endpoint = validated(NewReplay, await read_json(request, empty=True)), await endpoint_of(request)
    since = round(body.since.timestamp() * 1000) if body.since else 0
    until = round(body.until.timestamp() * 1000) if body.until else resources.clock()
    wanted = Wanted(endpoint["id"], endpoint["owner"], since, until, body.types or endpoint["types"], body.only)
    extent = await resources.store.read(replay_extent, wanted)
    if body.dry_run:
        return JSONResponse({"id": None, "count": extent.count})
    replay = Replay(resources.id("replay"), caller_of(request).owner, wanted, extent)
    if not await resources.store.write(insert_replays, replay):
        raise ApiError(409, "endpoint_disabled", "the endpoint is disabled: enable it first")
    log.info("admin.action", action="endpoint.replay", subject=endpoint["id"])
    return JSONResponse(await _shown(request, replay.id))


async def _shown(request: Request, replay_id: str) -> JSON:
    found = await context_of(request).resources.store.read(replay_row, replay_id, caller_of(request).sees)
    if found is None:
        raise _missing()
    return replay_document(*found)


async def read(request: Request) -> Response:
    return JSONResponse(await _shown(request, request.path_params["replay_id"]))


async def cancel(request: Request) -> Response:
    replay_id = request.path_params["replay_id"]
    if not await context_of(request).resources.store.write(cancel_replays, Cancelled(replay_id, caller_of(request).sees)):
        raise _missing()
    log.info("admin.action", action="replay.cancel", subject=replay_id)
    return Response(status_code=204)


def _missing() -> ApiError:
    return ApiError(404, "replay_not_found", "no replay of yours has that id")
