"""Figures of the store that the gauges show."""

from typing import Any

from sqlalchemy import Connection, func, select

from service.db.queues import QUEUES
from service.db.tables import deliveries, images, tasks
from service.tasks.state import TERMINAL, State


def figures(connection: Connection) -> dict[str, Any]:
    """What the gauges show, counted in the store: the same in every process."""
    states = {
        row.state: row[1]
        for row in connection.execute(select(tasks.c.state, func.count()).group_by(tasks.c.state))
    }
    depth = {}
    for stage, queue in QUEUES.items():
        statement = (
            select(func.count()).select_from(queue.table).where(queue.column("due_at").is_not(None))
        )
        depth[stage] = connection.execute(
            statement if queue.where is None else statement.where(queue.where)
        ).scalar_one()
    unsettled = select(func.min(tasks.c.created_at)).where(
        tasks.c.state.not_in([state.value for state in TERMINAL])
    )
    return {
        "tasks": {state.value: states.get(state.value, 0) for state in State},
        "queue_depth": depth,
        "oldest_unsettled": connection.execute(unsettled).scalar(),
        "oldest_due_delivery": connection.execute(
            select(func.min(deliveries.c.due_at)).where(deliveries.c.state == "pending")
        ).scalar(),
        "first_link_dies": connection.execute(
            select(func.min(images.c.link_dies_at)).where(images.c.state == "pending")
        ).scalar(),
        "dead_letters": connection.execute(
            select(func.count()).select_from(deliveries).where(deliveries.c.state == "dead")
        ).scalar_one(),
        "credits_reserved": connection.execute(select(func.sum(tasks.c.credits_reserved))).scalar()
        or 0,
        "credits_used": connection.execute(select(func.sum(tasks.c.credits_used))).scalar() or 0,
    }
