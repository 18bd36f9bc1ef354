"""Opens what the settings name: the store and its keys, images, brokers, the upstream."""

import asyncio
import os
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import structlog

from service.blobs.blob_store import Blobs
from service.blobs.local import LocalBlobs
from service.db.batching import BatchingStore
from service.db.clock import wall_clock
from service.db.sqlite import open_sqlite
from service.errors import BlobUnavailable, ConfigurationError
from service.events.broker_worker import Broker
from service.events.outbox import flush
from service.folders import keep_private, make_folder, make_private
from service.links import MAX_LINK, Links
from service.net.egress_client import Egress, Rules
from service.net.service_client import usual_trust
from service.ops.metrics import Metrics
from service.queue.limiter import ConcurrencyLimiter
from service.resources import Resources, new_id
from service.setting_types import KEY_BYTES, Networks, keys_of
from service.settings import Settings
from service.signing import Keyring, LinkSigner
from service.tasks import owner_keys
from service.upstreams.base import Upstream, UpstreamCall
from service.upstreams.evolink import EvoLink
from service.upstreams.file_api import FileApi
from service.upstreams.lenient import OTHER_BYTES
from service.web.event_schemas import known_pattern
from service.web.overload import MANUAL

log = structlog.get_logger()

# Concurrent first attempts and retries. One owner alone uses a fifth of them (see
# `queue/leases.py`).
DELIVERIES, REDELIVERIES = 256, 128
S3_ADDRESS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
OTHERS_S = 3600  # how long a temporary file may belong to another process that is at work
RESULT_REDIRECTS = 5
NETWORKS_SETTING = "DARKROOM_UPSTREAM_NETWORKS"
INLINE_IMAGES = 16  # of an upstream's response. No model of the catalogue makes more


def open_store(settings: Settings) -> AbstractAsyncContextManager[BatchingStore]:
    """The store, migrated. ConfigurationError: it cannot be used."""
    keep_private()
    process = f"{socket.gethostname()[:32]}:{os.getpid()}:{os.urandom(4).hex()}"
    path, migrate = settings.sqlite_path, settings.migrate == "on"
    if path:
        return open_sqlite(path, process=process, new_id=new_id, flush=flush, migrate=migrate)
    from service.db.postgres import open_postgres

    return open_postgres(
        settings.database_url, process=process, new_id=new_id, flush=flush, migrate=migrate
    )


@asynccontextmanager
async def open_store_and_keys(settings: Settings) -> AsyncIterator[tuple[BatchingStore, Keyring]]:
    """The store and the keys of its secrets. Keys that exist are read before the store is opened.

    ConfigurationError: the keys are missing although the store was used with some.
    """
    is_new = not settings.secret_key and settings.sqlite_path and not settings.key_file.exists()
    keyring = None if is_new else Keyring(secret_keys(settings))
    async with open_store(settings) as store:
        if keyring is None:
            await refuse_lost_key(settings, store)
        make_private(settings.data_dir)
        yield store, keyring or Keyring(secret_keys(settings))


async def refuse_lost_key(settings: Settings, store: BatchingStore) -> None:
    if await store.read(owner_keys.needs_its_key):
        raise ConfigurationError(
            f"{settings.key_file} is missing, and DARKROOM_SECRET_KEY is not set: put back the"
            " key that the store was used with. With another in DARKROOM_SECRET_KEY callbacks"
            " under way are refused, and the secrets of endpoints and owners want rotating"
        )


def secret_keys(settings: Settings) -> list[bytes]:
    """The keys of `secret_key`, or on SQLite the keys of `{data_dir}/secret.key`.

    The first call creates the file. ConfigurationError: there is no key, a key is short, or the
    file cannot be written or read.
    """
    if settings.secret_key:
        return keys_of(settings.secret_key.get_secret_value())
    if not settings.sqlite_path:
        raise ConfigurationError(
            f"DARKROOM_SECRET_KEY is required with PostgreSQL: {KEY_BYTES} bytes or more,"
            " the same in every process. `openssl rand -hex 32` makes one"
        )
    path = settings.key_file
    try:
        if not path.exists():
            make_secret_file(path)
        # Also for a file that exists: its process may have died before the name was durable.
        make_folder(path.parent)
        return keys_of(path.read_text("ascii").strip())
    except OSError as error:
        raise ConfigurationError(
            f"{path}: {error.strerror}; set DARKROOM_SECRET_KEY, or make the folder writable"
        ) from None
    except ValueError:
        raise ConfigurationError(
            f"{path} should hold comma-separated keys of at least {KEY_BYTES} bytes each, in ASCII"
        ) from None


