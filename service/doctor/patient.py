"""What a check examines: the settings, and the connections that can be opened with them."""

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from service.backends import (
    NETWORKS_SETTING,
    OTHERS_S,
    open_blobs,
    open_store,
    open_upstreams,
    refuse_lost_key,
    secret_keys,
)
from service.blobs.blob_store import Blobs
from service.db.batching import BatchingStore
from service.errors import ConfigurationError, SchemaMismatch, StoreInUse, StoreUnavailable
from service.net.egress_client import Egress, Rules
from service.resources import Resources
from service.settings import Settings
from service.signing import Keyring
from service.upstreams.base import Upstream
from service.upstreams.catalogue import DEFAULT_UPSTREAM

MIGRATE = "run `darkroom migrate`, or start the version that fits"
# As /proc/self/mountinfo names them. SQLite's locks and syncs do not hold on them.
NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre"}
NETWORK |= {"fuse.sshfs", "fuse.s3fs", "fuse.glusterfs", "fuse.rclone", "fuse.gcsfuse"}
MOUNTS = Path("/proc/self/mountinfo")
PROBE_S = 10.0  # of one call
State = Literal["ok", "warning", "fault", "skipped"]


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a check, in one line. `mend`: what to do about a warning or a fault."""

    state: State
    finding: str
    mend: str | None = None


ok, skipped = partial(Finding, "ok"), partial(Finding, "skipped")
fault, warning = partial(Finding, "fault"), partial(Finding, "warning")


def told(error: Exception) -> str:
    return str(error) or "no answer in time"


@dataclass(frozen=True, slots=True)
class Patient:
    """`store` is a finding if it is not opened. `blobs` and `keyring` are the problem's text.
    `workers`: whether some process has workers, None if that is unknown.
    """

    settings: Settings
    upstream: Upstream
    egress: Egress  # for the probes, with the rules of calls to the upstream
    store: BatchingStore | Finding
    blobs: Blobs | str
    keyring: Keyring | str | None
    workers: bool | None = None
    calls: bool = True  # it has workers of its own, which need the upstream's key


def probing(settings: Settings) -> Egress:
    """The guarded client of the probes. It does not follow redirects."""
    return Egress(Rules("doctor", settings.upstream_networks, networks_setting=NETWORKS_SETTING))


def file_system(folder: Path) -> str:
    """The type of a folder's file system, by the table of mounts: the folder may not answer."""
    best, kind = 0, "unknown"
    for line in MOUNTS.read_text().splitlines():
        before, _, after = line.partition(" - ")
        point = before.split()[4].encode().decode("unicode_escape")
        if f"{folder}/".startswith(f"{point.rstrip('/')}/") and len(point) >= best:
            best, kind = len(point), after.split()[0]
    return kind


@asynccontextmanager
async def living(
    settings: Settings, resources: Resources, workers: bool, *, calls: bool
) -> AsyncIterator[Patient]:
    async with probing(settings) as egress:
        opened = resources.store, resources.blobs, resources.keyring
        upstream = resources.upstreams[DEFAULT_UPSTREAM]
        yield Patient(settings, upstream, egress, *opened, workers, calls)


async def opened_store(settings: Settings, stack: AsyncExitStack) -> BatchingStore | Finding:
    """The store, or why it is not opened."""
    path = settings.sqlite_path
    if path is not None and file_system(path.parent) in NETWORK:
        return skipped("a store on a network file system is not opened, which may not answer")
    if path is not None and not path.exists():
        folder = next(each for each in path.parents if each.exists())
        if os.access(folder, os.W_OK):
            return ok("the store is made by the first start")
        return fault(f"{folder} cannot be written", f"chown it to the user of the service: {path}")
    try:
        unchanged = settings.model_copy(update={"migrate": "off"})
        return await stack.enter_async_context(open_store(unchanged))
    except StoreInUse:
        return ok("a process has the store: `darkroom doctor` without --local asks it")
    except SchemaMismatch as error:
        return fault(str(error), MIGRATE)
    except ConfigurationError as error:
        mend = "start the server, correct DARKROOM_DATABASE_URL, or make the folder writable"
        return fault(str(error), mend)


def remove_empty(folders: Sequence[Path]) -> None:
    """Removes what a probe has made. The service may be another user, and could not use it."""
    for folder in folders:
        with suppress(OSError):
            for inside in folder.iterdir():
                inside.rmdir()
            folder.rmdir()


@asynccontextmanager
async def local(settings: Settings) -> AsyncIterator[Patient]:
    """A service whose process cannot be asked. Nothing is made that is missing, or migrated."""
    async with AsyncExitStack() as stack:
        egress = await stack.enter_async_context(probing(settings))
        store = await opened_store(settings, stack)
        blobs: Blobs | str
        folders = (settings.image_dir, *settings.image_dir.parents)
        stack.callback(remove_empty, [each for each in folders if not each.exists()])
        try:
            blobs = await open_blobs(settings, os.environ, OTHERS_S)
        except ConfigurationError as error:
            blobs = str(error)
        keyring: Keyring | str | None = None
        try:
            if settings.secret_key or not settings.sqlite_path or settings.key_file.exists():
                keyring = Keyring(secret_keys(settings))
            elif isinstance(store, BatchingStore):
                await refuse_lost_key(settings, store)
        except (ConfigurationError, StoreUnavailable) as error:
            keyring = str(error)
        upstream = open_upstreams(settings, egress, lambda _: None)[DEFAULT_UPSTREAM]
        yield Patient(settings, upstream, egress, store, blobs, keyring)
