"""Liveness, readiness and metrics."""

import asyncio
from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.errors import ApiError, BlobUnavailable, StoreUnavailable
from service.events.broker_worker import sinks_behind
from service.images.downloads import host_refused
from service.ops.metrics import CONTENT_TYPE
from service.strict_json import JSON
from service.upkeep import heartbeats, store_figures
from service.web.auth import SCOPES
from service.web.context import Context, context_of

READY_S = 5.0
SINK_LATE_MS = 60_000  # beyond this, a late broker is a cause of `degraded`


async def healthz(_: Request) -> Response:
    """Report that the process is alive."""
    return JSONResponse({"status": "ok"})


async def readyz(request: Request) -> Response:
    """Report that this process can commit a callback."""
    context = context_of(request)
    if await _has_key(request, context):
        status, causes = await _readiness(context)
        body: JSON = {"status": status, "causes": causes}
    else:
        status, _ = await context.readiness.look(lambda: _readiness(context))
        body = {"status": status}
    if status == "unavailable":
        return JSONResponse(body, 503, headers={"Retry-After": "1"})
    return JSONResponse(body)


async def _readiness(context: Context) -> tuple[str, list[str]]:
    """The status of this process and its causes."""
    try:
        async with asyncio.timeout(READY_S):
            await context.resources.store.write(store_figures.mark, None, urgent=True)
    except (StoreUnavailable, TimeoutError):
        return "unavailable", ["store"]
    causes = []
    if context.resources.store.signals.stopping:
        causes.append("stopping")
    if not await _blobs_answer(context):
        causes.append("blobs")
    if context.workers_alive is not None and not context.workers_alive():
        causes.append("workers")
    if context.workers_missing is not None and await context.workers_missing():
        causes.append("no_worker")
    if not all(upstream.answering for upstream in context.resources.upstreams.values()):
        causes.append("upstream")
    if context.breaker.is_open:
        causes.append("account")
    if await context.resources.store.read(host_refused):
        causes.append("result_hosts")
    if context.sinks and (context.sinks_failing() or await _sinks_late(context)):
        causes.append("brokers")
    return ("degraded" if causes else "ok"), causes


async def _blobs_answer(context: Context) -> bool:
    """Whether the blob store answers and has enough free space."""
    try:
        async with asyncio.timeout(READY_S):
            await context.resources.blobs.check()
    except (BlobUnavailable, TimeoutError):
        return False
    free = await _free_bytes(context)
    return free is None or free >= max(1, context.intake.min_free_bytes)


async def _sinks_late(context: Context) -> bool:
    store = context.resources.store
    behind = await store.read(sinks_behind, context.sinks)
    late = store.clock() - SINK_LATE_MS
    return any(oldest is not None and oldest < late for oldest in behind.values())


async def _free_bytes(context: Context) -> int | None:
    """The free space for images, 0 if the blob store fails. None: unknown."""
    try:
        return await context.resources.blobs.free_bytes()
    except BlobUnavailable:
        return 0


async def _has_key(request: Request, context: Context) -> bool:
    if "caller" in request.scope["state"]:  # the console's
        return True
    if "authorization" not in request.headers:
        return False
    try:
        await context.access.caller(request, *SCOPES)
    except (ApiError, StoreUnavailable):
        return False
    return True


async def metrics(request: Request) -> Response:
    """Show metrics in Prometheus format."""
    context, resources = context_of(request), context_of(request).resources
    figures = await resources.store.read(store_figures.figures)
    figures["sinks_behind"] = await resources.store.read(sinks_behind, context.sinks)
    counted = partial(heartbeats.processes, now=resources.clock())
    figures["processes"] = await resources.store.read(counted)
    body = resources.metrics.show(figures, resources.clock(), await _free_bytes(context))
    return Response(body, headers={"content-type": CONTENT_TYPE})
