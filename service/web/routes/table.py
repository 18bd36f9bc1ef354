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
from service.web.routes.operation import OPERATORS, guarded, path_routes, row
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
    row("POST /v1/images/generations", tasks.submit, "submit", Task, Submission),
    row("GET /v1/images/generations/{task_id}", tasks.generation, "read", Task),
    row(
        f"GET /v1/tasks?state&model&error&prompt&metadata.KEY&{PAGE}", tasks.tasks, "read", TaskList
    ),
    *operators.OPERATIONS,
    row("GET /v1/tasks/{task_id}", tasks.task, "read", Task),
    row("DELETE /v1/tasks/{task_id}", tasks.delete, "submit"),
    row("GET /v1/tasks/{task_id}/timeline", tasks.timeline, "read", Timeline),
    row("GET /v1/tasks/{task_id}/callbacks", tasks.callbacks, "read", TaskCallbacks),
    row("POST /v1/tasks/{task_id}/cancel", tasks.cancel, "submit", CancelledTask),
    row("POST /v1/tasks/{task_id}/reconcile", admin.reconcile, "admin", Task),
    row("POST /v1/tasks/{task_id}/resolve", admin.resolve, "admin", Task, Resolution),
    row("GET /v1/catalogue", catalogue.models, "read submit", CatalogueList),
    row("GET /v1/catalogue/{model}", catalogue.model, "read submit", CatalogueModel),
    row("POST /v1/estimates", catalogue.estimate, "submit read", Estimate, EstimatedSubmission),
    row("GET /v1/ledger?owner&task&after&limit", money.entries, "read", EntryList),
    row("GET /v1/usage?from&to&by&owner&most", money.report, "read", UsageReport),
    row("GET /v1/budgets?owner&limit&cursor", money.budgets, "read", BudgetList),
    row("PUT /v1/budgets/{owner}", money.set_budget, "admin", OwnersBudget, BudgetChange),
    row("GET /v1/credits", upstream.credits, "admin"),
    row("GET /v1/models", upstream.models, "read"),
    row("GET /v1/events?after&type&task&wait&limit", events.events, "subscribe read", EventPage),
    row("POST /v1/endpoints", endpoints.create, "subscribe", EndpointWithSecret, NewEndpoint, 201),
    row(f"GET /v1/endpoints?{PAGE}", endpoints.listed, "subscribe", EndpointList),
    row("GET /v1/endpoints/{endpoint_id}", endpoints.read, "subscribe", Endpoint),
    row("PATCH /v1/endpoints/{endpoint_id}", endpoints.patch, "subscribe", Endpoint, EndpointPatch),
    row("DELETE /v1/endpoints/{endpoint_id}", endpoints.delete, "subscribe"),
    row(
        "POST /v1/endpoints/{endpoint_id}/rotate",
        endpoints.rotate,
        "subscribe",
        EndpointWithSecret,
        Rotation,
    ),
    row("POST /v1/endpoints/{endpoint_id}/replay", replays.create, "subscribe", Counted, NewReplay),
    row("POST /v1/replays", replays.create_by_filter, "subscribe", Counted, NewDeliveryReplay),
    row("GET /v1/replays/{replay_id}", replays.read, "subscribe", Replay),
    row("DELETE /v1/replays/{replay_id}", replays.cancel, "subscribe"),
    row(
        "POST /v1/endpoints/{endpoint_id}/test",
        endpoints.test,
        "subscribe",
        Attempt,
        EndpointSample,
    ),
    row("GET /v1/endpoints/{endpoint_id}/health", endpoints.health, "subscribe", EndpointHealth),
    row(
        f"GET /v1/deliveries?endpoint&event&task&state&error&status&{PAGE}",
        deliveries.deliveries,
        "subscribe",
        DeliveryList,
    ),
    row("GET /v1/deliveries/groups?owner&endpoint", deliveries.groups, "subscribe", FailureGroups),
    row("GET /v1/deliveries/{delivery_id}", deliveries.delivery, "subscribe", Delivery),
    row("GET /v1/deliveries/{delivery_id}/request", deliveries.sent, "subscribe", DeliveryRequest),
    row("POST /v1/deliveries/{delivery_id}/retry", deliveries.retry, "subscribe", Delivery),
    row("POST /v1/keys", keys.create, "admin", CreatedKey, NewKey, status=201),
    row(
        "POST /v1/keys/rotate-secret",
        keys.rotate_secret,
        "subscribe",
        CallbackSecret,
        SecretRotation,
    ),
    row(f"GET /v1/keys?{PAGE}", keys.listed, "admin", KeyList),
    row("DELETE /v1/keys/{key_id}", keys.revoke, "admin"),
    row("POST /v1/files?flatten&model", files.upload, "submit", File, Upload, 201),
    row(f"GET /v1/files?{PAGE}", files.files, "submit read", FileList),
    row("GET /v1/files/{file_id}", files.file, "submit read", File),
    row("GET /v1/files/{file_id}/content", files.content, "submit read"),
    row("DELETE /v1/files/{file_id}", files.delete, "submit"),
    row("POST /api/v1/files/upload/stream", theirs.stream, "submit", UploadedFile, Upload),
    row("POST /api/v1/files/upload/base64", theirs.base64, "submit", UploadedFile, EncodedUpload),
    row("POST /api/v1/files/upload/url", theirs.url, "submit", UploadedFile, LinkedUpload),
    row("GET /api/v1/files/list?page&pageSize", theirs.listed, "submit read", ListedFiles),
    row("GET /api/v1/files/quota", theirs.quota, "submit read", QuotaAnswer),
    row("DELETE /api/v1/files/{file_id}", theirs.delete, "submit", ErasedAnswer, status=200),
    row("GET /images/{image_id}?expires&signature", images.image, ""),
    row("GET /healthz", health.healthz, "", Health),
    row("GET /readyz", health.readyz, "", Readiness),
    row("GET /metrics", health.metrics, "admin"),
    row("GET /openapi.json", openapi, ""),
    row("GET /asyncapi.json", asyncapi, ""),
    row("GET /.well-known/endpoints/{endpoint_id}/jwks.json", public_keys, "", PublicKeys),
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
