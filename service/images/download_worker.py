"""Saving results: fetched through the guard, checked, hashed, made durable; the link that dies
first goes first.

A blob's name is the same after a crash, so a download that is done again changes nothing. Memory:
each place of `DOWNLOAD_CONCURRENCY` takes up to 4 MiB while it fetches; each of
`DECODE_CONCURRENCY`, in a process of its own, 40 MiB, and while it decodes up to 24 bytes for a
pixel of the largest picture (16 for WEBP, 12 for JPEG, 6 for PNG, the most for deep AVIF) and three
times `MAX_IMAGE_BYTES`: 1.8 GiB at the limits' defaults, given back afterwards.
"""

import time
from dataclasses import dataclass

import structlog
from structlog.contextvars import bind_contextvars

from service.blobs.base import Incoming
from service.db.paging import Row
from service.db.transaction import Lease
from service.errors import BlobUnavailable, EgressError, EgressRefused
from service.ids import blob_name
from service.images import image_queries
from service.images.downloads import Download, Lost, Retry, Stored, record_downloads
from service.images.fetch import Failure, fetch
from service.images.inspect_image import NoPicture
from service.images.validator import Examiner
from service.queue import leases
from service.queue.backoff import wait_before
from service.queue.checkpoints import checkpoint
from service.resources import Resources

log = structlog.get_logger()

PACKED = ("gzip", "x-gzip", "deflate")


@dataclass(frozen=True, slots=True)
class Downloader:
    """Stage `download`."""

    resources: Resources
    examiner: Examiner
    schedule: tuple[float, ...]
    max_bytes: int

    async def run(self, lease: Lease) -> None:
        row = await self.resources.store.read(image_queries.download, lease.key)
        if row is None or row["state"] != "pending":
            await self.resources.store.write(leases.done, lease)
            return
        bind_contextvars(
            task_id=row["task_id"], owner=row["owner"]
        )  # for what the guard refuses; this job has a context of its own
        started = time.perf_counter()
        try:
            async with self.resources.blobs.incoming() as file:
                outcome = await self._save(row, file)
        except EgressRefused as error:
            outcome = Failure(str(error), final=True)
        except (EgressError, BlobUnavailable) as error:
            outcome = Failure(f"{type(error).__name__}: {error}")
        await self._record(lease, row, outcome, time.perf_counter() - started)

    async def _save(self, row: Row, file: Incoming) -> Stored | Failure:
        fetched = await fetch(
            self.resources.results,
            row["source_url"],
            file,
            self.max_bytes,
            self.resources.clock() / 1000,
        )
        if isinstance(fetched, Failure):
            return fetched
        checkpoint("download.fetched")
        examined = await self.examiner.examine(file.path, packed=fetched in PACKED)
        sha256, picture = examined.sha256, examined.verdict
        if isinstance(picture, NoPicture):
            return Failure(picture.reason, final=picture.final, wrong_sha256=sha256 or None)
        blob = blob_name(row["task_id"], row["position"], sha256, picture.media_type)
        await self.resources.blobs.put(file, blob, picture.media_type)
        checkpoint("download.saved")
        return Stored(
            blob, picture.media_type, examined.bytes, sha256, picture.width, picture.height
        )

    async def _record(
        self, lease: Lease, row: Row, outcome: Stored | Failure, seconds: float
    ) -> None:
        known = {"task_id": row["task_id"], "owner": row["owner"], "index": row["position"]}
        wait = 0.0
        if isinstance(outcome, Stored):
            result: Stored | Retry | Lost = outcome
        elif outcome.final:
            result = Lost(outcome.reason)
        else:
            random = self.resources.random()
            wait = max(
                wait_before(
                    self.schedule, lease.attempts, repeat_last=True, random=random, spread=0.2
                )
                or 0,
                outcome.retry_after or 0,
            )
            result = Retry(outcome.reason, round(wait * 1000), outcome.stale, outcome.wrong_sha256)
        state = await self.resources.store.write(
            record_downloads, Download(lease, row["task_id"], row["source_url"], result)
        )
        checkpoint("download.recorded")
        metrics = self.resources.metrics
        metrics.downloads.labels(
            {"stored": "stored", "lost": "lost", "pending": "retry"}.get(state or "", "superseded")
        ).inc()
        if state == "stored" and isinstance(outcome, Stored):
            metrics.download_bytes.inc(outcome.bytes)
            log.info(
                "image.stored",
                **known,
                media_type=outcome.media_type,
                bytes=outcome.bytes,
                width=outcome.width,
                height=outcome.height,
                sha256=outcome.sha256,
                duration_ms=round(seconds * 1000),
            )
        elif state == "lost" and isinstance(outcome, Failure):
            log.error("image.lost", **known, reason=outcome.reason, attempt=lease.attempts)
        elif state == "pending" and isinstance(outcome, Failure):
            log.warning(
                "image.retry",
                **known,
                reason=outcome.reason,
                attempt=lease.attempts,
                wait_s=round(wait, 3),
            )
