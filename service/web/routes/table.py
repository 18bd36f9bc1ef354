"""The table of all URLs: method and path, endpoint, scopes and schemas."""

import asyncio
import re
from importlib import import_module

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route, Router
from starlette.types import Receive, Scope, Send

from service.web.asyncapi import document as asyncapi_document
from service.web.catalogue_schemas import CatalogueList, CatalogueModel
from service.web.context import Context
from service.web.delivery_schemas import (
    Attempt,
    Counted,
    Delivery,
    DeliveryList,
    DeliveryRequest,
    FailureGroups,
    NewDeliveryReplay,
    NewReplay,
    Replay,
)
from service.web.endpoint_schemas import (
    Endpoint,
    EndpointHealth,
    EndpointList,
    EndpointPatch,
    EndpointSample,
    EndpointWithSecret,
    NewEndpoint,
    Rotation,
)
from service.web.event_schemas import EventPage
from service.web.file_schemas import (
    EncodedUpload,
    ErasedAnswer,
    File,
    FileList,
    LinkedUpload,
    ListedFiles,
    QuotaAnswer,
    Upload,
    UploadedFile,
)
from service.web.key_schemas import CallbackSecret, CreatedKey, KeyList, NewKey, SecretRotation
from service.web.money_schemas import (
    BudgetChange,
    BudgetList,
    EntryList,
    Estimate,
    EstimatedSubmission,
    OwnersBudget,
    UsageReport,
)
from service.web.openapi import document as openapi_document
from service.web.operator_schemas import Health, Readiness
from service.web.public_keys import PublicKeys, public_keys
from service.web.published import Published
from service.web.routes import admin_routes as admin
from service.web.routes import catalogue_routes as catalogue
from service.web.routes import delivery_routes as deliveries
from service.web.routes import endpoint_routes as endpoints
from service.web.routes import event_routes as events
from service.web.routes import file_routes as files
from service.web.routes import health_routes as health
from service.web.routes import image_routes as images
from service.web.routes import key_routes as keys
from service.web.routes import money_routes as money
from service.web.routes import operator_routes as operators
from service.web.routes import replay_routes as replays
from service.web.routes import task_routes as tasks
from service.web.routes import upstream_file_routes as theirs
from service.web.routes import upstream_routes as upstream
from service.web.routes.callback_route import CallbackRoute
from service.web.routes.operation import OPERATORS, guarded, path_routes, spec
from service.web.task_schemas import (
    CancelledTask,
    Resolution,
    Submission,
    Task,
    TaskCallbacks,
    TaskList,
    Timeline,
)


async def openapi(request: Request) -> Response:
    """Show the OpenAPI document."""
    return await OPENAPI.answer(request)


async def asyncapi(request: Request) -> Response:
    """Show the AsyncAPI document, which describes events."""
    return await ASYNCAPI.answer(request)


PAGES = re.compile(r"/(docs|assets|console)(/|\Z)")
PAGE = "owner&since&until&limit&cursor"  # of every list