def make_secret_file(path: Path) -> None:
    """Creates the file with its content on disk. Of several processes one wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(48) + "\n")
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink(missing_ok=True)


async def open_blobs(
    settings: Settings, environ: Mapping[str, str], spare: int | None = None
) -> Blobs:
    """The image store. Only the address of S3 comes from `environ`. Temporary files younger than
    `spare` seconds may belong to another process.

    ConfigurationError: it cannot be used.
    """
    if spare is None:
        spare = 0 if settings.sqlite_path else OTHERS_S
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
    """The brokers, not connected yet. ConfigurationError: a type of no event, or no extra."""
    for pattern in (pattern for address in settings.sinks for pattern in address.types):
        try:
            known_pattern(pattern)
        except ValueError as error:
            raise ConfigurationError(f"DARKROOM_SINKS: types= {error}, not {pattern}") from None
    if not settings.sinks:
        return []
    try:
        from service.events.brokers import KINDS
    except ImportError:
        raise ConfigurationError(
            "DARKROOM_SINKS: brokers need the extra brokers: darkroom-service[brokers]"
        ) from None
    return [KINDS[address.kind](address) for address in settings.sinks]


@asynccontextmanager
async def open_resources(settings: Settings, metrics: Metrics) -> AsyncIterator[Resources]:
    """Opens what a process needs, and closes it in the reverse order."""

    def refused(purpose: str, host: str, reason: str) -> None:
        metrics.egress_refused.labels(purpose).inc()
        log.warning("egress.refused", purpose=purpose, host=host, reason=reason)

    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        # They are read while the store opens. The first egress raises what went wrong.
        certificates = asyncio.gather(asyncio.to_thread(usual_trust), return_exceptions=True)
        store, keyring = await enter(open_store_and_keys(settings))
        await certificates

        async def egress(rules: Rules, connections: int = 64) -> Egress:
            return await enter(Egress(rules, connections=connections, on_refused=refused))

        hooks = DELIVERIES + REDELIVERIES + MANUAL
        upstream = await egress(upstream_rules(settings))
        results = await egress(result_rules(settings), settings.download_concurrency)
        endpoints = await egress(hook_rules("endpoints", settings.endpoint_networks), hooks)
        networks = settings.task_callback_networks
        task_callbacks = await egress(hook_rules("task_callbacks", networks), hooks)
        inputs = await egress(Rules("inputs", networks, redirects=RESULT_REDIRECTS))
        called, key = call_recorder(metrics), upstream_key(settings)
        ttl_s = settings.image_link_ttl_s
        signer = LinkSigner(keyring, ttl_s, wall_clock) if ttl_s else None
        yield Resources(
            store=store,
            task_id_prefix=settings.task_id_prefix,
            blobs=await open_blobs(settings, os.environ),
            upstreams=open_upstreams(settings, upstream, called),
            limiter=ConcurrencyLimiter(
                settings.evolink_concurrency,
                lambda kind, limit: metrics.upstream_limit.labels(kind).set(limit),
            ),
            results=results,
            endpoints=endpoints,
            task_callbacks=task_callbacks,
            inputs=inputs,
            file_api=FileApi(upstream, settings.files_url, key, settings.submit_timeout_s, called),
            keyring=keyring,
            metrics=metrics,
            links=Links(
                settings.base_url, settings.image_base_url, signer.sign if signer else None
            ),
            link_signer=signer,
            clock=wall_clock,
        )


def hook_rules(purpose: str, networks: Networks) -> Rules:
    setting = f"DARKROOM_{purpose.removesuffix('s').upper()}_NETWORKS"
    return Rules(purpose, networks, networks_setting=setting)


def upstream_rules(settings: Settings) -> Rules:
    return Rules("upstream", settings.upstream_networks, networks_setting=NETWORKS_SETTING)


def result_rules(settings: Settings) -> Rules:
    return Rules(
        "results",
        settings.upstream_networks,
        settings.evolink_result_hosts,
        redirects=RESULT_REDIRECTS,
        upgrade=True,
        max_url=MAX_LINK,
        networks_setting=NETWORKS_SETTING,
        hosts_setting="DARKROOM_EVOLINK_RESULT_HOSTS",
    )


def call_recorder(metrics: Metrics) -> Callable[[UpstreamCall], None]:
    """Logs and counts the calls to upstreams."""

    def called(call: UpstreamCall) -> None:
        metrics.upstream_requests.labels(call.kind, call.outcome).inc()
        metrics.upstream_request_seconds.labels(call.kind).observe(call.duration)
        log.info(
            "upstream.called",
            kind=call.kind,
            duration_ms=round(call.duration * 1000),
            status=call.status,
            outcome=call.outcome,
            upstream_request_id=call.request_id,
        )

    return called


def upstream_key(settings: Settings) -> str:
    return settings.evolink_api_key.get_secret_value() if settings.evolink_api_key else ""


def open_upstreams(
    settings: Settings, egress: Egress, called: Callable[[UpstreamCall], None]
) -> dict[str, Upstream]:
    """The upstreams by name. `catalogue.upstream_for` says which models each serves."""
    address = settings.evolink_base_url, upstream_key(settings)
    timeouts = settings.submit_timeout_s, settings.query_timeout_s
    evolink = EvoLink(
        egress,
        *address,
        *timeouts,
        called,
        # An image in the response is a third longer as text.
        max_bytes=OTHER_BYTES + INLINE_IMAGES * settings.max_image_bytes * 4 // 3,
        folder=settings.image_dir,
    )
    return {evolink.name: evolink}
