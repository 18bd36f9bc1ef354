"""Rows of tasks and images as records."""

from collections.abc import Sequence

from sqlalchemy import and_

from service.db.paging import Row
from service.db.tables import images as image_rows
from service.tasks.document import Image, Task
from service.tasks.state import State
from service.upstreams.base import Status

counts = and_(
    image_rows.c.state == "stored", image_rows.c.confirmed
)  # what only a callback named is shown to nobody


def task_record(row: Row, images: Sequence[Image] = ()) -> Task:
    """A row of `tasks` and its stored images, in the upstream's order."""
    status = row["upstream_status"]
    return Task(
        id=row["id"],
        owner=row["owner"],
        created_at=row["created_at"],
        model=row["model"],
        state=State(row["state"]),
        upstream=row["upstream"],
        upstream_id=row["upstream_id"],
        upstream_status=Status(status) if status else None,
        progress=row["progress"],
        can_cancel=row["can_cancel"],
        estimated_time=row["estimated_time"],
        billing_rule=row["billing_rule"],
        user_group=row["user_group"],
        credits_reserved=row["credits_reserved"],
        credits_used=row["credits_used"],
        error=row["error"],
        metadata=row["metadata"],
        request=row["request"],
        prompt=row["prompt"],
        images=tuple(images),
    )


def image_record(row: Row) -> Image:
    """A row of `images` whose state is `stored`."""
    return Image(
        id=row["id"],
        index=row["position"],
        blob=row["blob"],
        media_type=row["media_type"],
        bytes=row["bytes"],
        sha256=row["sha256"],
        width=row["width"],
        height=row["height"],
    )
