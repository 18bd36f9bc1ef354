"""Signs of life of the workers, for web processes that have none of their own."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from sqlalchemy import update

from service.db.batching import BatchingStore
from service.db.counters import counter, set_counter
from service.db.tables import counters
from service.db.transaction import Transaction
from service.errors import StoreUnavailable

BEAT_S = 5.0
SILENT_MS = 30_000
COUNTER = "worker"  # the time at which workers were last alive


async def beat(store: BatchingStore, alive: Callable[[], bool]) -> None:
    """Writes a sign of life every `BEAT_S` until cancelled."""
    while True:
        if alive():
            with suppress(StoreUnavailable):
                # Urgent writes go first in their transaction, so that two processes lock this row
                # and other rows in the same order.
                await store.write(note_beats, None, urgent=True)
        await asyncio.sleep(BEAT_S)


def note_beats(tx: Transaction, items: Sequence[None]) -> list[None]:
    beaten = update(counters).where(counters.c.name == COUNTER).values(value=tx.now)
    if not tx.connection.execute(beaten).rowcount:
        set_counter(tx, COUNTER, tx.now)
    return [None] * len(items)


@dataclass(frozen=True, slots=True)
class WorkerWatch:
    """The knowledge of workers in a process without them. `since` is when it began to watch."""

    store: BatchingStore
    since: int

    async def missing(self) -> bool:
        """Whether no worker was alive for `SILENT_MS`."""
        seen = await self.store.read(counter, COUNTER)
        return self.store.clock() - max(seen, self.since) > SILENT_MS
