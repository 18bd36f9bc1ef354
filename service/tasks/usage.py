"""Queries of the ledger: its entries in their order, and sums by day, model, owner or task.

All figures of a task count for the day on which it was accepted, whenever they became known.
"""

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import BigInteger, ColumnElement, Connection, Table, cast, func, select

from service.credits import credits_number
from service.db.operator_tables import ledger
from service.db.paging import Selection
from service.db.tables import images, tasks
from service.strict_json import JSON
from service.tasks.ledger import ADJUST, CHARGE, ESTIMATE, REFUND, RESERVE

DAY_MS = 86_400_000
MAX_KEYS = 10_000  # of one report
GROUPS = ("day", "model", "owner", "task")
SHOWN_IMAGES = (images.c.confirmed, images.c.state.in_(("stored", "erased")))
COUNTS = ("tasks", "images_requested", "images")
# In millionths. `reserved` is what the upstream reserved, or the estimate before it answered.
# `used` is before `refunded`.
CREDITS = ("estimated", "reserved", "used", "refunded")


def usage_by(
    connection: Connection, by: str, wanted: Selection, most: int | None = None
) -> dict[str, Counter[str]]:
    """The figures by key, in the order of the keys. A day is a date of UTC. At most one more than
    `MAX_KEYS`. With `most`, only that many keys with the highest cost, the highest first.
    """
    by_key: dict[str, Counter[str]] = {}
    keys = None if most is None else dearest(connection, by, wanted, most)

    def read(table: Table, *columns: ColumnElement[Any], where: Sequence[Any] = ()) -> None:
        key = key_of(by, table)
        statement = wanted.narrow(select(key.label("key"), *columns), table).where(*where)
        if keys is not None:
            statement = statement.where(key.in_(keys))
        statement = statement.group_by(key).order_by(key).limit(MAX_KEYS + 1)
        for row in connection.execute(statement).mappings():
            figures = by_key.setdefault(key_text(by, row["key"]), Counter())
            figures.update({name: int(row[name] or 0) for name in row if name != "key"})

    counted = func.count().label("tasks")
    requested = func.sum(func.coalesce(tasks.c.images_requested, 1)).label("images_requested")
    read(tasks, counted, requested, func.sum(tasks.c.credits_reserved).label("reserved"))
    read(tasks, func.count().label("images"), where=(images.c.task_id == tasks.c.id, *SHOWN_IMAGES))
    kind, credits = ledger.c.kind, ledger.c.credits
    unanswered = select(tasks.c.id).where(tasks.c.credits_reserved.is_(None))
    read(
        ledger,
        func.sum(credits).filter(kind == ESTIMATE).label("estimated"),
        func.sum(credits).filter(kind.in_((CHARGE, ADJUST))).label("used"),
        (-func.sum(credits).filter(kind == REFUND)).label("refunded"),
    )
    reserves = kind == RESERVE, ledger.c.task_id.in_(unanswered)
    read(ledger, func.sum(credits).label("reserved"), where=reserves)
    texts = sorted(by_key) if keys is None else [key_text(by, key) for key in keys]
    return {text: by_key[text] for text in texts}


def dearest(connection: Connection, by: str, wanted: Selection, most: int) -> list[Any]:
    """The keys with the highest cost after refunds, the highest first."""
    key, paid = key_of(by, ledger), ledger.c.kind.in_((CHARGE, ADJUST, REFUND))
    cost = func.coalesce(func.sum(ledger.c.credits).filter(paid), 0)
    statement = wanted.narrow(select(key), ledger).group_by(key).order_by(cost.desc(), key)
    return list(connection.scalars(statement.limit(most)))


def key_of(by: str, table: Table) -> ColumnElement[Any]:
    if by == "day":
        return cast(table.c.created_at, BigInteger) // DAY_MS
    if by == "task":
        return table.c.task_id if "task_id" in table.c else table.c.id
    return table.c[by]


def key_text(by: str, key: Any) -> str:
    if by != "day":
        return str(key)
    return f"{datetime.fromtimestamp(int(key) * 86400, UTC):%Y-%m-%d}"


def figures_document(figures: Counter[str]) -> JSON:
    """The figures as clients see them."""
    credits = {name: credits_number(figures[name]) for name in CREDITS}
    return {name: figures[name] for name in COUNTS} | credits
