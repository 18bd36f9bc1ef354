"""What goes: the content of a task that its owner erases; events, deliveries, callbacks, prompts
and images when their days are over.

Harmless in several processes at once. What is old is found by reading, so that the writer is held
only while a batch goes; then others have their turn. Images go after the commit that forgets them:
what a crash in between leaves behind is swept as nobody's.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from service.db.store import Item, Result
from service.db.transaction import Transaction
from service.errors import BlobUnavailable
from service.queue.checkpoints import checkpoint
from service.resources import Resources
from service.upkeep import batches, expiry

log = structlog.get_logger()

BATCH, TASKS = (
    50,
    10,
)  # looked at together; how much of them a transaction takes is `portions.LIMIT`
PAUSE_S = 0.05  # between batches
DAY_MS = 86_400_000


async def erase(resources: Resources, task_id: str, owner: str | None) -> str | None:
    """Erases a task for good; None, or why not: `missing`, or the state of one that has not ended.

    In one transaction, or in several if there is much: its content last, so that whoever dies in
    between is asked again.
    """
    erased = expiry.Erased(left=True)
    while erased.left:  # each time less of it is: what a task gets after its end is counted
        part = await resources.store.read(batches.erased_part, task_id, batches.LIMIT)
        erased = await resources.store.write(
            expiry.erase_tasks, expiry.Erasure(task_id, owner, part)
        )
    checkpoint("erase.committed")
    if erased.refused is None:
        log.info("task.erased", images=len(erased.blobs))
        try:
            for name in erased.blobs:
                await resources.blobs.delete(name)
        except (
            BlobUnavailable
        ) as error:  # no link leads there any more, and the sweep will find them
            # needs no traceback
            log.error("blobs.failed", message=str(error), exception=repr(error))  # noqa: TRY400
    return erased.refused


@dataclass(frozen=True, slots=True)
class Retention:
    """A job of every process with workers. `image_days` None: images are kept for ever."""

    resources: Resources
    days: float
    image_days: float | None
    clock: Callable[[], int]  # the store's: milliseconds

    async def apply(self) -> dict[str, int]:
        """Removes what is old, the oldest first; how many of each. BlobUnavailable,
        StoreUnavailable: what it did not reach waits.
        """
        started, removed = (
            time.perf_counter(),
            {"events": 0, "deliveries": 0, "tasks": 0, "images": 0},
        )
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
        last, read = 0, self.resources.store.read
        while (
            page := await read(expiry.old_events, last, before, BATCH, batches.LIMIT.bytes)
        ) is not None:
            while (
                old := await read(expiry.old_deliveries, page.events, batches.LIMIT)
            ) is not None:
                part, whole = old.part, old.whole
                gone = await (
                    self._go(expiry.thin_deliveries, part)
                    if part
                    else self._go(expiry.forget_deliveries, whole)
                )
                removed["deliveries"] += 0 if part else gone
                if not gone:
                    break  # they were taken up again, and keep their event
            removed["events"] += await self._go(expiry.forget_events, page.events)
            last = page.last
        gone = 1
        while gone:
            gone = await self._go(expiry.forget_replays, before)

    async def _tasks(self, before: int, removed: dict[str, int]) -> None:
        while (
            old := await self.resources.store.read(expiry.old_tasks, before, batches.LIMIT, TASKS)
        ) is not None:
            gone = await (
                self._go(expiry.thin_tasks, old.part)
                if old.part
                else self._go(expiry.strip_tasks, old.whole)
            )
            removed["tasks"] += 0 if old.part else gone
            if not gone:
                break  # they were taken up again; the next pass looks at the rest

    async def _images(self, before: int, removed: dict[str, int]) -> None:
        while ids := await self.resources.store.read(expiry.old_images, before, BATCH):
            if not (blobs := await self._go(expiry.forget_images, ids)):
                break
            for name in blobs:
                await self.resources.blobs.delete(name)
            removed["images"] += len(blobs)

    async def _go(
        self, operation: Callable[[Transaction, Sequence[Item]], Sequence[Result]], item: Item
    ) -> Result:
        result = await self.resources.store.write(operation, item)
        await asyncio.sleep(PAUSE_S)
        return result
