"""The download worker fetches results, validates them and stores them. The link that expires first
goes first.

A blob's name is made from its content, so a download that runs again after a crash changes nothing.

Memory: each slot of `DOWNLOAD_CONCURRENCY` takes up to 4 MiB while it fetches. Each child of
`DECODE_CONCURRENCY` takes 40 MiB, and while it decodes three times `MAX_IMAGE_BYTES` and up to 24
bytes per pixel of the largest image (16 for WEBP, 12 for JPEG, 6 for PNG). With the default limits
that is 1.8 GiB, which is freed afterwards.
"""

import asyncio
import hashlib
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from service.blobs.blob_store import CHUNK, Incoming, in_thread
from service.content_coding import is_compressed
from service.db.transaction import Lease
from service.errors import BlobUnavailable, EgressError, EgressRefused
from service.ids import blob_name, quarantine_name
from service.images.downloads import (
    Download,
    Lost,
    Quarantined,
    Refusal,
    Retry,
    Stored,
    image_and_origin,
    record_downloads,
)
from service.images.validated_image import InvalidImage, Validation
from service.images.validator import ImageValidator
from service.links import is_data, usable
from service.net.responses import retry_after
from service.ops import tracing
from service.ops.tracing import NO_ORIGIN
from service.queue import leases
from service.queue.backoff import scheduled_wait
from service.queue.checkpoints import checkpoint
from service.resources import Resources
from service.tasks import task_queries
from service.tasks.rows import ImageRow
from service.upstreams.base import NoAnswer

log = structlog.get_logger()

FETCH_S, IDLE_S = 300.0, 15.0
WHOLE, STALE = (200, 201, 203), (403, 404, 410)
CUT_TRIES = 3


@dataclass(frozen=True, slots=True)
class Fetched:
    """A body that is in its file. `cut`: it is shorter than its framing says."""

    compressed: bool
    cut: EgressError | None


