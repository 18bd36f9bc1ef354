"""Writes events straight to the outbox, for tests that need no task and no upstream."""

from collections.abc import Sequence
from dataclasses import dataclass

from service.db.batching import BatchingStore
from service.db.transaction import Emitted, Transaction
from service.events.outbox import OPERATORS


@dataclass(frozen=True, slots=True)
class Made:
    """`count` events of one type, written in one transaction."""

    count: int = 1
    type: str = "image.task.failed"
    owner: str = OPERATORS


def emit(tx: Transaction, items: Sequence[Made]) -> list[list[str]]:
    """A store operation that returns the ids of the events."""
    made = []
    for item in items:
        ids = [tx.id("event") for _ in range(item.count)]
        tx.emitted += [
            Emitted(id=id, owner=item.owner, type=item.type, task_id=None, data={"key": str(n)})
            for n, id in enumerate(ids)
        ]
        made.append(ids)
    return made


async def emitted(
    store: BatchingStore, count: int = 1, type: str = "image.task.failed", owner: str = OPERATORS
) -> list[str]:
    return await store.write(emit, Made(count, type, owner))
