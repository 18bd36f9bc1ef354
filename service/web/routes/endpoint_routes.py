"""Endpoints: the receivers of webhooks."""

import json
import os
from contextlib import suppress
from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.db.paging import Row
from service.errors import ApiError, ConfigurationError, EgressRefused, NotConnected
from service.events import endpoints
from service.events.delivery_worker import send_test
from service.events.documents import attempt_document
from service.events.endpoint_health import health_document, recent_attempts
from service.events.endpoint_options import OPTIONS, all_options
from service.events.endpoints import EndpointChange, NewEndpointRow
from service.events.replay_filter import ReplayFilter, replay_extent
from service.events.secrets import rotate_secret
from service.ids import rfc3339, rfc3339_or_none
from service.resources import Resources
from service.signing import new_secret
from service.strict_json import JSON
from service.tasks.audit import unless
from service.web.acts import perform, performing
from service.web.auth import caller_of
from service.web.bodies import read_model
from service.web.context import context_of, resources_of
from service.web.endpoint_schemas import EndpointPatch, EndpointSample, NewEndpoint, Rotation
from service.web.list_page import page, position_of


def document(resources: Resources, row: Row, replay: JSON | None = None) -> JSON:
    """The endpoint as its owner sees it. `headers` is null if no key decrypts them."""
    headers: JSON | None = None if row["headers"] else {}
    if row["headers"]:
        with suppress(ConfigurationError):
            headers = json.loads(resources.keyring.decrypt(row["headers"]))
    return {
        **{name: row[name] for name in ("id", "owner", "url", "types", "description", "status")},
        **all_options(row["options"]),
        "headers": headers,
        "created_at": rfc3339(row["created_at"]),
        "disabled_at": rfc3339_or_none(row["disabled_at"]),
        "disabled_reason": row["disabled_reason"],
        "status_since": rfc3339_or_none(row["status_since"] or row["disabled_at"]),
        "failing_since": rfc3339_or_none(row["failing_since"]),
        "success_rate": None if (rate := row["success_rate"]) is None else round(float(rate), 4),
        "replay": replay,
    }


def options_of(body: NewEndpoint | EndpointPatch) -> JSON:
    """The options that the body names. Null is their default, as in a new endpoint."""
    given = {name: getattr(body, name) for name in OPTIONS if name in body.model_fields_set}
    return {name: OPTIONS[name] if value is None else value for name, value in given.items()}


def encrypted(resources: Resources, body: NewEndpoint | EndpointPatch) -> bytes | None:
    """None: the body does not name the headers. Empty: there are none."""
    if "headers" not in body.model_fields_set:
        return None
    return resources.keyring.encrypt(json.dumps(body.headers)) if body.headers else b""


async def check_url(resources: Resources, url: str) -> None:
    try:
        with suppress(NotConnected):  # the name may resolve later
            await resources.endpoints.check(url)
    except EgressRefused as error:
        raise ApiError(400, "invalid_parameter", f"url: {error}", param="url") from error


async def create(request: Request) -> Response:
    """Create an endpoint."""
    resources, caller = resources_of(request), caller_of(request)
    body = await read_model(request, NewEndpoint)
    owner = body.owner if "owner" in body.model_fields_set else caller.owner
    if owner != caller.owner and caller.sees is not None:
        message = "owner: only the scope admin may subscribe to others' events"
        raise ApiError(403, "permission_denied", message, param="owner")
    await check_url(resources, body.url)
    id, secret = resources.id("endpoint"), new_secret(os.urandom(32))
    most, headers = context_of(request).max_endpoints, encrypted(resources, body) or None
    kept = resources.keyring.encrypt(secret)
    values = id, owner, body.url, tuple(body.types), body.description, kept
    endpoint = NewEndpointRow(*values, options_of(body) or None, headers, most)
    act = "endpoint.create", id, endpoints.insert_endpoints, endpoint, unless("too_many_endpoints")
    if not await perform(request, *act):
        message = f"an owner has at most {most} endpoints (DARKROOM_MAX_ENDPOINTS)"
        raise ApiError(422, "too_many_endpoints", message)
    row = await endpoint_of(request, id)
    return JSONResponse({**document(resources, row), "secret": secret}, 201)


