"""Replays: an endpoint gets past events again, by new deliveries of the same events. A delivery
that is still pending is sent now instead.

The worker makes the deliveries of one page per `EVERY_MS`, in the order of the outbox, up to the
last event that was there at the start. Replays to one endpoint run one after the other, so that the
rate is bounded per endpoint.
"""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, and_, case, func, insert, select, tuple_, update

from service.db.paging import Row, matching
from service.db.tables import deliveries, events, replays
from service.db.transaction import Lease, Transaction, one_by_one
from service.events import outbox
from service.events.delivery_order import release_waiting
from service.events.delivery_replays import (
    DeliveryFilter,
    insert_deliveries,
    lock_events,
    on_their_way,
    record_selected,
    selected_page,
)
from service.events.endpoints import EndpointRow, endpoint_row, lock_endpoint
from service.events.failures import ended
from service.events.outbox import OPERATORS
from service.events.replay_filter import ReplayExtent, ReplayFilter, conditions
from service.queue import leases
from service.resources import Resources

PAGE, EVERY_MS = 100, 1000


@dataclass(frozen=True, slots=True)
class ReplayPage:
    """Events to deliver (id, task_id, sequence), or deliveries to repeat.

    `position`: the last place that was examined,
    None: none. The replay is due again after `wait_ms`, None: it is done.
    """

    events: Sequence[Row]
    position: int | None
    wait_ms: int | None


def replay_page(connection: Connection, replay_id: str, limit: int) -> ReplayPage:
    """The next page. It is empty if the replay is over, if its endpoint is gone, or while an
    earlier replay to its endpoint is running.
    """
    running = replays.c.state == "running"
    statement = select(replays).where(replays.c.id == replay_id, running)
    row = connection.execute(statement).mappings().first()
    if row is None:
        return ReplayPage((), None, None)
    mine = and_(replays.c.endpoint_id == row["endpoint_id"], running)
    position = tuple_(replays.c.created_at, replays.c.id)
    before = position < tuple_(row["created_at"], replay_id)
    earlier = select(replays.c.id).where(mine, before).limit(1)
    if connection.execute(earlier).first() is not None:
        return ReplayPage((), None, EVERY_MS)
    if row["filter"] is not None:
        chosen = selected_page(connection, row, limit)
        full = len(chosen) == limit
        position = chosen[-1]["created_at"] if full else row["position"]
        return ReplayPage(chosen, position, EVERY_MS if full else None)
    endpoint = endpoint_row(connection, row["endpoint_id"], None)
    if endpoint is None:
        return ReplayPage((), None, None)
    # If `until` was not in the past at the start, `last` is the only limit.
    until = row["until_at"] if row["until_at"] < row["created_at"] else None
    only = "undelivered" if row["pending"] else row["only"]
    replay_filter = ReplayFilter(
        endpoint["id"], endpoint["owner"], row["since_at"], until, row["types"], only
    )
    page = select(events.c.id, events.c.task_id, events.c.sequence).where(
        *conditions(replay_filter, endpoint),
        events.c.sequence > row["position"],
        events.c.sequence <= row["last"],
    )
    page = page.order_by(events.c.sequence).limit(limit)
    rows = list(connection.execute(page).mappings())
    if len(rows) == limit and rows[-1]["sequence"] < row["last"]:
        return ReplayPage(rows, rows[-1]["sequence"], EVERY_MS)
    return ReplayPage(rows, row["last"], None)


def replay_row(
    connection: Connection, replay_id: str, owner: str | None
) -> tuple[Row, dict[str, int]] | None:
    """A replay, and how many of its deliveries are in each state."""
    statement = matching(select(replays), replays, id=replay_id, owner=owner)
    row = connection.execute(statement).mappings().first()
    if row is None:
        return None
    states = select(deliveries.c.state, func.count()).where(deliveries.c.replay_id == replay_id)
    counts = connection.execute(states.group_by(deliveries.c.state))
    return row, {each.state: each[1] for each in counts}


@dataclass(frozen=True, slots=True)
class NewReplayRow:
    """A replay to start. `owner`: the endpoint's."""

    id: str
    owner: str
    wanted: ReplayFilter
    extent: ReplayExtent
    chosen: DeliveryFilter | None = None  # instead of the endpoint's events


@one_by_one
def insert_replays(tx: Transaction, item: NewReplayRow) -> bool:
    """Starts a replay. False: the endpoint is disabled or gone."""
    wanted, extent = item.wanted, item.extent
    endpoint = lock_endpoint(tx, wanted.endpoint_id) if wanted.endpoint_id else None
    named = item.chosen is None or wanted.endpoint_id
    if named and (endpoint is None or endpoint.status == "disabled"):
        return False
    if tx.connection.execute(select(replays.c.id).where(replays.c.id == item.id)).first() is None:
        row = {
            "id": item.id,
            "owner": item.owner,
            "endpoint_id": wanted.endpoint_id,
            "filter": item.chosen and asdict(item.chosen),
            "since_at": wanted.since,
            "until_at": tx.now if wanted.until is None else wanted.until,
            "types": list(wanted.types),
            "only": "all" if wanted.only == "all" else "dead",
            "pending": wanted.only == "undelivered" or None,
            "state": "running",
            "count": extent.count,
            "made": 0,
            "position": extent.position,
            "last": extent.last,
            "created_at": tx.now,
        }
        row |= leases.enqueue(tx, "replay", item.id)
        tx.connection.execute(insert(replays).values(row))
    return True


