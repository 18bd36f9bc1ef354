"""Rows as queries return them, and pages by key."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import RowMapping, Select, and_, or_

Row = RowMapping | Mapping[str, Any]
After = tuple[int, str] | None  # time and id of the last row of the page before


def matching(statement: Select[Any], table: Any, **values: str | None) -> Select[Any]:
    """Narrows a select to rows with these column values. None: any value."""
    conditions = [table.c[name] == value for name, value in values.items() if value is not None]
    return statement.where(*conditions)


def page(statement: Select[Any], table: Any, after: After, limit: int) -> Select[Any]:
    """Newest first, after a key. A page costs the same at any depth of the list."""
    created, key = table.c.created_at, table.c.id
    if after is not None:
        time, id = after
        statement = statement.where(or_(created < time, and_(created == time, key < id)))
    return statement.order_by(created.desc(), key.desc()).limit(limit)
