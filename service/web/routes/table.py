"""The table of all URLs: method and path, endpoint, scopes and schemas."""

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from structlog.contextvars import bind_contextvars

from service.errors import ApiError
from service.web import schemas
from service.web.asyncapi import document as asyncapi_document
from service.web.context import context_of
from service.web.event_schemas import EventPage
from service.web.openapi import document as openapi_document
from service.web.routes import (
    admin_routes,
    delivery_routes,
    endpoint_routes,
    event_routes,
    health_routes,
    image_routes,
    key_routes,
    replay_routes,
    task_routes,
    upstream_routes,
)
from service.web.routes.callback_route import CallbackRoute

Handler = Callable[[Request], Awaitable[Response]]
Model = type[BaseModel]


@dataclass(frozen=True, slots=True)
class Spec:
    """One operation. A key needs one of the scopes. Without scopes, no key is needed. `query`:
    names of the parameters.
    """

    method: str
    path: str
    endpoint: Handler
    scopes: tuple[str, ...]
    answer: Model | None
    body: Model | None
    query: tuple[str, ...]
    status: int

    @property
    def summary(self) -> str:
        """The endpoint's docstring, on one line."""
        return " ".join((self.endpoint.__doc__ or "").split()).removesuffix(".")


def spec(
    operation: str,
    endpoint: Handler,
    scopes: str,
    answer: Model | None = None,
    body: Model | None = None,
    status: int | None = None,
) -> Spec:
    """A Spec in short notation: spaces separate scopes, and `?` and `&` parameters."""
    method, _, url = operation.partition(" ")
    path, _, query = url.partition("?")
    parameters = tuple(query.split("&")) if query else ()
    status = status or (204 if method == "DELETE" else 200)
    needs = tuple(scopes.split())
    return Spec(method, path, endpoint, needs, answer, body, parameters, status)


async def asyncapi(_: Request) -> Response:
    """Show the AsyncAPI document, which describes events."""
    return JSONResponse(asyncapi_document())


async def openapi(_: Request) -> Response:
    """Show the OpenAPI document."""
    return JSONResponse(openapi_document(SPECS))


ID = re.compile("[!-~]{1,200}")
OPERATORS = ("/healthz", "/readyz", "/metrics")

