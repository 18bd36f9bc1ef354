"""Rows as queries return them, and pages by key."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import RowMapping, Select, and_, or_

Row = RowMapping | Mapping[str, Any]
After = tuple[int, str] | None  # time and id of the last row of the page before


@dataclass(frozen=True, slots=True)
class Selection:
    """Which rows a page has: of one owner (None: every owner's), created at or after `since` and
    before `until` (milliseconds, None: at any time), and after the last row of the page before.
    """

    owner: str | None = None
    limit: int | None = None
    after: After = None
    since: int | None = None
    until: int | None = None


def matching(statement: Select[Any], table: Any, **values: str | None) -> Select[Any]:
    """Narrows a select to rows with these column values. None: any value."""
    conditions = [table.c[name] == value for name, value in values.items() if value is not None]
    return statement.where(*conditions)


def page(statement: Select[Any], table: Any, wanted: Selection) -> Select[Any]:
    """Newest first. A page costs the same at any depth of the list."""
    created, key = table.c.created_at, table.c.id
    statement = matching(statement, table, owner=wanted.owner)
    if wanted.since is not None:
        statement = statement.where(created >= wanted.since)
    if wanted.until is not None:
        statement = statement.where(created < wanted.until)
    if wanted.after is not None:
        time, id = wanted.after
        statement = statement.where(or_(created < time, and_(created == time, key < id)))
    return statement.order_by(created.desc(), key.desc()).limit(wanted.limit)
