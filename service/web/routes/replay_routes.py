"""Replays: events that an endpoint is to get again."""

from datetime import datetime

import structlog
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.errors import ApiError
from service.events.documents import replay_document
from service.events.outbox import OPERATORS
from service.events.replays import (
    NewReplayRow,
    ReplayFilter,
    cancel_replays,
    insert_replays,
    replay_extent,
    replay_row,
)
from service.web.bodies import read_json, validated
from service.web.context import context_of
from service.web.routes.endpoint_routes import endpoint_of
from service.web.routes.task_routes import caller_of
from service.web.schemas import NewReplay

log = structlog.get_logger()

LAST_MS = 253_402_300_799_999  # of the year 9999


def milliseconds(time: datetime | None) -> int | None:
    """Within what can be written again."""
    return None if time is None else min(max(round(time.timestamp() * 1000), 0), LAST_MS)


async def create(request: Request) -> Response:
    resources = context_of(request).resources
    body, endpoint = (
        validated(NewReplay, await read_json(request, empty=True)),
        await endpoint_of(request),
    )
    since, until = milliseconds(body.since) or 0, milliseconds(body.until)
    wanted = ReplayFilter(
        endpoint["id"], endpoint["owner"], since, until, body.types or endpoint["types"], body.only
    )
    extent = await resources.store.read(replay_extent, wanted)
    if body.dry_run:
        return JSONResponse({"id": None, "count": extent.count})
    replay = NewReplayRow(resources.id("replay"), endpoint["owner"] or OPERATORS, wanted, extent)
    if not await resources.store.write(insert_replays, replay):
        await endpoint_of(request)
        raise ApiError(409, "endpoint_disabled", "the endpoint is disabled: enable it first")
    log.info("admin.action", action="endpoint.replay", subject=endpoint["id"])
    return JSONResponse({"id": replay.id, "count": extent.count})


async def read(request: Request) -> Response:
    store, replay_id = context_of(request).resources.store, request.path_params["replay_id"]
    found = await store.read(replay_row, replay_id, caller_of(request).sees)
    if found is None:
        raise _missing()
    return JSONResponse(replay_document(*found))


async def cancel(request: Request) -> Response:
    replay_id = request.path_params["replay_id"]
    if not await context_of(request).resources.store.write(
        cancel_replays, (replay_id, caller_of(request).sees)
    ):
        raise _missing()
    log.info("admin.action", action="replay.cancel", subject=replay_id)
    return Response(status_code=204)


def _missing() -> ApiError:
    return ApiError(404, "replay_not_found", "no replay of yours has that id")
