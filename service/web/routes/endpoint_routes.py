"""Endpoints: who gets which events, and where."""

import os
from contextlib import suppress

import structlog
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.db.paging import Row
from service.errors import ApiError, EgressRefused, NotConnected
from service.events.delivery_worker import send_test
from service.events.documents import attempt_document
from service.events.endpoints import (
    EndpointChange,
    NewEndpointRow,
    change_endpoints,
    endpoint_list,
    endpoint_row,
    insert_endpoints,
)
from service.events.replays import ReplayFilter, replay_extent
from service.events.secrets import rotate_secret
from service.ids import rfc3339
from service.resources import Resources
from service.signing import new_secret
from service.strict_json import JSON
from service.web.bodies import page, place_of, query_limit, read_cursor, read_json, validated
from service.web.context import context_of
from service.web.routes.task_routes import caller_of
from service.web.schemas import EndpointPatch, NewEndpoint, Rotation

log = structlog.get_logger()


def shown(row: Row, replay: JSON | None = None) -> JSON:
    return {
        "id": row["id"],
        "owner": row["owner"],
        "url": row["url"],
        "types": row["types"],
        "description": row["description"],
        "status": row["status"],
        "created_at": rfc3339(row["created_at"]),
        "disabled_at": rfc3339(row["disabled_at"]) if row["disabled_at"] is not None else None,
        "disabled_reason": row["disabled_reason"],
        "replay": replay,
    }


async def check_url(resources: Resources, url: str) -> None:
    try:
        with suppress(NotConnected):  # a name that does not resolve now may do so later
            await resources.endpoints.check(url)
    except EgressRefused as error:
        raise ApiError(400, "invalid_parameter", f"url: {error}", param="url") from error


async def create(request: Request) -> Response:
    resources, caller = context_of(request).resources, caller_of(request)
    body = validated(NewEndpoint, await read_json(request))
    owner: str | None = caller.owner
    if "owner" in body.model_fields_set and body.owner != caller.owner:
        if caller.sees is not None:
            raise ApiError(
                403,
                "permission_denied",
                "owner: only the scope admin may subscribe to others' events",
                param="owner",
            )
        owner = body.owner
    await check_url(resources, body.url)
    secret = new_secret(os.urandom(32))
    encrypted = resources.keyring.encrypt(secret)
    endpoint = NewEndpointRow(
        resources.id("endpoint"), owner, body.url, tuple(body.types), body.description, encrypted
    )
    await resources.store.write(insert_endpoints, endpoint)
    log.info("admin.action", action="endpoint.create", subject=endpoint.id)
    return JSONResponse({**shown(await endpoint_of(request, endpoint.id)), "secret": secret}, 201)


async def endpoint_of(request: Request, endpoint_id: str | None = None) -> Row:
    wanted = endpoint_id or request.path_params["endpoint_id"]
    row = await context_of(request).resources.store.read(
        endpoint_row, wanted, caller_of(request).sees
    )
    if row is None:
        raise ApiError(404, "endpoint_not_found", "no endpoint of yours has that id")
    return row


async def read(request: Request) -> Response:
    return JSONResponse(shown(await endpoint_of(request)))


async def listed(request: Request) -> Response:
    limit = query_limit(request)
    store, owner = context_of(request).resources.store, caller_of(request).sees
    return page(
        await store.read(endpoint_list, owner, limit + 1, read_cursor(request)),
        limit,
        place_of,
        shown,
    )


async def patch(request: Request) -> Response:
    resources, caller, endpoint_id = (
        context_of(request).resources,
        caller_of(request),
        request.path_params["endpoint_id"],
    )
    body = validated(EndpointPatch, await read_json(request))
    if body.url is not None:
        await check_url(resources, body.url)
    change = EndpointChange(
        endpoint_id,
        caller.sees,
        body.url,
        tuple(body.types) if body.types is not None else None,
        body.description,
        body.status,
    )
    since = (await endpoint_of(request))["disabled_at"]
    await _change(request, change, "endpoint.patch")
    row = await endpoint_of(request)
    missed = since is not None and row["disabled_at"] is None
    return JSONResponse(shown(row, await _offer(resources, row, since) if missed else None))


async def _offer(resources: Resources, row: Row, since: int) -> JSON:
    """The replay of what the endpoint missed while it was disabled: by its id, with this `since`,
    `only` the dead.
    """
    extent = await resources.store.read(
        replay_extent, ReplayFilter(row["id"], row["owner"], since, None, (), "dead")
    )
    return {"since": rfc3339(since), "count": extent.count}


async def delete(request: Request) -> Response:
    await _change(
        request,
        EndpointChange(request.path_params["endpoint_id"], caller_of(request).sees, delete=True),
        "endpoint.delete",
    )
    return Response(status_code=204)


async def _change(request: Request, change: EndpointChange, action: str) -> None:
    if not await context_of(request).resources.store.write(change_endpoints, change):
        raise ApiError(404, "endpoint_not_found", "no endpoint of yours has that id")
    log.info("admin.action", action=action, subject=change.id)


async def rotate(request: Request) -> Response:
    """Another secret; the one before it signs too for as long as is asked."""
    resources, row = context_of(request).resources, await endpoint_of(request)
    body = validated(Rotation, await read_json(request, empty=True))
    secret = await rotate_secret(
        resources.store,
        resources.keyring,
        resources.clock(),
        "endpoints",
        row["id"],
        body.overlap_s,
    )
    log.info("admin.action", action="endpoint.rotate", subject=row["id"])
    return JSONResponse({**shown(await endpoint_of(request)), "secret": secret})


async def test(request: Request) -> Response:
    """An event that nobody else sees, sent as a real one would be, whatever the endpoint's status;
    answers the attempt.
    """
    context, caller, row = context_of(request), caller_of(request), await endpoint_of(request)
    with context.admission.by_hand_of(caller.owner):
        attempt = await send_test(context.sender, row)
    log.info("admin.action", action="endpoint.test", subject=row["id"])
    return JSONResponse(attempt_document(attempt, answers=caller.sees is None))
