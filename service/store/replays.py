"""Which events a replay means, read from the outbox."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, exists, func, select

from service.store.queries import type_conditions
from service.store.records import Row
from service.store.tables import deliveries, endpoints, events, replays


@dataclass(frozen=True, slots=True)
class Wanted:
    """Events of an endpoint's owner, by time (milliseconds, `until` not included) and type.

    `only`: `dead` are those whose deliveries to this endpoint have all failed, `all` are all.
    """

    endpoint_id: str
    owner: str | None  # None: every owner's
    since: int
    until: int
    types: Sequence[str]
    only: str


@dataclass(frozen=True, slots=True)
class Extent:
    """How many events there are, and between which places of the outbox: after `position`, up to `last`."""

    count: int
    position: int
    last: int


def _conditions(wanted: Wanted) -> list[ColumnElement[bool]]:
    found = [events.c.time >= wanted.since, events.c.time < wanted.until, type_conditions(wanted.types)]
    if wanted.owner is not None:
        found.append(events.c.owner == wanted.owner)
    if wanted.only == "dead":
        to_it = and_(deliveries.c.event_id == events.c.id, deliveries.c.endpoint_id == wanted.endpoint_id)
        found += [exists().where(to_it, deliveries.c.state == "dead"), ~exists().where(to_it, deliveries.c.state != "dead")]
    return found


def replay_extent(connection: Connection, wanted: Wanted) -> Extent:
    place = events.c.sequence
    count, first, last = connection.execute(select(func.count(), func.min(place), func.max(place)).where(*_conditions(wanted))).one()
    return Extent(count, (first or 1) - 1, last or 0)


def replay_page(connection: Connection, replay_id: str, limit: int) -> tuple[Row, list[Row]] | None:
    """A replay and the next of its events: id, task_id, sequence. None: it is over, or its endpoint is gone."""
    statement = select(replays, endpoints.c.owner.label("whose")).join(endpoints, endpoints.c.id == replays.c.endpoint_id)
    row = connection.execute(statement.where(replays.c.id == replay_id, replays.c.state == "running")).mappings().first()
    if row is None:
        return None
    wanted = Wanted(row["endpoint_id"], row["whose"], row["since_at"], row["until_at"], row["types"], row["only"])
    columns: tuple[Any, ...] = (events.c.id, events.c.task_id, events.c.sequence)
    page = select(*columns).where(*_conditions(wanted), events.c.sequence > row["position"], events.c.sequence <= row["last"])
    return row, list(connection.execute(page.order_by(events.c.sequence).limit(limit)).mappings())


def replay_row(connection: Connection, replay_id: str, owner: str | None) -> tuple[Row, dict[str, int]] | None:
    """A replay, and how many of its deliveries are in each state."""
    statement = select(replays).where(replays.c.id == replay_id)
    if owner is not None:
        statement = statement.where(replays.c.owner == owner)
    row = connection.execute(statement).mappings().first()
    if row is None:
        return None
    states = select(deliveries.c.state, func.count()).where(deliveries.c.replay_id == replay_id).group_by(deliveries.c.state)
    return row, {each.state: each[1] for each in connection.execute(states)}
