"""The connections that every step works with."""

import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import structlog

from service.blobs.blob_store import Blobs
from service.db.batching import BatchingStore
from service.errors import ApiError
from service.ids import PREFIXES, make_id
from service.links import Links
from service.net.egress_client import Egress
from service.ops.metrics import Metrics
from service.queue.limiter import ConcurrencyLimiter
from service.queue.shared_commits import SharedCommits
from service.recent_look import RecentLook
from service.signing import Keyring, LinkSigner
from service.upstreams.base import Upstream
from service.upstreams.file_api import FileApi

log = structlog.get_logger()


def new_id(kind: str, now: int) -> str:
    """An id with this process's randomness."""
    return make_id(kind, now, os.urandom(10))


@dataclass(frozen=True, slots=True)
class Resources:
    """One process's connections, opened by `backends.open_resources`."""

    store: BatchingStore
    blobs: Blobs
    upstreams: Mapping[str, Upstream]  # by name
    limiter: ConcurrencyLimiter  # gives every call to the upstream its slot
    results: Egress  # fetches what the upstream made
    endpoints: Egress  # sends webhooks
    task_callbacks: Egress  # sends webhooks to tasks' own callback_url
    inputs: Egress  # fetches links that clients give for their input images
    file_api: FileApi  # takes input images for the upstream
    keyring: Keyring
    link_signer: LinkSigner | None
    metrics: Metrics
    links: Links
    clock: Callable[[], int]  # milliseconds since 1970 UTC
    new_id: Callable[[str, int], str] = new_id
    random: Callable[[], float] = field(default=random.random)
    task_id_prefix: str = PREFIXES["task"]
    shared_commits: SharedCommits = field(default_factory=SharedCommits)
    room: RecentLook[int | None] = field(default_factory=RecentLook)

    def id(self, kind: str) -> str:
        id = self.new_id(kind, self.clock())
        if kind != "task":
            return id
        return self.task_id_prefix + id.removeprefix(PREFIXES["task"])

    async def check_room(self, limit: int, purpose: str) -> None:
        """Raises ApiError 503, and logs it, if the blob store has less free space than `limit`."""
        free = await self.room.look(self.blobs.free_bytes)
        if free is None or free >= limit:
            return
        log.warning("blobs.full", purpose=purpose, free_bytes=free, limit_bytes=limit)
        message = (
            f"there is too little space left for new {purpose}: {free} bytes are free, and"
            f" {limit} must stay free (DARKROOM_MIN_FREE_BYTES)"
        )
        raise ApiError(503, "no_space", message, retry_after=60)
