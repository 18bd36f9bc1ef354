"""What goes: the content of a task that its owner erases; events, deliveries, callbacks, prompts and images when their days are over.

Harmless in several processes at once. What is old is found by reading, so that the writer is held only while a batch goes; then others have
their turn. Images go after the commit that forgets them: what a crash in between leaves behind is swept as nobody's.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import structlog

from service.errors import BlobUnavailable
from service.pipeline.checkpoints import checkpoint
from service.pipeline.sweep import hourly
from service.resources import Resources
from service.store import Transaction
from service.store.operations import retention

log = structlog.get_logger()

# Of a transaction, so that nobody waits 50 ms for the writer. A task has its callbacks and its timeline besides; the bytes are those of
# bodies, and more than these only where one task or event has more: 21 callbacks of 256 KiB, and a request of 1 MiB.
BATCH, TASKS, BYTES = 50, 10, 1 << 20
PAUSE_S = 0.05  # between batches
DAY_MS = 86_400_000

Result = TypeVar("Result")


async def erase(resources: Resources, task_id: str, owner: str | None) -> str | None:
    """Erases a task for good; None, or why not: `missing`, or the state of one that has not ended."""
    erased = await resources.store.write(retention.erase_tasks, retention.Erasure(task_id, owner))
    checkpoint("erase.committed")
    if erased.refused is None:
        log.info("task.erased", images=len(erased.blobs))
        try:
            for name in erased.blobs:
                await resources.blobs.delete(name)
        except BlobUnavailable as error:  # no link leads there any more, and the sweep will find them
            log.error("blobs.failed", message=str(error), exception=repr(error))  # noqa: TRY400 - needs no traceback
    return erased.refused


@dataclass(frozen=True, slots=True)
class Retention:
    """A job of every process with workers. `image_days` None: images are kept for ever."""

    resources: Resources
    days: float
    image_days: float | None
    clock: Callable[[], int]  # the store's: milliseconds

    async def run(self) -> None:
        await hourly(self.resources, "retention", self.apply)

    async def apply(self) -> dict[str, int]:
        """Removes what is old, the oldest first; how many of each. BlobUnavailable, StoreUnavailable: what it did not reach waits."""
        started, removed = time.perf_counter(), {"events": 0, "deliveries": 0, "tasks": 0, "images": 0}
        before = self.clock() - round(self.days * DAY_MS)
        try:
            await self._outbox(before, removed)
            await self._tasks(before, removed)
            if self.image_days is not None:
                await self._images(self.clock() - round(self.image_days * DAY_MS), removed)
        finally:
            log.info(
                "retention.applied",
                events=removed["events"],
                deliveries=removed["deliveries"],
                tasks=removed["tasks"],
                images=removed["images"],
                duration_ms=round((time.perf_counter() - started) * 1000),
            )
        return removed

    async def _outbox(self, before: int, removed: dict[str, int]) -> None:
        last = 0
        while (page := await self.resources.store.read(retention.old_events, last, before, BATCH, BYTES)) is not None:
            for first in range(0, len(page.deliveries), BATCH):
                removed["deliveries"] += await self._go(retention.forget_deliveries, page.deliveries[first : first + BATCH])
            removed["events"] += await self._go(retention.forget_events, page.events)
            last = page.last
        await self.resources.store.write(retention.forget_replays, before)

    async def _tasks(self, before: int, removed: dict[str, int]) -> None:
        while ids := await self.resources.store.read(retention.old_tasks, before, TASKS, BYTES):
            if not (count := await self._go(retention.strip_tasks, ids)):
                break  # they were taken up again; the next pass looks at the rest
            removed["tasks"] += count

    async def _images(self, before: int, removed: dict[str, int]) -> None:
        while ids := await self.resources.store.read(retention.old_images, before, BATCH):
            if not (blobs := await self._go(retention.forget_images, ids)):
                break
            for name in blobs:
                await self.resources.blobs.delete(name)
            removed["images"] += len(blobs)

    async def _go(self, operation: Callable[[Transaction, Sequence[Sequence[str]]], Sequence[Result]], ids: Sequence[str]) -> Result:
        result = await self.resources.store.write(operation, ids)
        await asyncio.sleep(PAUSE_S)
        return result
