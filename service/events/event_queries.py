"""Queries about events, endpoints and deliveries."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, func, or_, select

from service.db.paging import After, Row
from service.db.paging import page as _page
from service.db.tables import attempts, counters, deliveries, endpoints, events, sinks, tasks
from service.events.secrets import stored_secret


@dataclass(frozen=True, slots=True)
class Parcel:
    """A delivery with all that an attempt needs; `endpoint` None with `callback_url` None: its
    endpoint is gone.
    """

    delivery: Row
    event: Row | None
    endpoint: Row | None
    callback_url: str | None
    callback_secret: bytes | None


def parcel(connection: Connection, delivery_id: str) -> Parcel | None:
    row = (
        connection.execute(select(deliveries).where(deliveries.c.id == delivery_id))
        .mappings()
        .first()
    )
    if row is None:
        return None
    event = (
        connection.execute(select(events).where(events.c.id == row["event_id"])).mappings().first()
    )
    if row["endpoint_id"] is not None:
        endpoint = (
            connection.execute(select(endpoints).where(endpoints.c.id == row["endpoint_id"]))
            .mappings()
            .first()
        )
        return Parcel(row, event, endpoint, None, None)
    url = connection.execute(
        select(tasks.c.callback_url).where(tasks.c.id == row["task_id"])
    ).scalar()
    return Parcel(row, event, None, url, stored_secret(connection, "owners", row["owner"]))


def event_list(
    connection: Connection,
    owner: str | None,
    after: int,
    limit: int,
    types: Sequence[str] = (),
    task_id: str | None = None,
) -> tuple[list[Row], int, int]:
    """Events after a place, the last place that was examined, and the last one whose event is no
    longer kept (0: none).

    The latter is read twice: before, so that a reader of an empty outbox gets past it, and after,
    so that nothing goes unnoticed meanwhile.
    """
    last = outbox_end(connection)
    statement = select(events).where(events.c.sequence > after, events.c.sequence <= last)
    if owner is not None:
        statement = statement.where(events.c.owner == owner)
    if task_id is not None:
        statement = statement.where(events.c.task_id == task_id)
    if types:
        statement = statement.where(type_conditions(types))
    rows: list[Row] = list(
        connection.execute(statement.order_by(events.c.sequence).limit(limit)).mappings()
    )
    return (
        rows,
        rows[-1]["sequence"] if len(rows) == limit else max(last, after),
        _forgotten(connection),
    )


def outbox_begin(connection: Connection) -> int:
    """The place of the oldest event that is kept; one that none has yet if there is none."""
    oldest = connection.execute(select(func.min(events.c.sequence))).scalar()
    return outbox_end(connection) + 1 if oldest is None else oldest


def outbox_end(connection: Connection) -> int:
    """The last place that readers have been able to see."""
    return max(
        _forgotten(connection),
        connection.execute(select(func.max(events.c.sequence))).scalar() or 0,
    )


def _forgotten(connection: Connection) -> int:
    value: int = connection.execute(
        select(counters.c.value).where(counters.c.name == "forgotten")
    ).scalar_one()
    return value


def type_conditions(patterns: Sequence[str]) -> ColumnElement[bool]:
    return or_(*(_type_condition(pattern) for pattern in patterns))


def _type_condition(pattern: str) -> Any:
    if pattern == "*":
        return events.c.sequence > 0
    if pattern.endswith(".*"):
        return events.c.type.startswith(pattern[:-1], autoescape=True)
    return events.c.type == pattern


def endpoint_row(connection: Connection, endpoint_id: str, owner: str | None) -> Row | None:
    statement = select(endpoints).where(endpoints.c.id == endpoint_id)
    if owner is not None:
        statement = statement.where(endpoints.c.owner == owner)
    return connection.execute(statement).mappings().first()


def endpoint_list(
    connection: Connection, owner: str | None, limit: int, after: After = None
) -> list[Row]:
    statement = select(endpoints)
    if owner is not None:
        statement = statement.where(endpoints.c.owner == owner)
    return list(connection.execute(_page(statement, endpoints, after, limit)).mappings())


def delivery_list(
    connection: Connection,
    owner: str | None,
    limit: int,
    after: After = None,
    where: Mapping[str, str] | None = None,
) -> list[tuple[Row, list[Row]]]:
    """Deliveries with their attempts; `where` names columns (`id`, `endpoint_id`, `event_id`,
    `task_id`, `state`).
    """
    statement = select(deliveries)
    if owner is not None:
        statement = statement.where(deliveries.c.owner == owner)
    for name, value in (where or {}).items():
        statement = statement.where(deliveries.c[name] == value)
    rows = list(connection.execute(_page(statement, deliveries, after, limit)).mappings())
    made: dict[str, list[Row]] = {row["id"]: [] for row in rows}
    tried = (
        select(attempts)
        .where(attempts.c.delivery_id.in_(made))
        .order_by(attempts.c.time, attempts.c.id)
    )
    for attempt in connection.execute(tried).mappings():
        made[attempt["delivery_id"]].append(attempt)
    return [(row, made[row["id"]]) for row in rows]


def sinks_behind(
    connection: Connection, wanted: Mapping[str, Sequence[str]]
) -> dict[str, int | None]:
    """Of each sink by name, with the types that it gets: the time of its oldest event that is not
    published; None: it has them all.
    """
    behind: dict[str, int | None] = dict.fromkeys(wanted)
    for row in (
        connection.execute(select(sinks.c.name, sinks.c.position).where(sinks.c.name.in_(wanted)))
        if wanted
        else ()
    ):
        statement = select(events.c.time).where(events.c.sequence > row.position)
        if wanted[row.name]:
            statement = statement.where(type_conditions(wanted[row.name]))
        behind[row.name] = connection.execute(
            statement.order_by(events.c.sequence).limit(1)
        ).scalar()
    return behind