@one_by_one
def record_pages(tx: Transaction, item: tuple[Lease, ReplayPage]) -> bool:
    """Makes the deliveries. False: the lease had ended, or the replay is over."""
    lease, page = item
    mine = replays.c.id == lease.key
    row = tx.connection.execute(select(replays).where(mine).with_for_update()).mappings().first()
    if row is None or not leases.holds(lease, row):
        return False
    if row["state"] != "running":
        leases.done(tx, [lease])
        return False
    endpoint = lock_endpoint(tx, row["endpoint_id"]) if row["endpoint_id"] else None
    named = row["filter"] is None or row["endpoint_id"]
    if named and (endpoint is None or endpoint.status == "disabled"):
        _finish(tx, row["id"], "cancelled")
        return False
    if row["filter"] is not None:
        after = page.events[-1]["id"] if page.events else row["after"]
        _advance(tx, row, page, record_selected(tx, row, page.events), after=after)
        return True
    assert endpoint is not None
    _advance(tx, row, page, _redeliver(tx, row, endpoint, page))
    return True


def _advance(tx: Transaction, row: Row, page: ReplayPage, count: int, **more: Any) -> None:
    values = {"made": row["made"] + count, **more}
    if page.position is not None:
        values["position"] = page.position
    if page.wait_ms is None:
        _finish(tx, row["id"], "done", **values)
        return
    values |= leases.release("replay", tx.now + page.wait_ms, attempts=0)
    tx.connection.execute(update(replays).where(replays.c.id == row["id"]).values(values))


def _redeliver(tx: Transaction, row: Row, endpoint: EndpointRow, page: ReplayPage) -> int:
    """Makes deliveries of a page of events, and returns how many of these are still there. A replay
    of undelivered events sends pending deliveries now.
    """
    sequences = lock_events(tx, [event["id"] for event in page.events])
    if row["pending"]:
        _bring_forward(tx, row, endpoint, sequences)
    done = on_their_way(tx, row, sequences)
    to = {"owner": endpoint.owner or OPERATORS, "endpoint_id": endpoint.id}
    rows = [
        {**to, "event_id": event["id"], "task_id": event["task_id"]}
        for event in page.events
        if event["id"] in sequences and (event["id"], endpoint.id) not in done
    ]
    insert_deliveries(tx, row, rows, {endpoint.id: endpoint}, sequences)
    return len(sequences)


def _bring_forward(
    tx: Transaction, replay: Row, endpoint: EndpointRow, event_ids: Collection[str]
) -> None:
    """Makes pending deliveries of these events due, with the whole schedule, as the replay's own.

    A delivery under a lease is being sent already. A delivery that another transaction has locked
    is being recorded.
    """
    columns = deliveries.c
    mine = and_(columns.event_id.in_(event_ids), columns.endpoint_id == endpoint.id)
    pending = select(columns.id).where(mine, columns.state == "pending")
    pending = pending.with_for_update(skip_locked=True)
    free = columns.lease_until.is_(None)
    soon = max(tx.now, endpoint.paused_until or 0)
    values: dict[Any, Any] = {
        columns.replay_id: func.coalesce(columns.replay_id, replay["id"]),
        columns.due_at: case((free, soon), else_=columns.due_at),
        columns.attempts: case((free, 0), else_=columns.attempts),
        columns.planned_at: None,
    }
    tx.connection.execute(update(deliveries).where(columns.id.in_(pending)).values(values))


@one_by_one
def cancel_replays(tx: Transaction, item: tuple[str, str | None]) -> bool:
    """Ends a replay and its pending deliveries, by id and owner (None: any owner's). False: this
    owner has no such replay.
    """
    replay_id, owner = item
    statement = matching(select(replays), replays, id=replay_id, owner=owner)
    row = tx.connection.execute(statement.with_for_update()).first()
    if row is None:
        return False
    if row.state == "running":
        _finish(tx, replay_id, "cancelled")
    mine = and_(deliveries.c.replay_id == replay_id, deliveries.c.state == "pending")
    # A delivery that the replay only brought forward goes on by its schedule.
    older = and_(mine, deliveries.c.created_at < row.created_at)
    tx.connection.execute(update(deliveries).where(older).values(replay_id=None))
    values = ended(tx.now, "replay cancelled")
    touched = select(deliveries.c.endpoint_id).where(mine, deliveries.c.endpoint_id.is_not(None))
    endpoint_ids = list(tx.connection.execute(touched.distinct()).scalars())
    tx.connection.execute(update(deliveries).where(mine).values(values))
    release_waiting(tx, endpoint_ids)
    return True


def _finish(tx: Transaction, replay_id: str, state: str, **more: Any) -> None:
    values = leases.release("replay", None, state=state, finished_at=tx.now, **more)
    tx.connection.execute(update(replays).where(replays.c.id == replay_id).values(values))


def dead_letter_replay(tx: Transaction, lease: Lease, cause: str) -> None:
    """Cancels a replay that left its queue for good, and emits the operators' event."""
    tx.change(replays, lease.key, {"state": "cancelled", "finished_at": tx.now})
    outbox.emit_dead_letter(tx, lease, cause, None)


@dataclass(frozen=True, slots=True)
class ReplayWorker:
    """Stage `replay`."""

    resources: Resources

    async def run(self, lease: Lease) -> None:
        store = self.resources.store
        page = await store.read(replay_page, lease.key, PAGE)
        await store.write(record_pages, (lease, page))
