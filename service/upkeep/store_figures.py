"""Figures of the store for the gauges, and its readiness."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, func, select, update

from service.db.queues import QUEUES
from service.db.tables import counters, deliveries, images, tasks
from service.db.transaction import Transaction
from service.tasks.ledger import ADJUST, CHARGE, ESTIMATE, REFUND
from service.tasks.state import TERMINAL, State
from service.tasks.usage import ledger_sums


def figures(connection: Connection) -> dict[str, Any]:
    """Counts in the store, so the figures are the same in every process."""

    def value(column: Any, *where: Any) -> Any:
        return connection.execute(select(column).where(*where)).scalar()

    counted = select(tasks.c.state, func.count()).group_by(tasks.c.state)
    states = {row[0]: row[1] for row in connection.execute(counted)}
    depth = {}
    for stage, queue in QUEUES.items():
        where = () if queue.where is None else (queue.where,)
        depth[stage] = value(func.count(), queue.column("due_at").is_not(None), *where)
    pending = deliveries.c.state == "pending"
    entries = ledger_sums(connection)
    unsettled = tasks.c.state.not_in([state.value for state in TERMINAL])
    return {
        "tasks": {state.value: states.get(state.value, 0) for state in State},
        "queue_depth": depth,
        "oldest_unsettled": value(func.min(tasks.c.created_at), unsettled),
        "oldest_due_delivery": value(func.min(deliveries.c.due_at), pending),
        "first_link_dies": value(func.min(images.c.link_dies_at), images.c.state == "pending"),
        "dead_letters": value(func.count(deliveries.c.id), deliveries.c.state == "dead"),
        "credits": {
            "reserved": value(func.sum(tasks.c.credits_reserved)) or 0,
            "used": entries.get(CHARGE, 0) + entries.get(ADJUST, 0),
            "estimated": entries.get(ESTIMATE, 0),
            "refunded": -entries.get(REFUND, 0),
        },
    }


def mark(tx: Transaction, items: Sequence[None]) -> list[None]:
    """Writes like a callback. If it commits, the store can commit a callback."""
    ready = update(counters).where(counters.c.name == "ready")
    tx.connection.execute(ready.values(value=counters.c.value + 1))
    return [None] * len(items)
