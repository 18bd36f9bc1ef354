"""Erasure and retention: a task's content goes when its owner erases it, and old events,
deliveries, callbacks, prompts and images go by time.

Several processes may run retention at once. It pauses between its transactions, so that other
writes have their turn. Blobs are deleted after the commit that forgets them. The sweep removes
what a crash in between leaves behind.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog
from structlog.contextvars import bind_contextvars

from service.db.batching import Item, Result
from service.db.paging import Owned
from service.db.transaction import Transaction
from service.errors import BlobUnavailable
from service.queue.checkpoints import checkpoint
from service.resources import Resources
from service.tasks.audit import forget_acts
from service.tasks.files import forget_file_rows, forget_files
from service.tasks.upstream_copies import forget_copy
from service.upkeep import retention_sql

log = structlog.get_logger()

PAUSE_S = 0.02  # at least, between transactions
DAY_MS = 86_400_000


async def erase(resources: Resources, task_id: str, owner: str | None) -> str | None:
    """Erases a task for good. Returns None, or why not: `missing`, or the state of a task that has
    not ended.
    """
    erased = await resources.store.write(retention_sql.erase_tasks, Owned(task_id, owner))
    checkpoint("erase.committed")
    if erased.refused is None:
        if erased.upstream_id:
            bind_contextvars(upstream_id=erased.upstream_id)
        log.info("task.erased", images=len(erased.blobs))
        try:
            for name in erased.blobs:
                await resources.blobs.delete(name)
        except BlobUnavailable as error:
            # The images' links respond 410 already, and the sweep will find the blobs.
            log.error("blobs.failed", message=str(error), exception=repr(error))  # noqa: TRY400
        for copy in erased.copies:
            await forget_copy(resources, copy)
    return erased.refused


@dataclass(frozen=True, slots=True)
class Retention:
    """`image_days` None: images are kept forever. `clock` is the store's, in milliseconds."""

    resources: Resources
    days: float
    image_days: float | None
    audit_days: float
    clock: Callable[[], int]

    async def apply(self) -> dict[str, int]:
        """Removes what is old, the oldest first, and returns how many of each kind.

        BlobUnavailable, StoreUnavailable: the rest waits for the next run.
        """
        started = time.perf_counter()
        removed = {"events": 0, "deliveries": 0, "tasks": 0, "images": 0, "files": 0}
        before = self.clock() - round(self.days * DAY_MS)
        try:
            await self._events(before, removed)
            while await self._write(retention_sql.forget_replays, before):
                pass
            while (stripped := await self._write(retention_sql.strip_tasks, before)).tasks:
                removed["tasks"] += stripped.tasks
                await self._delete(stripped.blobs)
            while blobs := await self._write(forget_files, self.clock()):
                removed["files"] += len(blobs)
                await self._delete(blobs)
            await self._write(forget_file_rows, self.clock())
            before = self.clock() - round(self.audit_days * DAY_MS)
            while await self._write(forget_acts, before):
                pass
            if self.image_days is not None:
                before = self.clock() - round(self.image_days * DAY_MS)
                while blobs := await self._write(retention_sql.forget_images, before):
                    removed["images"] += len(blobs)
                    await self._delete(blobs)
        finally:
            duration_ms = round((time.perf_counter() - started) * 1000)
            log.info("retention.applied", **removed, duration_ms=duration_ms)
        return removed

    async def _delete(self, blobs: Sequence[str]) -> None:
        for name in blobs:
            await self.resources.blobs.delete(name)

    async def _events(self, before: int, removed: dict[str, int]) -> None:
        last, read = 0, self.resources.store.read
        while (page := await read(retention_sql.old_events, last, before)) is not None:
            count = retention_sql.DELIVERIES
            while count == retention_sql.DELIVERIES:  # there may be more
                count = await self._write(retention_sql.forget_deliveries, page.events)
                removed["deliveries"] += count
            removed["events"] += await self._write(retention_sql.forget_events, page.events)
            last = page.last

    async def _write(
        self, operation: Callable[[Transaction, Sequence[Item]], Sequence[Result]], item: Item
    ) -> Result:
        """Writes, and then leaves the writer to other work for as long as that took."""
        started = time.perf_counter()
        result = await self.resources.store.write(operation, item)
        await asyncio.sleep(max(PAUSE_S, time.perf_counter() - started))
        return result
