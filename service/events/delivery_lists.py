"""Lists of deliveries, each with its latest attempts."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, func, over, select

from service.db.list_indexes import REFUSED, UNFINISHED
from service.db.paging import Row, Selection, matching, page
from service.db.tables import attempts, deliveries, events

ATTEMPTS = 200  # of a delivery, in an answer


def delivery_list(
    connection: Connection, wanted: Selection, where: Mapping[str, Any] | None = None
) -> list[tuple[Row, list[Row]]]:
    """Deliveries with their latest attempts. `where` names columns, such as `id` or `state`."""
    joined = deliveries.outerjoin(events, events.c.id == deliveries.c.event_id)
    named = select(deliveries, events.c.type).select_from(joined)
    statement = matching(named, deliveries, **(given := where or {}))
    if given.get("state") in ("pending", "dead"):
        statement = statement.where(UNFINISHED)
    if given.get("last_status", 0) >= 300:
        statement = statement.where(REFUSED)
    rows = list(connection.execute(page(statement, deliveries, wanted)).mappings())
    made: dict[str, list[Row]] = {row["id"]: [] for row in rows}
    order = attempts.c.time, attempts.c.id
    latest = over(func.row_number(), attempts.c.delivery_id, [each.desc() for each in order])
    tried = select(attempts, latest.label("number")).where(attempts.c.delivery_id.in_(made))
    shown = tried.subquery()
    few = select(shown).where(shown.c.number <= ATTEMPTS).order_by(shown.c.time, shown.c.id)
    for attempt in connection.execute(few).mappings():
        made[attempt["delivery_id"]].append(attempt)
    return [(row, made[row["id"]]) for row in rows]
