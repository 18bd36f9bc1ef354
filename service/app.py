"""The wiring: settings become resources, resources an application, the application a server.
Nothing else knows settings or backends.
"""

import asyncio
import math
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial

import structlog
from starlette.applications import Starlette
from starlette.middleware import Middleware

from service.blobs.base import Blobs
from service.blobs.local import LocalBlobs
from service.db.clock import wall_clock
from service.db.postgres import open_postgres
from service.db.sqlite import open_sqlite
from service.db.store import Store
from service.errors import BlobUnavailable, ConfigurationError
from service.events.broker_worker import Broker, BrokerWorker
from service.events.deliveries import dead_letter_delivery
from service.events.delivery_worker import DeliveryWorker
from service.events.outbox import flush, log_emitted
from service.events.replays import ReplayWorker, dead_letter_replay
from service.events.tail import Tail
from service.events.webhooks import WebhookSender
from service.images.download_worker import Downloader
from service.images.downloads import dead_letter_image
from service.images.sweep import sweep
from service.images.validator import Examiner, examining
from service.links import Links
from service.net import Egress, Rules
from service.ops.metrics import Metrics
from service.queue.limiter import ConcurrencyLimiter
from service.queue.periodic import hourly
from service.queue.worker import Stage, WorkerPool
from service.resources import Resources, new_id
from service.settings import Settings, masked, secret_keys
from service.signing import Keyring
from service.tasks import owner_keys
from service.tasks.accept import Intake
from service.tasks.account_breaker import Account
from service.tasks.confirm_worker import Settler
from service.tasks.reconcile import Plan
from service.tasks.submit_worker import Submitter
from service.tasks.transitions import dead_letter_task
from service.upkeep.rekey import rekey
from service.upkeep.retention import Retention
from service.upstreams.base import Call
from service.upstreams.catalogue import load_catalogue
from service.upstreams.evolink import EvoLink
from service.web.activation import notify
from service.web.auth import Access
from service.web.context import Context
from service.web.error_responses import HANDLERS
from service.web.middleware import Requests
from service.web.overload import BY_HAND, Admission, KeyLimits
from service.web.precedence import Precedence
from service.web.routes.table import operators_routes, routes
from service.web.schemas import known_pattern
from service.web.server import Server, bind, listening

log = structlog.get_logger()

REPLAYS = 4  # pages at once
DELIVERIES, REDELIVERIES = 64, 32  # at once; first attempts and retries have places of their own
S3_ADDRESS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
RESULT_REDIRECTS = 5
# characters: links signed with a session's token take some 2000; of a longer one only a part is
# kept
RESULT_URL = 4095


@dataclass(frozen=True, slots=True)
class Role:
    """What a process does: `serve` both, `serve --no-worker` only the web, `worker` only the
    work.
    """

    web: bool = True
    workers: bool = True

    @property
    def name(self) -> str:
        return "serve" if self.web and self.workers else "web" if self.web else "worker"


def open_store(settings: Settings) -> AbstractAsyncContextManager[Store]:
    """The store the settings name, migrated; ConfigurationError: it cannot be used."""
    process = f"{socket.gethostname()[:32]}:{os.getpid()}:{os.urandom(4).hex()}"
    migrate = settings.migrate == "on"
    path = settings.sqlite_path
    open_it = partial(open_sqlite, path) if path else partial(open_postgres, settings.database_url)
    return open_it(process=process, new_id=new_id, flush=flush, migrate=migrate)


async def open_blobs(settings: Settings, environ: Mapping[str, str]) -> Blobs:
    """Where the settings keep images; `environ` is asked for S3's address alone.
    ConfigurationError: it cannot be used.
    """
    spare = 0 if settings.sqlite_path else 3600  # seconds: other processes may be at work there
    try:
        if settings.blob_url.startswith("file:"):
            return await LocalBlobs.open(settings.image_dir, spare)
        from service.blobs.s3 import S3Blobs

        plain = any(environ.get(name, "").startswith("http://") for name in S3_ADDRESS)
        return await S3Blobs.open(
            settings.blob_url, settings.image_dir, plain_http=plain, spare=spare
        )
    except ImportError:
        raise ConfigurationError(
            "DARKROOM_BLOB_URL: s3:// needs the extra s3: darkroom-service[s3]"
        ) from None
    except BlobUnavailable as error:
        raise ConfigurationError(
            f"DARKROOM_BLOB_URL: {settings.blob_url} cannot be used: {error}"
        ) from error


def open_sinks(settings: Settings) -> list[Broker]:
    """The brokers the settings name, not connected yet; ConfigurationError: a type nobody emits, or
    the extra is missing.
    """
    for pattern in (pattern for address in settings.sinks for pattern in address.types):
        try:
            known_pattern(pattern)
        except ValueError as error:
            raise ConfigurationError(f"DARKROOM_SINKS: types= {error}") from None
    try:
        from service.events.brokers import BrokerSink

        return [BrokerSink(address) for address in settings.sinks]
    except ImportError:
        raise ConfigurationError(
            "DARKROOM_SINKS: brokers need the extra brokers: darkroom-service[brokers]"
        ) from None


