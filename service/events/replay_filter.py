"""Which events a replay means, and how many."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, and_, exists, func, or_, select

from service.db.paging import Row
from service.db.tables import deliveries, events
from service.events.endpoint_options import filter_conditions
from service.events.endpoints import endpoint_row
from service.events.feed import type_conditions


@dataclass(frozen=True, slots=True)
class ReplayFilter:
    """Events of an endpoint's owner that the endpoint subscribes to, by time (milliseconds, `until`
    not included) and type.

    `only`: `all`, or `undelivered` for events that the endpoint has not received, or `dead` for
    those that are not on their way to it either. Such an event was emitted while the endpoint was
    disabled, or all its deliveries are dead.
    """

    endpoint_id: str
    owner: str | None  # None: every owner's
    since: int
    until: int | None  # None: no end
    types: Sequence[str]  # none: all that the endpoint subscribes to
    only: str


@dataclass(frozen=True, slots=True)
class ReplayExtent:
    """How many events a replay means. They are after `position` in the outbox, up to `last`."""

    count: int
    position: int
    last: int


def conditions(wanted: ReplayFilter, endpoint: Row) -> list[ColumnElement[bool]]:
    types = (endpoint["types"], wanted.types)
    clauses = [events.c.time >= wanted.since, *(type_conditions(each) for each in types if each)]
    clauses += filter_conditions(endpoint["options"])
    if wanted.until is not None:
        clauses.append(events.c.time < wanted.until)
    if wanted.owner is not None:
        clauses.append(events.c.owner == wanted.owner)
    if wanted.only != "all":
        mine = deliveries.c.endpoint_id == wanted.endpoint_id
        to_it = and_(deliveries.c.event_id == events.c.id, mine)
        # A disabled endpoint gets no deliveries, so an event without one counts as dead.
        clauses.append(or_(events.c.time > endpoint["created_at"], exists().where(to_it)))
        dead = wanted.only == "dead"
        state = deliveries.c.state
        reached = state != "dead" if dead else state == "delivered"
        clauses.append(~exists().where(to_it, reached))
    return clauses


def replay_extent(connection: Connection, wanted: ReplayFilter) -> ReplayExtent:
    endpoint = endpoint_row(connection, wanted.endpoint_id, None)
    if endpoint is None:
        return ReplayExtent(0, 0, 0)
    sequence = events.c.sequence
    statement = select(func.count(), func.min(sequence), func.max(sequence))
    count, first, last = connection.execute(statement.where(*conditions(wanted, endpoint))).one()
    return ReplayExtent(count, (first or 1) - 1, last or 0)
