"""The whole table of URLs: method, path, what answers, who may, and what the OpenAPI document says
of it.
"""

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
from service.web.openapi import document
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

Endpoint = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Spec:
    """One operation. Without `scopes` no key is needed; one of them is enough. `query`: its
    parameters.
    """

    method: str
    path: str
    endpoint: Endpoint
    scopes: tuple[str, ...]
    summary: str
    answer: type[BaseModel] | None = None
    body: type[BaseModel] | None = None
    query: tuple[str, ...] = ()
    status: int = 200


async def asyncapi(_: Request) -> Response:
    return JSONResponse(asyncapi_document())


async def openapi(_: Request) -> Response:
    return JSONResponse(document(SPECS))


ID = re.compile("[!-~]{1,200}")
OPERATORS = ("/healthz", "/readyz", "/metrics")
PAGE = ("limit", "cursor")
SUBMISSIONS = "/v1/images/generations"

SPECS = (
    Spec(
        "POST",
        SUBMISSIONS,
        task_routes.submit,
        ("submit",),
        "Submit a task",
        schemas.Task,
        schemas.Submission,
    ),
    Spec(
        "GET",
        "/v1/tasks",
        task_routes.tasks,
        ("read",),
        "List tasks, newest first",
        schemas.TaskList,
        query=("state", "model", "metadata.KEY", *PAGE),
    ),
    Spec(
        "GET",
        "/v1/tasks/{task_id}",
        task_routes.task,
        ("read",),
        "Show a task, by its own id or the upstream's id",
        schemas.Task,
    ),
    Spec(
        "DELETE",
        "/v1/tasks/{task_id}",
        task_routes.delete,
        ("submit",),
        "Erase a terminal task. A row with its figures stays",
        status=204,
    ),
    Spec(
        "GET",
        "/v1/tasks/{task_id}/timeline",
        task_routes.timeline,
        ("read",),
        "Show every step of a task",
        schemas.Timeline,
    ),
    Spec(
        "POST",
        "/v1/tasks/{task_id}/cancel",
        task_routes.cancel,
        ("submit",),
        "Cancel a task",
        schemas.CancelledTask,
    ),
    Spec(
        "POST",
        "/v1/tasks/{task_id}/reconcile",
        admin_routes.reconcile,
        ("admin",),
        "Query the upstream and retry downloads now",
        schemas.Task,
    ),
    Spec(
        "POST",
        "/v1/tasks/{task_id}/resolve",
        admin_routes.resolve,
        ("admin",),
        "Settle an uncertain submission by hand",
        schemas.Task,
        schemas.Resolution,
    ),
    Spec("GET", "/v1/credits", upstream_routes.credits, ("read",), "Show the upstream's credits"),
    Spec("GET", "/v1/models", upstream_routes.models, ("read",), "Show the upstream's models"),
    Spec(
        "GET",
        "/v1/events",
        event_routes.events,
        ("subscribe", "read"),
        "List events after a sequence",
        EventPage,
        query=("after", "type", "task", "wait", "limit"),
    ),
    Spec(
        "POST",
        "/v1/endpoints",
        endpoint_routes.create,
        ("subscribe",),
        "Create an endpoint",
        schemas.EndpointWithSecret,
        schemas.NewEndpoint,
        status=201,
    ),
    Spec(
        "GET",
        "/v1/endpoints",
        endpoint_routes.listed,
        ("subscribe",),
        "List endpoints, newest first",
        schemas.EndpointList,
        query=PAGE,
    ),
    Spec(
        "GET",
        "/v1/endpoints/{endpoint_id}",
        endpoint_routes.read,
        ("subscribe",),
        "Show an endpoint",
        schemas.Endpoint,
    ),
    Spec(
        "PATCH",
        "/v1/endpoints/{endpoint_id}",
        endpoint_routes.patch,
        ("subscribe",),
        "Change an endpoint",
        schemas.Endpoint,
        schemas.EndpointPatch,
    ),
    Spec(
        "DELETE",
        "/v1/endpoints/{endpoint_id}",
        endpoint_routes.delete,
        ("subscribe",),
        "Delete an endpoint",
        status=204,
    ),
    Spec(
        "POST",
        "/v1/endpoints/{endpoint_id}/rotate",
        endpoint_routes.rotate,
        ("subscribe",),
        "Create a new secret. Both secrets sign during the overlap",
        schemas.EndpointWithSecret,
        schemas.Rotation,
    ),
    Spec(
        "POST",
        "/v1/endpoints/{endpoint_id}/replay",
        replay_routes.create,
        ("subscribe",),
        "Replay events, or count them",
        schemas.Counted,
        schemas.NewReplay,
    ),
    Spec(
        "GET",
        "/v1/replays/{replay_id}",
        replay_routes.read,
        ("subscribe",),
        "Show the progress of a replay",
        schemas.Replay,
    ),
    Spec(
        "DELETE",
        "/v1/replays/{replay_id}",
        replay_routes.cancel,
        ("subscribe",),
        "Cancel a replay",
        status=204,
    ),
    Spec(
        "POST",
        "/v1/endpoints/{endpoint_id}/test",
        endpoint_routes.test,
        ("subscribe",),
        "Send a test event now",
        schemas.Attempt,
    ),
    Spec(
        "GET",
        "/v1/deliveries",
        delivery_routes.deliveries,
        ("subscribe",),
        "List deliveries, newest first",
        schemas.DeliveryList,
        query=("endpoint", "event", "task", "state", *PAGE),
    ),
    Spec(
        "GET",
        "/v1/deliveries/{delivery_id}",
        delivery_routes.delivery,
        ("subscribe",),
        "Show a delivery with every attempt",
        schemas.Delivery,
    ),
    Spec(
        "POST",
        "/v1/deliveries/{delivery_id}/retry",
        delivery_routes.retry,
        ("subscribe",),
        "Make one attempt now",
        schemas.Delivery,
    ),
    Spec(
        "POST",
        "/v1/keys",
        key_routes.create,
        ("admin",),
        "Create an API key",
        schemas.CreatedKey,
        schemas.NewKey,
        status=201,
    ),
    Spec(
        "POST",
        "/v1/keys/rotate-secret",
        key_routes.rotate,
        ("subscribe",),
        "Create a new callback secret. Both secrets sign during the overlap",
        schemas.CallbackSecret,
        schemas.SecretRotation,
    ),
    Spec(
        "GET",
        "/v1/keys",
        key_routes.listed,
        ("admin",),
        "List API keys, newest first",
        schemas.KeyList,
        query=PAGE,
    ),
    Spec(
        "DELETE",
        "/v1/keys/{key_id}",
        key_routes.revoke,
        ("admin",),
        "Revoke an API key",
        status=204,
    ),
    Spec("GET", "/images/{image_id}", image_routes.image, (), "Show a stored image"),
    Spec(
        "GET",
        "/healthz",
        health_routes.healthz,
        (),
        "Report that the process is alive",
        schemas.Health,
    ),
    Spec(
        "GET",
        "/readyz",
        health_routes.readyz,
        (),
        "Report that this process can commit a callback",
        schemas.Readiness,
    ),
    Spec("GET", "/metrics", health_routes.metrics, ("read",), "Show metrics in Prometheus format"),
    Spec("GET", "/openapi.json", openapi, (), "Show the OpenAPI document"),
    Spec(
        "GET", "/asyncapi.json", asyncapi, (), "Show the AsyncAPI document, which describes events"
    ),
)