SPECS = (
    spec(
        "POST /v1/images/generations",
        task_routes.submit,
        "submit",
        schemas.Task,
        schemas.Submission,
    ),
    spec(
        "GET /v1/tasks?state&model&metadata.KEY&limit&cursor",
        task_routes.tasks,
        "read",
        schemas.TaskList,
    ),
    spec("GET /v1/tasks/{task_id}", task_routes.task, "read", schemas.Task),
    spec("DELETE /v1/tasks/{task_id}", task_routes.delete, "submit"),
    spec("GET /v1/tasks/{task_id}/timeline", task_routes.timeline, "read", schemas.Timeline),
    spec("POST /v1/tasks/{task_id}/cancel", task_routes.cancel, "submit", schemas.CancelledTask),
    spec("POST /v1/tasks/{task_id}/reconcile", admin_routes.reconcile, "admin", schemas.Task),
    spec(
        "POST /v1/tasks/{task_id}/resolve",
        admin_routes.resolve,
        "admin",
        schemas.Task,
        schemas.Resolution,
    ),
    spec("GET /v1/credits", upstream_routes.credits, "read"),
    spec("GET /v1/models", upstream_routes.models, "read"),
    spec(
        "GET /v1/events?after&type&task&wait&limit",
        event_routes.events,
        "subscribe read",
        EventPage,
    ),
    spec(
        "POST /v1/endpoints",
        endpoint_routes.create,
        "subscribe",
        schemas.EndpointWithSecret,
        schemas.NewEndpoint,
        status=201,
    ),
    spec(
        "GET /v1/endpoints?limit&cursor", endpoint_routes.listed, "subscribe", schemas.EndpointList
    ),
    spec("GET /v1/endpoints/{endpoint_id}", endpoint_routes.read, "subscribe", schemas.Endpoint),
    spec(
        "PATCH /v1/endpoints/{endpoint_id}",
        endpoint_routes.patch,
        "subscribe",
        schemas.Endpoint,
        schemas.EndpointPatch,
    ),
    spec("DELETE /v1/endpoints/{endpoint_id}", endpoint_routes.delete, "subscribe"),
    spec(
        "POST /v1/endpoints/{endpoint_id}/rotate",
        endpoint_routes.rotate,
        "subscribe",
        schemas.EndpointWithSecret,
        schemas.Rotation,
    ),
    spec(
        "POST /v1/endpoints/{endpoint_id}/replay",
        replay_routes.create,
        "subscribe",
        schemas.Counted,
        schemas.NewReplay,
    ),
    spec("GET /v1/replays/{replay_id}", replay_routes.read, "subscribe", schemas.Replay),
    spec("DELETE /v1/replays/{replay_id}", replay_routes.cancel, "subscribe"),
    spec(
        "POST /v1/endpoints/{endpoint_id}/test", endpoint_routes.test, "subscribe", schemas.Attempt
    ),
    spec(
        "GET /v1/deliveries?endpoint&event&task&state&limit&cursor",
        delivery_routes.deliveries,
        "subscribe",
        schemas.DeliveryList,
    ),
    spec(
        "GET /v1/deliveries/{delivery_id}", delivery_routes.delivery, "subscribe", schemas.Delivery
    ),
    spec(
        "POST /v1/deliveries/{delivery_id}/retry",
        delivery_routes.retry,
        "subscribe",
        schemas.Delivery,
    ),
    spec(
        "POST /v1/keys", key_routes.create, "admin", schemas.CreatedKey, schemas.NewKey, status=201
    ),
    spec(
        "POST /v1/keys/rotate-secret",
        key_routes.rotate_secret,
        "subscribe",
        schemas.CallbackSecret,
        schemas.SecretRotation,
    ),
    spec("GET /v1/keys?limit&cursor", key_routes.listed, "admin", schemas.KeyList),
    spec("DELETE /v1/keys/{key_id}", key_routes.revoke, "admin"),
    spec("GET /images/{image_id}", image_routes.image, ""),
    spec("GET /healthz", health_routes.healthz, "", schemas.Health),
    spec("GET /readyz", health_routes.readyz, "", schemas.Readiness),
    spec("GET /metrics", health_routes.metrics, "read"),
    spec("GET /openapi.json", openapi, ""),
    spec("GET /asyncapi.json", asyncapi, ""),
)


def guarded(spec: Spec) -> Handler:
    """The endpoint behind load shedding, its scopes and limits. An impossible id is 404 without a
    look-up.
    """

    async def endpoint(request: Request) -> Response:
        if spec.path in OPERATORS:
            return await authorised(request)
        with context_of(request).shedder.request():
            return await authorised(request)

    async def authorised(request: Request) -> Response:
        if spec.scopes:
            caller = await context_of(request).access.caller(request, *spec.scopes)
            request.state.caller, request.state.scopes = caller, spec.scopes
            bind_contextvars(owner=caller.owner)
            if spec.path not in OPERATORS:
                await context_of(request).limits.count(caller.key)
        if not all(ID.fullmatch(value) for value in request.path_params.values()):
            raise ApiError(404, "not_found", "nothing has that id")
        return await spec.endpoint(request)

    return endpoint


def table(endpoints: Mapping[Spec, Handler]) -> list[Route]:
    """One route per path, so that a 405 names every method of the path."""

    def route(path: str) -> Route:
        methods = {
            spec.method: endpoint for spec, endpoint in endpoints.items() if spec.path == path
        }

        async def answer(request: Request) -> Response:
            return await methods["GET" if request.method == "HEAD" else request.method](request)

        return Route(path, answer, methods=list(methods))

    return [route(path) for path in dict.fromkeys(spec.path for spec in endpoints)]


def routes() -> list[Route]:
    """All routes of a web process."""
    path = "/callbacks/{upstream}/{task_id}/{token}"
    callbacks = Route(path, CallbackRoute(), methods=["POST", "PUT"])
    return [callbacks, *table({spec: guarded(spec) for spec in SPECS})]


def operators_routes(*, metrics_open: bool) -> list[Route]:
    """The routes of a worker without the clients' API, or of the metrics port (`metrics_open`)."""
    specs = [spec for spec in SPECS if spec.path in OPERATORS]
    return table({spec: spec.endpoint if metrics_open else guarded(spec) for spec in specs})
