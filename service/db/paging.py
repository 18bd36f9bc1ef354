"""Rows as queries return them, and pages by key."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import RowMapping, Select, and_, or_

Row = RowMapping | Mapping[str, Any]
After = tuple[int, str] | None  # time and id of the last row of the page before


def page(statement: Select[Any], table: Any, after: After, limit: int) -> Select[Any]:
    """Newest first, after a key. A page costs the same at any depth of the list."""
    created, key = table.c.created_at, table.c.id
    if after is not None:
        time, id = after
        statement = statement.where(or_(created < time, and_(created == time, key < id)))
    return statement.order_by(created.desc(), key.desc()).limit(limit)