def guarded(spec: Spec) -> Endpoint:
    """The endpoint behind its scopes; an id that nothing can have is 404 before anybody looks for
    it.
    """

    async def endpoint(request: Request) -> Response:
        if spec.path in OPERATORS:
            return await admitted(request)
        with context_of(request).admission.request():
            return await admitted(request)

    async def admitted(request: Request) -> Response:
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


def table(endpoints: Mapping[Spec, Endpoint]) -> list[Route]:
    """A route a path, so that a 405 names every method that the path has."""

    def route(path: str) -> Route:
        methods = {
            spec.method: endpoint for spec, endpoint in endpoints.items() if spec.path == path
        }

        async def answer(request: Request) -> Response:
            return await methods["GET" if request.method == "HEAD" else request.method](request)

        return Route(path, answer, methods=list(methods))

    return [route(path) for path in dict.fromkeys(spec.path for spec in endpoints)]


def routes() -> list[Route]:
    """Everything a web process answers."""
    callbacks = Route(
        "/callbacks/{upstream}/{task_id}/{token}", CallbackRoute(), methods=["POST", "PUT"]
    )
    return [callbacks, *table({spec: guarded(spec) for spec in SPECS})]


def operators_routes(*, metrics_open: bool) -> list[Route]:
    """What a worker without the clients' API answers, and, `metrics_open`, what the metrics port
    does.
    """
    specs = [spec for spec in SPECS if spec.path in OPERATORS]
    return table({spec: spec.endpoint if metrics_open else guarded(spec) for spec in specs})
