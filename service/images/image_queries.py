"""Queries about images."""

from collections.abc import Sequence

from sqlalchemy import Connection, or_, select

from service.db.paging import Row
from service.db.tables import images, tasks
from service.tasks.rows import counts
from service.tasks.state import TERMINAL


def download(connection: Connection, image_id: str) -> Row | None:
    """An image to fetch, with the time its task was asked for."""
    statement = select(images, tasks.c.upstream_id, tasks.c.state.label("task_state")).join(
        tasks, tasks.c.id == images.c.task_id
    )
    return connection.execute(statement.where(images.c.id == image_id)).mappings().first()


def image_row(connection: Connection, image_id: str) -> Row | None:
    """An image that is shown, or that was: `erased`."""
    shown = or_(counts, images.c.state == "erased")
    return (
        connection.execute(select(images).where(images.c.id == image_id, shown)).mappings().first()
    )


def orphans(connection: Connection, blobs: Sequence[str]) -> list[str]:
    """Which of these blobs no row names, of known tasks that have ended and save nothing any
    more.
    """
    task_ids = {name.partition("/")[0] for name in blobs}
    terminal = [state.value for state in TERMINAL]
    over = set(
        connection.execute(
            select(tasks.c.id).where(tasks.c.id.in_(task_ids), tasks.c.state.in_(terminal))
        ).scalars()
    )
    named = set[str]()
    for row in connection.execute(
        select(images.c.task_id, images.c.state, images.c.blob).where(
            images.c.task_id.in_(task_ids)
        )
    ):
        named.add(row.blob)
        if row.state == "pending":
            over.discard(row.task_id)
    return [name for name in blobs if name.partition("/")[0] in over and name not in named]
