"""Removing blobs that no row names: those of downloads that a crash, a cancel or an erasure left
behind.

Harmless in several processes at once: a blob goes only if it is over 24 h old by its store's clock
and its task has ended, saves nothing any more and names it nowhere. Blobs of tasks that this store
does not know stay: they are another installation's, or newer than the backup that this store was
restored from.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from service.errors import BlobUnavailable, StoreUnavailable
from service.model import BLOB
from service.resources import Resources
from service.store import queries

log = structlog.get_logger()

EVERY_S = 3600.0
PAUSE_S = 0.05  # between pages: a large store is walked through in passing
AGE_MS = 86_400_000


async def hourly(
    resources: Resources, stage: str, job: Callable[[], Awaitable[object]], *, at_once: bool = False
) -> None:
    """Does a job until cancelled: within the first hour or `at_once`, then about every hour, so
    that processes don't all do it together.
    """
    wait = 0.0 if at_once else EVERY_S * resources.random()
    while True:
        await asyncio.sleep(wait)
        wait = EVERY_S * (0.9 + 0.2 * resources.random())
        try:
            await job()
        except Exception as error:  # the next one must come whatever became of this one
            known = {
                "stage": stage,
                "key": None,
                "attempt": 1,
                "wait_s": round(wait),
                "exception": repr(error),
            }
            unforeseen = None if isinstance(error, BlobUnavailable | StoreUnavailable) else error
            # a store that is away needs no traceback
            log.error("worker.failed", **known, exc_info=unforeseen)  # noqa: TRY400
            resources.metrics.worker_faults.labels(stage).inc()


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
                for name in await store.read(queries.orphans, old) if old else ():
                    if await store.read(
                        queries.orphans, [name]
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
