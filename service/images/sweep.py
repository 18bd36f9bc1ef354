"""Removing blobs that no row names: those of downloads that a crash, a cancel or an erasure left
behind.

Harmless in several processes at once: a blob goes only if it is over 24 h old by its store's clock
and its task has ended, saves nothing any more and names it nowhere. Blobs of tasks that this store
does not know stay: they are another installation's, or newer than the backup that this store was
restored from.
"""

import asyncio
import time
from dataclasses import dataclass

import structlog

from service.ids import BLOB
from service.images import image_queries
from service.queue.periodic import hourly
from service.resources import Resources

log = structlog.get_logger()


PAUSE_S = 0.05  # between pages: a large store is walked through in passing


AGE_MS = 86_400_000


@dataclass(frozen=True, slots=True)
class Sweeper:
    """A job of every process with workers."""

    resources: Resources

    async def run(self) -> None:
        await hourly(self.resources, "sweep", self.sweep)

    async def sweep(self) -> int:
        """Goes through every blob once; how many were removed. BlobUnavailable, StoreUnavailable:
        what it did not reach waits.
        """
        store, blobs = self.resources.store, self.resources.blobs
        started, before, seen, removed = time.perf_counter(), self.resources.clock() - AGE_MS, 0, 0
        try:
            async for page in blobs.listed():
                seen += len(page)
                old = [
                    blob.name
                    for blob in page
                    if blob.modified_at < before and BLOB.fullmatch(blob.name)
                ]
                for name in await store.read(image_queries.orphans, old) if old else ():
                    if await store.read(
                        image_queries.orphans, [name]
                    ):  # still: a late result may have come meanwhile
                        await blobs.delete(name)
                        removed += 1
                await asyncio.sleep(PAUSE_S)
        finally:
            log.info(
                "blobs.swept",
                seen=seen,
                removed=removed,
                duration_ms=round((time.perf_counter() - started) * 1000),
            )
        return removed
