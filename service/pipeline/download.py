"""Saving results: fetched through the guard, checked, hashed, made durable; the link that dies first goes first.

A blob's name is the same after a crash, so a download that is done again changes nothing.
"""

import asyncio
import hashlib
import time
from dataclasses import dataclass

import structlog

from service.blobs import CHUNK, Incoming
from service.errors import BlobUnavailable, EgressError, EgressRefused
from service.pipeline.picture import NoPicture, inspect
from service.pipeline.retry import retry_after, wait_before
from service.resources import Resources
from service.store import Grant, queries
from service.store.operations import leases
from service.store.operations.images import Download, Lost, Retry, Stored, record_downloads
from service.store.records import Row

log = structlog.get_logger()

CALL_S = 300.0
IDLE_S = 15.0
STALE = (403, 404, 410)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a try brought no picture."""

    reason: str
    final: bool = False
    stale: bool = False
    wrong_sha256: str | None = None
    retry_after: float | None = None


@dataclass(frozen=True, slots=True)
class Downloader:
    """Stage `download`. `decoding` limits how many pictures are decoded at once."""

    resources: Resources
    schedule: tuple[float, ...]
    max_bytes: int
    max_pixels: int
    decoding: asyncio.Semaphore

    async def run(self, grant: Grant) -> None:
        row = await self.resources.store.read(queries.download, grant.key)
        if row is None or row["state"] != "pending":
            await self.resources.store.write(leases.done, grant)
            return
        started = time.perf_counter()
        try:
            async with self.resources.blobs.incoming() as file:
                outcome = await self._save(row, file)
        except EgressRefused as error:
            outcome = Failure(str(error), final=True)
        except (EgressError, BlobUnavailable) as error:
            outcome = Failure(f"{type(error).__name__}: {error}")
        await self._record(grant, row, outcome, time.perf_counter() - started)

    async def _save(self, row: Row, file: Incoming) -> Stored | Failure:
        fetched = await self._fetch(row["source_url"], file)
        if isinstance(fetched, Failure):
            return fetched
        async with self.decoding:
            picture = await asyncio.to_thread(inspect, file.path, self.max_pixels)
        if isinstance(picture, NoPicture):
            return Failure(picture.reason, final=picture.final, wrong_sha256=fetched)
        blob = f"{row['task_id']}/{row['position']}-{fetched}.{picture.extension}"
        await self.resources.blobs.put(file, blob, picture.media_type)
        return Stored(blob, picture.media_type, file.size, fetched, picture.width, picture.height)

    async def _fetch(self, url: str, file: Incoming) -> str | Failure:
        """Streams the result into the file; its sha256."""
        digest = hashlib.sha256()
        async with self.resources.results.stream("GET", url, timeout=CALL_S, idle=IDLE_S) as answer:
            if answer.status != 200:
                wait = retry_after(answer.headers.get("retry-after"), self.resources.clock() / 1000)
                return Failure(f"answered {answer.status}", stale=answer.status in STALE, retry_after=wait)
            gathered = bytearray()  # each write is a hop to another thread: few and large ones
            async for chunk in answer.chunks():
                digest.update(chunk)
                gathered += chunk
                if file.size + len(gathered) > self.max_bytes:
                    return Failure(f"over {self.max_bytes} bytes", final=True)
                if len(gathered) >= CHUNK:
                    await file.write(bytes(gathered))
                    gathered.clear()
            await file.write(bytes(gathered))
        return digest.hexdigest()

    async def _record(self, grant: Grant, row: Row, outcome: Stored | Failure, seconds: float) -> None:
        known = {"task_id": row["task_id"], "owner": row["owner"], "index": row["position"]}
        wait = 0.0
        if isinstance(outcome, Stored):
            result: Stored | Retry | Lost = outcome
        elif outcome.final:
            result = Lost(outcome.reason)
        else:
            random = self.resources.random()
            wait = max(
                wait_before(self.schedule, grant.attempts, repeat_last=True, random=random, spread=0.2) or 0, outcome.retry_after or 0
            )
            result = Retry(outcome.reason, round(wait * 1000), outcome.stale, outcome.wrong_sha256)
        state = await self.resources.store.write(record_downloads, Download(grant, row["task_id"], row["source_url"], result))
        metrics = self.resources.metrics
        metrics.downloads.labels({"stored": "stored", "lost": "lost", "pending": "retry"}.get(state or "", "superseded")).inc()
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
            log.error("image.lost", **known, reason=outcome.reason, attempt=grant.attempts)
        elif state == "pending" and isinstance(outcome, Failure):
            log.warning("image.retry", **known, reason=outcome.reason, attempt=grant.attempts, wait_s=round(wait, 3))
