"""The wiring: settings become resources, resources an application, the application a server."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial

import structlog
from starlette.applications import Starlette
from starlette.middleware import Middleware

from service.backends import DELIVERIES, REDELIVERIES, open_resources, open_sinks, upstream_rules
from service.errors import ConfigurationError
from service.events.broker_worker import BrokerWorker
from service.events.deliveries import dead_letter_delivery
from service.events.delivery_worker import DeliveryWorker
from service.events.replays import ReplayWorker, dead_letter_replay
from service.events.tail import Tail
from service.events.webhooks import WebhookSender
from service.images.download_worker import DownloadWorker
from service.images.downloads import dead_letter_image, images_and_origins
from service.images.input_files import InputFiles
from service.images.input_sources import InputResolver
from service.images.validator import ImageValidator, open_validator
from service.jobs import process_jobs
from service.net.egress_client import Egress
from service.ops import garbage
from service.ops.metrics import Metrics
from service.queue.stage import Stage
from service.queue.stopping import Stopping
from service.queue.worker import WorkerPool
from service.recent_look import RecentLook
from service.resources import Resources
from service.settings import Settings, masked
from service.strict_json import JSON
from service.tasks.accept import TaskIntake
from service.tasks.account_breaker import AccountBreaker
from service.tasks.confirm_worker import ConfirmWorker, QueryPlan
from service.tasks.inbox_worker import InboxWorker
from service.tasks.ledger import log_committed
from service.tasks.pause import PauseWatch
from service.tasks.submit_worker import SubmitWorker
from service.tasks.task_queries import tasks_by_id
from service.tasks.transitions import dead_letter_task
from service.upkeep.heartbeats import workers_missing
from service.upstreams.catalogue import DEFAULT_UPSTREAM, Catalogue, load_catalogue
from service.web.activation import notify
from service.web.auth import Access
from service.web.context import Context
from service.web.error_responses import HANDLERS
from service.web.key_limits import KeyLimits
from service.web.middleware import Requests
from service.web.overload import LoadShedder, PriorityGate
from service.web.routes.table import operators_routes, site_routes
from service.web.server import Server, bind, listening
from service.web.sessions import Sessions

log = structlog.get_logger()

REPLAYS = 4  # concurrent pages
JUDGE_FIRST_S = 5.0  # a start judges waiting callbacks so long before it does anything else


@dataclass(frozen=True, slots=True)
class Role:
    """The parts of a process: `serve` both, `serve --no-worker` the web, `worker` the workers."""

    web: bool = True
    workers: bool = True

    @property
    def name(self) -> str:
        return "serve" if self.web and self.workers else "web" if self.web else "worker"


def stages(
    settings: Settings,
    resources: Resources,
    breaker: AccountBreaker,
    validator: ImageValidator,
    pause: PauseWatch | None = None,
) -> list[Stage]:
    """The workers' stages, in the order of the data."""
    called, ttl_s = settings.callback_url is not None, settings.evolink_task_ttl_s
    plan = QueryPlan(called, settings.reconcile_after_s, resources.random, ttl_s)
    calls = settings.submit_schedule, settings.submit_timeout_s, settings.submit_give_up_s
    doubt = settings.uncertain, settings.uncertain_after_s
    links_s, patience_s = settings.evolink_result_ttl_s, settings.no_results_after_s
    submitter = SubmitWorker(resources, plan, breaker, *calls, *doubt, links_s, pause)
    confirms = settings.evolink_confirm == "always"
    settler = ConfirmWorker(resources, plan, confirms, ttl_s, links_s, patience_s)
    limits = settings.max_image_bytes, settings.min_free_bytes
    downloader = DownloadWorker(resources, validator, settings.download_schedule, *limits)
    sender = WebhookSender(resources, settings.delivery_timeout_s)
    delivery = DeliveryWorker(sender, settings.delivery_schedule, settings.endpoint_disable_after_s)
    slots, downloads = settings.evolink_concurrency, settings.download_concurrency
    return [
        Stage("submit", slots, submitter.run, dead_letter_task),
        Stage("settle", slots, settler.run, dead_letter_task, rows=tasks_by_id),
        Stage("reconcile", slots, settler.run, dead_letter_task),
        Stage("download", downloads, downloader.run, dead_letter_image, rows=images_and_origins),
        Stage("deliver", DELIVERIES, delivery.run, dead_letter_delivery, shared=True),
        Stage("redeliver", REDELIVERIES, delivery.run, dead_letter_delivery, shared=True),
        Stage("replay", REPLAYS, ReplayWorker(resources).run, dead_letter_replay),
    ]


