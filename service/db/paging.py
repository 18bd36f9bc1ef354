"""Rows as queries return them, and pages by key."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import RowMapping, Select, and_, or_

After = tuple[int, str] | None  # where a list goes on: time and id of the last one seen


def page(statement: Select[Any], table: Any, after: After, limit: int) -> Select[Any]:
    """Newest first, from `after` on: by key, so that a page costs the same however far down it
    is.
    """
    created, key = table.c.created_at, table.c.id
    if after is not None:
        statement = statement.where(
            or_(created < after[0], and_(created == after[0], key < after[1]))
        )
    return statement.order_by(created.desc(), key.desc()).limit(limit)


Row = RowMapping | Mapping[str, Any]
