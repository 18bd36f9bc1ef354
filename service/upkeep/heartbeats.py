"""Signs of life of the processes on one store, and of the workers in them."""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress

from sqlalchemy import Connection, delete, select, update

from service.db.batching import BatchingStore
from service.db.counters import counter, set_counter
from service.db.tables import counters
from service.db.transaction import Transaction
from service.errors import StoreUnavailable

BEAT_S = 10.0
SILENT_MS = 30_000
FORGET_MS = 3_600_000
ROLES = ("serve", "web", "worker")
COUNTER = "worker"  # the time at which workers were last alive
PROCESS = "process "  # with a role and a process behind it: when that process was last alive


async def beat(store: BatchingStore, role: str, alive: Callable[[], bool]) -> None:
    """Writes signs of life every `BEAT_S` until cancelled: that of this process, and that of its
    workers while they are `alive`.
    """
    while True:
        with suppress(StoreUnavailable):
            # Urgent writes go first in their transaction, so that two processes lock these rows
            # and other rows in the same order.
            await store.write(note_beats, (role, alive()), urgent=True)
        await asyncio.sleep(BEAT_S)


def note_beats(tx: Transaction, items: Sequence[tuple[str, bool]]) -> list[None]:
    role, alive = items[-1]
    names = [*([COUNTER] if alive else []), f"{PROCESS}{role} {tx.process[-8:]}"]
    beaten = update(counters).where(counters.c.name.in_(names)).values(value=tx.now)
    if tx.connection.execute(beaten).rowcount < len(names):
        for name in names:
            set_counter(tx, name, tx.now)
    return [None] * len(items)


def processes(connection: Connection, now: int) -> dict[str, int]:
    """How many processes of each role gave a sign of life in the last `SILENT_MS`. Empty: none
    gives any, because the store is for one process.
    """
    alive = counters.c.name.startswith(PROCESS), counters.c.value >= now - SILENT_MS
    names = connection.scalars(select(counters.c.name).where(*alive))
    counts = Counter(name.split(" ")[1] for name in names)
    return {role: counts[role] for role in ROLES} if counts else {}


def forget_processes(tx: Transaction, items: Sequence[None]) -> list[None]:
    old = counters.c.name.startswith(PROCESS), counters.c.value < tx.now - FORGET_MS
    tx.connection.execute(delete(counters).where(*old))
    return [None] * len(items)


async def workers_missing(store: BatchingStore, since: int) -> bool:
    """Whether no worker was alive for `SILENT_MS`. A process without workers asks, which began to
    watch at the time `since`.
    """
    seen = await store.read(counter, COUNTER)
    return store.clock() - max(seen, since) > SILENT_MS
