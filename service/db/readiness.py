"""A durable commit without meaning. If it succeeds, the store can commit a callback."""

from collections.abc import Sequence

from sqlalchemy import update

from service.db.tables import counters
from service.db.transaction import Transaction


def mark(tx: Transaction, items: Sequence[None]) -> list[None]:
    """Writes like a callback, so that a full disk or a read-only server fails it."""
    ready = update(counters).where(counters.c.name == "ready")
    tx.connection.execute(ready.values(value=counters.c.value + 1))
    return [None] * len(items)