@asynccontextmanager
async def open_store_and_keys(settings: Settings) -> AsyncIterator[tuple[Store, Keyring]]:
    """The store and the keys of its secrets. Keys that exist are read before the store is opened.

    ConfigurationError: the keys are missing although the store has secrets.
    """
    keyring = None if settings.key_is_missing else Keyring(secret_keys(settings))
    async with open_store(settings) as store:
        if keyring is None and await store.read(owner_keys.needs_its_key):
            raise ConfigurationError(
                f"{settings.key_file} is missing, and DARKROOM_SECRET_KEY is not set: put back the"
                " key that the store was used with. With another in DARKROOM_SECRET_KEY callbacks"
                " under way are refused, and the secrets of endpoints and owners want rotating"
            )
        yield store, keyring or Keyring(secret_keys(settings))


@asynccontextmanager
async def open_resources(
    settings: Settings, role: Role, metrics: Metrics
) -> AsyncIterator[Resources]:
    """Opens everything a process needs, in order, and closes it in the other; ConfigurationError:
    it must not start.
    """
    if role.workers and settings.evolink_api_key is None:
        raise ConfigurationError("DARKROOM_EVOLINK_API_KEY is required by workers")

    def refused(purpose: str, host: str, reason: str) -> None:
        metrics.egress_refused.labels(purpose).inc()
        log.warning("egress.refused", purpose=purpose, host=host, reason=reason)

    def called(call: Call) -> None:
        metrics.upstream_requests.labels(call.kind, call.outcome).inc()
        metrics.upstream_seconds.labels(call.kind).observe(call.duration)
        figures = {
            "status": call.status,
            "outcome": call.outcome,
            "upstream_request_id": call.request_id,
        }
        log.info(
            "upstream.called", kind=call.kind, duration_ms=round(call.duration * 1000), **figures
        )

    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        store, keyring = await enter(open_store_and_keys(settings))
        networks = settings.upstream_networks
        upstream = await enter(Egress(Rules("upstream", networks), on_refused=refused))
        rules = Rules(
            "results",
            networks,
            settings.evolink_result_hosts,
            redirects=RESULT_REDIRECTS,
            upgrade=True,
            max_url=RESULT_URL,
        )
        results = await enter(
            Egress(rules, connections=settings.download_concurrency, on_refused=refused)
        )
        places = DELIVERIES + REDELIVERIES + BY_HAND
        endpoints = await enter(
            Egress(
                Rules("endpoints", settings.endpoint_networks),
                connections=places,
                on_refused=refused,
            )
        )
        rules = Rules("task_callbacks", settings.task_callback_networks)
        callbacks = await enter(Egress(rules, connections=places, on_refused=refused))
        yield Resources(
            store=store,
            blobs=await open_blobs(settings, os.environ),
            upstream=EvoLink(
                upstream,
                settings.evolink_base_url,
                settings.evolink_api_key.get_secret_value() if settings.evolink_api_key else "",
                settings.submit_timeout_s,
                settings.query_timeout_s,
                called,
            ),
            limiter=ConcurrencyLimiter(
                settings.evolink_concurrency,
                lambda kind, limit: metrics.upstream_limit.labels(kind).set(limit),
            ),
            results=results,
            endpoints=endpoints,
            task_callbacks=callbacks,
            keyring=keyring,
            metrics=metrics,
            links=Links(settings.base_url, settings.image_base_url),
            clock=wall_clock,
        )


def stages(
    settings: Settings, resources: Resources, account: Account, examiner: Examiner
) -> list[Stage]:
    """The workers' stages, in the order of the data."""
    plan = Plan(settings.callback_url is not None, settings.reconcile_after_s, resources.random)
    submitter = Submitter(
        resources,
        plan,
        account,
        settings.submit_schedule,
        settings.submit_timeout_s,
        settings.submit_give_up_s,
        settings.uncertain,
        settings.uncertain_after_s,
    )
    settler = Settler(
        resources,
        plan,
        settings.evolink_confirm == "always",
        settings.evolink_task_ttl_s,
        settings.evolink_result_ttl_s,
    )
    downloader = Downloader(
        resources, examiner, settings.download_schedule, settings.max_image_bytes
    )
    sender = WebhookSender(resources, settings.delivery_timeout_s)
    deliverer = DeliveryWorker(
        sender, settings.delivery_schedule, settings.endpoint_disable_after_s
    )
    return [
        Stage("submit", settings.evolink_concurrency, submitter.run, dead_letter_task),
        Stage("settle", settings.evolink_concurrency, settler.run, dead_letter_task),
        Stage("reconcile", settings.evolink_concurrency, settler.run, dead_letter_task),
        Stage("download", settings.download_concurrency, downloader.run, dead_letter_image),
        Stage("deliver", DELIVERIES, deliverer.run, dead_letter_delivery),
        Stage("redeliver", REDELIVERIES, deliverer.run, dead_letter_delivery),
        Stage("replay", REPLAYS, ReplayWorker(resources).run, dead_letter_replay),
    ]