@asynccontextmanager
async def running(
    settings: Settings, role: Role, address: str | None = None
) -> AsyncIterator[Context]:
    """A process at work: its resources are open and its workers claim.

    At the end, work in flight has `STOP_S` seconds to finish. The leases of the rest are released.
    """
    if role.workers and settings.evolink_api_key is None:
        raise ConfigurationError("DARKROOM_EVOLINK_API_KEY is required by workers")
    metrics, catalogue = Metrics(), load_catalogue(settings.catalogue)
    limits = settings.max_image_bytes, settings.max_image_pixels
    opened_validator = open_validator(settings.decode_concurrency, *limits)
    async with open_resources(settings, metrics) as resources, opened_validator as validator:
        sinks = open_sinks(settings) if role.workers else []
        brokers = {sink.name: BrokerWorker(resources, sink) for sink in sinks}
        upstream, gate = resources.upstreams[DEFAULT_UPSTREAM], PriorityGate()
        resources.store.give_way = gate.give_way
        breaker = AccountBreaker(resources, upstream, settings.submit_schedule)
        pause = PauseWatch(resources.store, metrics)
        await pause.look()  # a process that starts releases what is held
        work = stages(settings, resources, breaker, validator, pause) if role.workers else []
        after_commit = partial(log_committed, metrics=metrics)
        pool = WorkerPool(resources.store, work, metrics, after_commit, gate.wait)
        stopping = Stopping(resources.store, pool, settings.stop_s)
        context = make_context(
            settings, role, resources, catalogue, validator, breaker, pause, gate, brokers, stopping
        )
        if role.workers:
            with suppress(TimeoutError):  # a long inbox must not hold up the start
                async with asyncio.timeout(JUDGE_FIRST_S):
                    await context.inbox.drain()
        jobs = process_jobs(settings, context, pool, brokers, role.name)
        metrics.processes.labels(role.name).set(1)
        tasks = [asyncio.create_task(job, name=name) for name, job in jobs.items()]
        log.info(
            "service.started",
            role=role.name,
            address=address or f"{settings.host}:{settings.port}",
            settings=masked(settings),
        )
        try:
            yield context
        finally:
            stopping.quiesce()
            for task in tasks:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            log.info("service.stopped", role=role.name, unfinished=await pool.stop(stopping.left()))


def make_context(
    settings: Settings,
    role: Role,
    resources: Resources,
    catalogue: Catalogue,
    validator: ImageValidator,
    breaker: AccountBreaker,
    pause: PauseWatch,
    gate: PriorityGate,
    broker_workers: Mapping[str, BrokerWorker],
    stopping: Stopping,
) -> Context:
    admin_key = settings.admin_key.get_secret_value() if settings.admin_key else None
    pool, since = stopping.pool, resources.store.clock()
    missing = None if role.workers else partial(workers_missing, resources.store, since)
    days, least = settings.file_retention_days, settings.min_free_bytes
    files = InputFiles(resources, validator, days, least, settings.max_image_bytes)
    inputs = InputResolver(files, catalogue, Egress(upstream_rules(settings)).check_url)
    intake_options = settings.log_prompts, inputs, settings.unpriced == "allow"
    sessions = Sessions(resources.keyring, resources.clock, settings.base_url)
    return Context(
        resources=resources,
        sender=WebhookSender(resources, settings.delivery_timeout_s),
        intake=TaskIntake(resources, catalogue, settings.callback_url, least, *intake_options),
        files=files,
        tail=Tail(resources.store, resources.links),
        gate=gate,
        breaker=breaker,
        pause=pause,
        access=Access(resources.store, admin_key, sessions if settings.console == "on" else None),
        limits=KeyLimits(settings.key_requests),
        shedder=LoadShedder(gate, resources.metrics, settings.key_waits),
        readiness=RecentLook(),
        inbox=InboxWorker(resources, settings.evolink_result_ttl_s),
        max_endpoints=settings.max_endpoints,
        sinks={address.name: address.types for address in settings.sinks},
        sinks_failing=lambda: any(each.failing for each in broker_workers.values()),
        stopping=stopping,
        doctor=lambda: examined(settings, resources, pool, missing),
        workers_alive=(lambda: pool.alive) if role.workers else None,
        workers_missing=missing,
    )


async def examined(
    settings: Settings,
    resources: Resources,
    pool: WorkerPool,
    missing: Callable[[], Awaitable[bool]] | None,
) -> JSON:
    from service.doctor.examination import examine, report
    from service.doctor.patient import living

    working = pool.alive if missing is None else not await missing()
    async with living(settings, resources, working, calls=missing is None) as patient:
        return report(await examine(patient))


def create_app(context: Context, role: Role, *, metrics_open: bool = False) -> Starlette:
    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[dict[str, Context]]:
        yield {"context": context}

    public = role.web and not metrics_open
    app = Starlette(
        routes=site_routes(context) if public else operators_routes(metrics_open=metrics_open),
        middleware=[Middleware(Requests)],
        exception_handlers=dict(HANDLERS),
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # to the upstream a redirect is a failed callback
    return app


async def serve(
    settings: Settings,
    role: Role,
    bound: socket.socket,
    stop: asyncio.Event,
    *,
    ready: Callable[[Context], Awaitable[None]] | None = None,
) -> None:
    """Serves on the socket `bound` until `stop`. Calls `ready` once the process is at work."""
    address = f"unix:{bound.getsockname()}" if bound.family == socket.AF_UNIX else None
    async with running(settings, role, address) as context, AsyncExitStack() as stack:
        if settings.metrics_port is not None:
            operators = create_app(context, role, metrics_open=True)
            listener = bind(settings.host, settings.metrics_port, "DARKROOM_METRICS_PORT")
            await stack.enter_async_context(listening(Server(operators, listener, 1), stop))
        server = Server(create_app(context, role), bound, settings.stop_s, context.gate)
        await stack.enter_async_context(listening(server, stop))
        if role.workers:
            context.files.validator.warm()
        if ready is not None:
            await ready(context)
        garbage.settle()
        notify("READY=1")
        await stop.wait()
        notify("STOPPING=1")
        context.stopping.quiesce()
        # Callbacks are still accepted: the next process is not there before this one has ended.
        server.config.timeout_graceful_shutdown = max(1, round(await context.stopping.drained()))
