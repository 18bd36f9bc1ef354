"""Which events a replay means, read from the outbox."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, and_, exists, func, or_, select

from service.db.paging import Row
from service.db.tables import deliveries, events, replays
from service.events.event_queries import endpoint_row, type_conditions


@dataclass(frozen=True, slots=True)
class Wanted:
    """Events of an endpoint's owner that it subscribes to, by time (milliseconds, `until` not
    included) and type.

    `only`: `dead` are those it never took and that are not on their way to it, made while it was
    disabled or all deliveries dead; `all` are all.
    """

    endpoint_id: str
    owner: str | None  # None: every owner's
    since: int
    until: int | None  # None: all that there is
    types: Sequence[str]  # none: all that it subscribes to
    only: str


@dataclass(frozen=True, slots=True)
class Extent:
    """How many events there are, and between which places of the outbox: after `position`, up to
    `last`.
    """

    count: int
    position: int
    last: int


def _conditions(wanted: Wanted, endpoint: Row) -> list[ColumnElement[bool]]:
    found = [
        events.c.time >= wanted.since,
        *(type_conditions(types) for types in (endpoint["types"], wanted.types) if types),
    ]
    if wanted.until is not None:
        found.append(events.c.time < wanted.until)
    if wanted.owner is not None:
        found.append(events.c.owner == wanted.owner)
    if wanted.only == "dead":
        to_it = and_(
            deliveries.c.event_id == events.c.id, deliveries.c.endpoint_id == wanted.endpoint_id
        )
        meant = or_(
            events.c.time > endpoint["created_at"], exists().where(to_it)
        )  # none is made while it is disabled
        found += [meant, ~exists().where(to_it, deliveries.c.state != "dead")]
    return found


def replay_extent(connection: Connection, wanted: Wanted) -> Extent:
    endpoint = endpoint_row(connection, wanted.endpoint_id, None)
    if endpoint is None:
        return Extent(0, 0, 0)
    place = events.c.sequence
    statement = select(func.count(), func.min(place), func.max(place)).where(
        *_conditions(wanted, endpoint)
    )
    count, first, last = connection.execute(statement).one()
    return Extent(count, (first or 1) - 1, last or 0)


@dataclass(frozen=True, slots=True)
class Found:
    """The next events of a replay (id, task_id, sequence), and the last that it means; `waits`: for
    an earlier one to its endpoint.
    """

    events: Sequence[Row]
    last: int
    waits: bool


def replay_page(connection: Connection, replay_id: str, limit: int) -> Found | None:
    """None: it is over, or its endpoint is gone."""
    row = (
        connection.execute(
            select(replays).where(replays.c.id == replay_id, replays.c.state == "running")
        )
        .mappings()
        .first()
    )
    if row is None:
        return None
    endpoint = endpoint_row(connection, row["endpoint_id"], None)
    if endpoint is None:
        return None
    rival = and_(
        replays.c.endpoint_id == endpoint["id"],
        replays.c.state == "running",
        replays.c.id < replay_id,
    )
    if connection.execute(select(replays.c.id).where(rival).limit(1)).first() is not None:
        return Found((), row["last"], waits=True)
    until = (
        row["until_at"] if row["until_at"] < row["created_at"] else None
    )  # by then all were there
    wanted = Wanted(
        endpoint["id"], endpoint["owner"], row["since_at"], until, row["types"], row["only"]
    )
    between = and_(events.c.sequence > row["position"], events.c.sequence <= row["last"])
    page = select(events.c.id, events.c.task_id, events.c.sequence).where(
        *_conditions(wanted, endpoint), between
    )
    return Found(
        list(connection.execute(page.order_by(events.c.sequence).limit(limit)).mappings()),
        row["last"],
        waits=False,
    )


def replay_row(
    connection: Connection, replay_id: str, owner: str | None
) -> tuple[Row, dict[str, int]] | None:
    """A replay, and how many of its deliveries are in each state."""
    statement = select(replays).where(replays.c.id == replay_id)
    if owner is not None:
        statement = statement.where(replays.c.owner == owner)
    row = connection.execute(statement).mappings().first()
    if row is None:
        return None
    states = (
        select(deliveries.c.state, func.count())
        .where(deliveries.c.replay_id == replay_id)
        .group_by(deliveries.c.state)
    )
    return row, {each.state: each[1] for each in connection.execute(states)}