SPECS = (
    spec("POST /v1/images/generations", tasks.submit, "submit", Task, Submission),
    spec("GET /v1/images/generations/{task_id}", tasks.generation, "read", Task),
    spec(
        f"GET /v1/tasks?state&model&error&prompt&metadata.KEY&{PAGE}", tasks.tasks, "read", TaskList
    ),
    *operators.OPERATIONS,
    spec("GET /v1/tasks/{task_id}", tasks.task, "read", Task),
    spec("DELETE /v1/tasks/{task_id}", tasks.delete, "submit"),
    spec("GET /v1/tasks/{task_id}/timeline", tasks.timeline, "read", Timeline),
    spec("GET /v1/tasks/{task_id}/callbacks", tasks.callbacks, "read", TaskCallbacks),
    spec("POST /v1/tasks/{task_id}/cancel", tasks.cancel, "submit", CancelledTask),
    spec("POST /v1/tasks/{task_id}/reconcile", admin.reconcile, "admin", Task),
    spec("POST /v1/tasks/{task_id}/resolve", admin.resolve, "admin", Task, Resolution),
    spec("GET /v1/catalogue", catalogue.models, "read submit", CatalogueList),
    spec("GET /v1/catalogue/{model}", catalogue.model, "read submit", CatalogueModel),
    spec("POST /v1/estimates", catalogue.estimate, "submit read", Estimate, EstimatedSubmission),
    spec("GET /v1/ledger?owner&task&after&limit", money.entries, "read", EntryList),
    spec("GET /v1/usage?from&to&by&owner&most", money.report, "read", UsageReport),
    spec("GET /v1/budgets?owner&limit&cursor", money.budgets, "read", BudgetList),
    spec("PUT /v1/budgets/{owner}", money.set_budget, "admin", OwnersBudget, BudgetChange),
    spec("GET /v1/credits", upstream.credits, "admin"),
    spec("GET /v1/models", upstream.models, "read"),
    spec("GET /v1/events?after&type&task&wait&limit", events.events, "subscribe read", EventPage),
    spec(
        "POST /v1/endpoints",
        endpoints.create,
        "subscribe",
        EndpointWithSecret,
        NewEndpoint,
        status=201,
    ),
    spec(f"GET /v1/endpoints?{PAGE}", endpoints.listed, "subscribe", EndpointList),
    spec("GET /v1/endpoints/{endpoint_id}", endpoints.read, "subscribe", Endpoint),
    spec(
        "PATCH /v1/endpoints/{endpoint_id}", endpoints.patch, "subscribe", Endpoint, EndpointPatch
    ),
    spec("DELETE /v1/endpoints/{endpoint_id}", endpoints.delete, "subscribe"),
    spec(
        "POST /v1/endpoints/{endpoint_id}/rotate",
        endpoints.rotate,
        "subscribe",
        EndpointWithSecret,
        Rotation,
    ),
    spec(
        "POST /v1/endpoints/{endpoint_id}/replay", replays.create, "subscribe", Counted, NewReplay
    ),
    spec("POST /v1/replays", replays.create_by_filter, "subscribe", Counted, NewDeliveryReplay),
    spec("GET /v1/replays/{replay_id}", replays.read, "subscribe", Replay),
    spec("DELETE /v1/replays/{replay_id}", replays.cancel, "subscribe"),
    spec(
        "POST /v1/endpoints/{endpoint_id}/test",
        endpoints.test,
        "subscribe",
        Attempt,
        EndpointSample,
    ),
    spec("GET /v1/endpoints/{endpoint_id}/health", endpoints.health, "subscribe", EndpointHealth),
    spec(
        f"GET /v1/deliveries?endpoint&event&task&state&error&status&{PAGE}",
        deliveries.deliveries,
        "subscribe",
        DeliveryList,
    ),
    spec("GET /v1/deliveries/groups?owner&endpoint", deliveries.groups, "subscribe", FailureGroups),
    spec("GET /v1/deliveries/{delivery_id}", deliveries.delivery, "subscribe", Delivery),
    spec("GET /v1/deliveries/{delivery_id}/request", deliveries.sent, "subscribe", DeliveryRequest),
    spec("POST /v1/deliveries/{delivery_id}/retry", deliveries.retry, "subscribe", Delivery),
    spec("POST /v1/keys", keys.create, "admin", CreatedKey, NewKey, status=201),
    spec(
        "POST /v1/keys/rotate-secret",
        keys.rotate_secret,
        "subscribe",
        CallbackSecret,
        SecretRotation,
    ),
    spec(f"GET /v1/keys?{PAGE}", keys.listed, "admin", KeyList),
    spec("DELETE /v1/keys/{key_id}", keys.revoke, "admin"),
    spec("POST /v1/files?flatten&model", files.upload, "submit", File, Upload, 201),
    spec(f"GET /v1/files?{PAGE}", files.files, "submit read", FileList),
    spec("GET /v1/files/{file_id}", files.file, "submit read", File),
    spec("GET /v1/files/{file_id}/content", files.content, "submit read"),
    spec("DELETE /v1/files/{file_id}", files.delete, "submit"),
    spec("POST /api/v1/files/upload/stream", theirs.stream, "submit", UploadedFile, Upload),
    spec("POST /api/v1/files/upload/base64", theirs.base64, "submit", UploadedFile, EncodedUpload),
    spec("POST /api/v1/files/upload/url", theirs.url, "submit", UploadedFile, LinkedUpload),
    spec("GET /api/v1/files/list?page&pageSize", theirs.listed, "submit read", ListedFiles),
    spec("GET /api/v1/files/quota", theirs.quota, "submit read", QuotaAnswer),
    spec("DELETE /api/v1/files/{file_id}", theirs.delete, "submit", ErasedAnswer, status=200),
    spec("GET /images/{image_id}", images.image, ""),
    spec("GET /healthz", health.healthz, "", Health),
    spec("GET /readyz", health.readyz, "", Readiness),
    spec("GET /metrics", health.metrics, "admin"),
    spec("GET /openapi.json", openapi, ""),
    spec("GET /asyncapi.json", asyncapi, ""),
    spec("GET /.well-known/endpoints/{endpoint_id}/jwks.json", public_keys, "", PublicKeys),
)
OPENAPI = Published(lambda: openapi_document(SPECS))
ASYNCAPI = Published(asyncapi_document)


def routes() -> list[Route]:
    """All routes of a web process."""
    path = "/callbacks/{upstream}/{task_id}/{token}"
    callbacks = Route(path, CallbackRoute(), methods=["POST", "PUT"])
    return [callbacks, *path_routes((spec.method, spec.path, guarded(spec)) for spec in SPECS)]


def operators_routes(*, metrics_open: bool) -> list[Route]:
    """The routes of a worker without the clients' API, or of the metrics port (`metrics_open`)."""
    return path_routes(
        (spec.method, spec.path, spec.endpoint if metrics_open else guarded(spec))
        for spec in SPECS
        if spec.path in OPERATORS
    )


class PageRoutes(BaseRoute):
    """Routes all paths of the pages to a router of their own, which the first request for one
    imports: it needs Jinja and twenty modules. A start without them is 50 ms quicker.
    """

    def __init__(self, *, console: bool) -> None:
        self._console = console
        self._router: Router | None = None

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        ours = scope["type"] == "http" and PAGES.match(scope["path"])
        return (Match.FULL if ours else Match.NONE), {}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._router is None:
            module = await asyncio.to_thread(import_module, "service.web.console.console_table")
            if self._router is None:
                pages = module.page_routes(console=self._console)
                self._router = Router(pages, redirect_slashes=False)
        await self._router(scope, receive, send)


def site_routes(context: Context) -> list[BaseRoute]:
    """All routes of a web process, with the console unless it is off."""
    return [*routes(), PageRoutes(console=context.access.sessions is not None)]