@asynccontextmanager
async def running(
    settings: Settings, role: Role, address: str | None = None
) -> AsyncIterator[Context]:
    """A process at work: resources open, workers claiming. At the end work in flight is finished
    within `STOP_S`, the rest given back.
    """
    metrics = Metrics()
    pictures = examining(
        settings.decode_concurrency, settings.max_image_bytes, settings.max_image_pixels
    )
    async with open_resources(settings, role, metrics) as resources, pictures as examiner:
        publishers = [
            BrokerWorker(resources, sink)
            for sink in (open_sinks(settings) if role.workers and settings.sinks else ())
        ]
        precedence = Precedence()
        account = Account(resources, settings.submit_schedule)
        work = stages(settings, resources, account, examiner) if role.workers else []
        pool = WorkerPool(
            resources.store, work, metrics, partial(log_emitted, metrics=metrics), precedence.wait
        )
        deadline = math.inf

        def quiesce() -> None:
            nonlocal deadline
            deadline = min(
                deadline, time.monotonic() + settings.stop_s
            )  # one limit for requests and work together
            pool.quiesce()
            resources.store.signals.stop()  # whoever waits for a task or an event is answered now

        async def drained() -> float:
            await pool.drained(max(0, deadline - time.monotonic()))
            return max(0, deadline - time.monotonic())

        context = Context(
            resources=resources,
            sender=WebhookSender(resources, settings.delivery_timeout_s),
            intake=Intake(
                resources,
                load_catalogue(),
                settings.callback_url,
                settings.min_free_bytes,
                settings.log_prompts,
            ),
            tail=Tail(resources.store, resources.links),
            precedence=precedence,
            account=account,
            access=Access(
                resources.store,
                settings.admin_key.get_secret_value() if settings.admin_key else None,
            ),
            limits=KeyLimits(settings.key_requests),
            admission=Admission(precedence, metrics),
            result_ttl_s=settings.evolink_result_ttl_s,
            sinks={address.name: address.types for address in settings.sinks},
            sinks_failing=lambda: any(publisher.failing for publisher in publishers),
            quiesce=quiesce,
            drained=drained,
            workers_alive=(lambda: pool.alive) if role.workers else None,
        )
        always = {"workers": pool.run(), "account": account.run(), "tail": context.tail.run()}
        jobs = [asyncio.create_task(job, name=name) for name, job in always.items()]
        if role.workers:
            retention = Retention(
                resources,
                settings.retention_days,
                settings.image_retention_days,
                resources.store.clock,
            )
            hourly_jobs: dict[str, Callable[[], Awaitable[object]]] = {
                "sweep": partial(sweep, resources),
                "retention": retention.apply,
                "rekey": partial(rekey, resources),
            }
            for name, work_of in hourly_jobs.items():
                run = hourly(name, work_of, resources.random, metrics, at_once=name == "rekey")
                jobs.append(asyncio.create_task(run, name=name))
            jobs += [
                asyncio.create_task(publisher.run(), name="publish") for publisher in publishers
            ]
        log.info(
            "service.started",
            role=role.name,
            address=address or f"{settings.host}:{settings.port}",
            settings=masked(settings),
        )
        try:
            yield context
        finally:
            quiesce()
            for job in jobs:
                job.cancel()
                with suppress(asyncio.CancelledError):
                    await job
            unfinished = await pool.stop(max(0, deadline - time.monotonic()))
            log.info("service.stopped", role=role.name, unfinished=unfinished)


def create_app(context: Context, role: Role, *, metrics_open: bool = False) -> Starlette:
    """The application over a running process."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[dict[str, Context]]:
        yield {"context": context}

    table = (
        routes() if role.web and not metrics_open else operators_routes(metrics_open=metrics_open)
    )
    app = Starlette(
        routes=table,
        middleware=[Middleware(Requests)],
        exception_handlers=dict(HANDLERS),
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # a callback that is sent elsewhere counts as failed
    return app


async def serve(
    settings: Settings,
    role: Role,
    bound: socket.socket,
    stop: asyncio.Event,
    *,
    ready: Callable[[Context], Awaitable[None]] | None = None,
) -> None:
    """Runs until `stop`. `bound` is the main port's socket; `ready` is called once the process is
    at work.
    """
    address = f"unix:{bound.getsockname()}" if bound.family == socket.AF_UNIX else None
    async with running(settings, role, address) as context, AsyncExitStack() as stack:
        if settings.metrics_port is not None:
            operators = create_app(context, role, metrics_open=True)
            metrics_port = Server(operators, bind(settings.host, settings.metrics_port), 1)
            await stack.enter_async_context(listening(metrics_port, stop))
        server = Server(create_app(context, role), bound, settings.stop_s)
        await stack.enter_async_context(listening(server, stop))
        if ready is not None:
            await ready(context)
        notify("READY=1")
        await stop.wait()
        notify("STOPPING=1")
        context.quiesce()
        # callbacks are taken meanwhile: whoever starts next is not there before this process has
        # ended
        left = await context.drained()
        server.config.timeout_graceful_shutdown = max(1, round(left))
