"""Queries about images."""

from sqlalchemy import Connection, or_, select

from service.db.paging import Row
from service.db.tables import images, tasks
from service.tasks.rows import counts


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