@dataclass(frozen=True, slots=True)
class DownloadWorker:
    """Stage `download`."""

    resources: Resources
    validator: ImageValidator
    schedule: tuple[float, ...]
    max_bytes: int
    min_free_bytes: int

    async def run(self, lease: Lease) -> None:
        row, origin = lease.row if isinstance(lease.row, tuple) else (None, NO_ORIGIN)
        if row is None:
            row, origin = await self.resources.store.look_up(image_and_origin, lease.key)
        if row is None or row.state != "pending":
            await self.resources.store.write(leases.done, lease)
            return
        tracing.work_for(origin, task_id=row.task_id, owner=row.owner)
        started = time.perf_counter()
        about = {"darkroom.task.id": row.task_id, "darkroom.image.id": row.id}
        with (
            self.resources.shared_commits.download(row.task_id),
            tracing.span("download", attributes=about) as span,
        ):
            outcome = await self._outcome(row, lease.attempts)
            if not isinstance(outcome, Stored):
                span.fail("lost" if isinstance(outcome, Lost) else "retry")
        await self._record(lease, row, outcome, time.perf_counter() - started)

    async def _outcome(self, row: ImageRow, attempt: int) -> Stored | Retry | Lost:
        try:
            async with self.resources.blobs.incoming() as file:
                return await self._save(row, file, attempt)
        except EgressRefused as error:
            return _refused(error, row.source_url)
        except (EgressError, BlobUnavailable) as error:
            return Retry(f"{type(error).__name__}: {error}")

    async def _save(self, row: ImageRow, file: Incoming, attempt: int) -> Stored | Retry | Lost:
        if is_data(row.source_url):
            fetched = await self._decode(row, file)
        else:
            fetched = await self._fetch(row.source_url, file, attempt)
        if not isinstance(fetched, Fetched):
            return fetched
        checkpoint("download.fetched")
        validating = self.validator.validate(file.path, compressed=fetched.compressed)
        validation, _ = await asyncio.gather(validating, file.sync())
        image, sha256 = validation.result, validation.sha256
        if isinstance(image, InvalidImage):
            if fetched.cut is not None and not image.final:
                raise fetched.cut
            body = await self._quarantine(row, file, validation)
            if image.final:
                return Lost(image.reason, body)
            return Retry(image.reason, wrong_sha256=sha256 or None, quarantined=body)
        blob = blob_name(row.task_id, row.position, sha256, image.media_type)
        await self.resources.blobs.put(file, blob, image.media_type)
        checkpoint("download.saved")
        return Stored(blob, image.media_type, validation.bytes, sha256, image.width, image.height)

    async def _quarantine(
        self, row: ImageRow, file: Incoming, validation: Validation
    ) -> Quarantined | None:
        """Keeps a body that is no image for the operator. None: it is empty, or images need the
        space. BlobUnavailable.
        """
        blobs, size, sha256 = self.resources.blobs, validation.bytes, validation.sha256
        if not sha256:
            size, sha256 = await in_thread(measure, file.path)
        blob = quarantine_name(row.task_id, row.position, sha256)
        if blob != row.blob:
            free = await blobs.free_bytes()
            if not size or (free is not None and free < self.min_free_bytes):
                return None
            await blobs.put(file, blob, "application/octet-stream")
        return Quarantined(blob, size, sha256)

    async def _decode(self, row: ImageRow, file: Incoming) -> Fetched | Retry | Lost:
        """Writes the image of a row that keeps only the hash of its `data:` URL. The upstream is
        asked for its answer again, so that the store need not hold images.
        """
        resources = self.resources
        task = await resources.store.look_up(task_queries.task_row, row.task_id, None)
        if task is None or task.upstream_id is None:
            return Retry("the task has no id at the upstream")
        async with resources.limiter.slot("confirm"):
            upstream = resources.upstreams[task.upstream]
            try:
                content = await upstream.inline_result(task.upstream_id, row.source_url)
            except ValueError as error:
                return Retry(str(error), stale=True)
        if content is None:
            return Retry("the upstream has other results now", stale=True)
        if isinstance(content, NoAnswer):
            return Retry(content.reason, round((content.retry_after or 0) * 1000))
        if len(content) > self.max_bytes:
            return Lost(f"over {self.max_bytes} bytes")
        await file.write(content)
        return Fetched(compressed=False, cut=None)

    async def _fetch(self, url: str, file: Incoming, attempt: int) -> Fetched | Retry | Lost:
        """Writes the body into the file.

        The type that the response names is ignored. A body shorter than its framing says is an
        EgressError. At the third attempt it is validated all the same, because some servers
        announce a wrong length every time. EgressError, BlobUnavailable.
        """
        stream = self.resources.results.stream("GET", url, timeout=FETCH_S, idle=IDLE_S)
        async with stream as response:
            if response.status not in WHOLE:
                now = self.resources.clock() / 1000
                wait = retry_after(response.headers.get("retry-after"), now) or 0
                reason, stale = f"answered {response.status}", response.status in STALE
                return Retry(reason, round(wait * 1000), stale)
            cut: EgressError | None = None
            buffer = bytearray()  # each write goes to a thread and back, so pieces are large
            try:
                async for chunk in response.chunks():
                    buffer += chunk
                    if file.size + len(buffer) > self.max_bytes:
                        return Lost(f"over {self.max_bytes} bytes")
                    if len(buffer) >= CHUNK:
                        await file.write(bytes(buffer))
                        buffer.clear()
            except EgressError as error:
                if attempt < CUT_TRIES:
                    raise
                cut = error
            await file.write(bytes(buffer))
            return Fetched(is_compressed(response.headers.get("content-encoding", "")), cut)

    async def _record(
        self, lease: Lease, row: ImageRow, outcome: Stored | Retry | Lost, seconds: float
    ) -> None:
        if isinstance(outcome, Retry):
            wait_s = scheduled_wait(self.schedule, lease.attempts, self.resources.random())
            outcome = replace(outcome, wait_ms=max(round(wait_s * 1000), outcome.wait_ms))
        download = Download(lease, row.task_id, row.source_url, outcome)
        state = await self.resources.store.write(record_downloads, download)
        checkpoint("download.recorded")
        metrics = self.resources.metrics
        counted = {"stored": "stored", "lost": "lost", "pending": "retry", None: "superseded"}
        metrics.downloads.labels(counted[state]).inc()
        if state is not None:
            self._log(lease, row, outcome, state, seconds)
            await self._forget_body(row, outcome)

    def _log(
        self,
        lease: Lease,
        row: ImageRow,
        outcome: Stored | Retry | Lost,
        state: str,
        seconds: float,
    ) -> None:
        fields = {"task_id": row.task_id, "owner": row.owner, "index": row.position}
        if isinstance(outcome, Stored):
            self.resources.metrics.download_bytes.inc(outcome.bytes)
            image = {
                "media_type": outcome.media_type,
                "bytes": outcome.bytes,
                "width": outcome.width,
                "height": outcome.height,
                "sha256": outcome.sha256,
            }
            log.info("image.stored", **fields, **image, duration_ms=round(seconds * 1000))
            return
        kept = outcome.quarantined.blob if outcome.quarantined else None
        failure = {"reason": outcome.reason, "attempt": lease.attempts, "quarantined": kept}
        if state == "lost":
            log.error("image.lost", **fields, **failure)
        elif isinstance(outcome, Retry):
            wait_s = round(outcome.wait_ms / 1000, 3)
            log.warning("image.retry", **fields, **failure, wait_s=wait_s)

    async def _forget_body(self, row: ImageRow, outcome: Stored | Retry | Lost) -> None:
        """Deletes a body in quarantine that an image or a newer body replaced. The sweep removes
        what a failure leaves.
        """
        blob = outcome.blob if isinstance(outcome, Stored) else None
        if not isinstance(outcome, Stored) and outcome.quarantined is not None:
            blob = outcome.quarantined.blob
        if row.blob is not None and blob not in (None, row.blob):
            with suppress(BlobUnavailable):
                await self.resources.blobs.delete(row.blob)


def _refused(error: EgressRefused, url: str) -> Retry | Lost:
    """A link without a form that could be fetched was asked for again before its row was made."""
    if error.for_now and error.host:
        return Retry(str(error), refused=Refusal(error.host, error.setting))
    return Retry(str(error), unreadable=True) if error.for_now and usable(url) else Lost(str(error))


def measure(path: Path) -> tuple[int, str]:
    """The length and the SHA-256 of a file."""
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