async def endpoint_of(request: Request, endpoint_id: str | None = None) -> Row:
    id = request.path_params["endpoint_id"] if endpoint_id is None else endpoint_id
    store, owner = resources_of(request).store, caller_of(request).sees
    row = await store.read(endpoints.endpoint_view, id, owner, store.clock())
    if row is None:
        raise endpoint_not_found()
    return row


def endpoint_not_found() -> ApiError:
    return ApiError(404, "endpoint_not_found", "no endpoint of yours has that id")


async def read(request: Request) -> Response:
    """Show an endpoint."""
    return JSONResponse(document(resources_of(request), await endpoint_of(request)))


async def listed(request: Request) -> Response:
    """List endpoints, newest first."""
    rows = partial(endpoints.endpoint_list, now=resources_of(request).store.clock())
    return await page(request, rows, position_of, partial(document, resources_of(request)))


async def patch(request: Request) -> Response:
    """Change an endpoint."""
    resources, id = resources_of(request), request.path_params["endpoint_id"]
    body = await read_model(request, EndpointPatch)
    if body.url is not None:
        await check_url(resources, body.url)
    types = None if body.types is None else tuple(body.types)
    values = id, caller_of(request).sees, body.url, types, body.description, body.status
    options, headers = options_of(body), encrypted(resources, body)
    change = EndpointChange(*values, options=options, headers=headers)
    since = (await endpoint_of(request))["disabled_at"]
    await _change(request, change, "endpoint.patch")
    row = await endpoint_of(request)
    if since is None or row["disabled_at"] is not None:
        return JSONResponse(document(resources, row))
    missed = ReplayFilter(id, row["owner"], since, None, (), "undelivered")
    extent = await resources.store.read(replay_extent, missed)
    return JSONResponse(document(resources, row, {"since": rfc3339(since), "count": extent.count}))


async def delete(request: Request) -> Response:
    """Delete an endpoint."""
    id, owner = request.path_params["endpoint_id"], caller_of(request).sees
    await _change(request, EndpointChange(id, owner, delete=True), "endpoint.delete")
    return Response(status_code=204)


async def _change(request: Request, change: EndpointChange, action: str) -> None:
    act = action, change.id, endpoints.change_endpoints, change, unless("missing")
    if not await perform(request, *act):
        raise endpoint_not_found()


async def rotate(request: Request) -> Response:
    """Create a new secret. Both secrets sign during the overlap."""
    resources, id = resources_of(request), (await endpoint_of(request))["id"]
    overlap_s = (await read_model(request, Rotation)).overlap_s
    store, keyring, now = resources.store, resources.keyring, resources.clock()
    write = performing(request, "endpoint.rotate", id, None, unless("conflict"))
    secret = await rotate_secret(store, keyring, now, "endpoints", id, overlap_s, write)
    return JSONResponse({**document(resources, await endpoint_of(request)), "secret": secret})


async def test(request: Request) -> Response:
    """Send a test event now."""
    context, caller, row = context_of(request), caller_of(request), await endpoint_of(request)
    body = await read_model(request, EndpointSample)
    with context.shedder.manual.take(caller.owner):
        attempt = await send_test(context.sender, row, body.type, body.data)
    await perform(request, "endpoint.test", row["id"])
    return JSONResponse(attempt_document(attempt, answers=caller.sees is None))


async def health(request: Request) -> Response:
    """Show success and latency of the latest attempts."""
    store, row = resources_of(request).store, await endpoint_of(request)
    now = store.clock()
    rows = await store.read(recent_attempts, row["id"], now)
    return JSONResponse(health_document(rows, now))
