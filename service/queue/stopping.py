"""The end of a process."""

import math
import time
from dataclasses import dataclass

from service.db.batching import BatchingStore
from service.queue.worker import WorkerPool


@dataclass(slots=True)
class Stopping:
    """The end of a process. Requests and work in flight share one limit of `limit_s` seconds."""

    store: BatchingStore
    pool: WorkerPool
    limit_s: float
    deadline: float = math.inf

    def quiesce(self) -> None:
        """Starts no new work, and answers the requests that wait for a task or an event."""
        self.deadline = min(self.deadline, time.monotonic() + self.limit_s)
        self.pool.quiesce()
        self.store.signals.stop()

    async def drained(self) -> float:
        """Waits for work in flight within the limit. Returns the seconds that are left."""
        await self.pool.drained(self.left())
        return self.left()

    def left(self) -> float:
        return max(0, self.deadline - time.monotonic())
