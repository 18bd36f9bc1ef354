"""Figures of the store for the gauges, and its readiness."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, func, select, update

from service.db.list_indexes import UNFINISHED
from service.db.queues import QUEUES
from service.db.tables import counters, deliveries, images, inbox, tasks
from service.db.transaction import Transaction
from service.tasks.ledger import ADJUST, CHARGE, ESTIMATE, REFUND
from service.tasks.state import TERMINAL, State


def figures(connection: Connection) -> dict[str, Any]:
    """Counts in the store, so the figures are the same in every process. Rows of tasks and
    deliveries that are over are not read: counters have their sums (`service/db/list_indexes.py`).
    """
    execute = connection.execute
    sums: dict[str, int] = dict(execute(select(counters.c.name, counters.c.value)).all())
    live = tasks.c.state.in_([state.value for state in State if state not in TERMINAL])
    columns = (func.count(), func.min(tasks.c.created_at), func.sum(tasks.c.credits_reserved))
    rows = execute(select(tasks.c.state, *columns).where(live).group_by(tasks.c.state)).all()
    states = {state.value: sums.get(f"tasks {state}", 0) for state in State}
    depth, oldest = {}, {}
    for stage, queue in QUEUES.items():
        due = queue.column("due_at")
        where = () if queue.where is None else (queue.where,)
        waiting = select(func.count(), func.min(due)).where(due.is_not(None), *where)
        depth[stage], oldest[stage] = execute(waiting).one()
    depth["inbox"] = execute(select(func.count()).select_from(inbox)).scalar_one()
    dead = select(func.count()).where(deliveries.c.state == "dead", UNFINISHED)
    due_images = images.c.due_at.is_not(None), images.c.state == "pending"
    reserved = sums["credits reserved"] + sum(int(row[3] or 0) for row in rows)
    due_deliveries = [oldest[stage] for stage in ("deliver", "redeliver") if oldest[stage]]
    return {
        "tasks": states | {row[0]: row[1] for row in rows},
        "queue_depth": depth,
        "oldest_unsettled": min((row[2] for row in rows), default=None),
        "oldest_due_delivery": min(due_deliveries, default=None),
        "first_link_dies": execute(
            select(func.min(images.c.link_dies_at)).where(*due_images)
        ).scalar(),
        "dead_letters": execute(dead).scalar_one(),
        "credits": {
            "reserved": reserved,
            "used": sums[f"credits {CHARGE}"] + sums[f"credits {ADJUST}"],
            "estimated": sums[f"credits {ESTIMATE}"],
            "refunded": -sums[f"credits {REFUND}"],
        },
    }


def mark(tx: Transaction, items: Sequence[None]) -> list[None]:
    """Writes like a callback. If it commits, the store can commit a callback."""
    ready = update(counters).where(counters.c.name == "ready")
    tx.connection.execute(ready.values(value=counters.c.value + 1))
    return [None] * len(items)
