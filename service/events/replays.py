"""Replays: an endpoint gets events again, some a second, by deliveries of their own."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import insert, select, update

from service.db.paging import Row
from service.db.tables import deliveries, endpoints, events, replays
from service.db.transaction import Lease, Transaction
from service.events import outbox
from service.events.outbox import OPERATORS
from service.events.replay_queries import Extent, Wanted
from service.queue import leases


@dataclass(frozen=True, slots=True)
class Replay:
    """One that somebody asked for; `owner`: whose it is, the endpoint's."""

    id: str
    owner: str
    wanted: Wanted
    extent: Extent


def insert_replays(tx: Transaction, items: Sequence[Replay]) -> list[bool]:
    """Starts replays; False where the endpoint takes nothing now, or is gone."""
    return [_insert(tx, item) for item in items]


def _insert(tx: Transaction, item: Replay) -> bool:
    wanted, extent = item.wanted, item.extent
    status = tx.connection.execute(
        select(endpoints.c.status).where(endpoints.c.id == wanted.endpoint_id).with_for_update()
    ).scalar()
    if status is None or status == "disabled":
        return False
    if tx.connection.execute(select(replays.c.id).where(replays.c.id == item.id)).first() is None:
        row = {
            "id": item.id,
            "owner": item.owner,
            "endpoint_id": wanted.endpoint_id,
            "since_at": wanted.since,
            "until_at": tx.now if wanted.until is None else wanted.until,
            "types": list(wanted.types),
            "only": wanted.only,
            "state": "running",
            "count": extent.count,
            "made": 0,
            "position": extent.position,
            "last": extent.last,
            "created_at": tx.now,
            **leases.enqueue(tx, "replay", item.id),
        }
        tx.connection.execute(insert(replays).values(row))
    return True


@dataclass(frozen=True, slots=True)
class Page:
    """The next events of a replay; `position`: the last that was examined, None: none; due again
    after `wait_ms`, None: that was all.
    """

    lease: Lease
    events: Sequence[Row]
    position: int | None
    wait_ms: int | None


def record_pages(tx: Transaction, items: Sequence[Page]) -> list[bool]:
    """Makes the deliveries; False where the lease had ended or the replay is over."""
    return [_record(tx, item) for item in items]


def _record(tx: Transaction, item: Page) -> bool:
    row = (
        tx.connection.execute(
            select(replays).where(replays.c.id == item.lease.key).with_for_update()
        )
        .mappings()
        .first()
    )
    if row is None or not leases.holds(item.lease, row):
        return False
    if row["state"] != "running":
        leases.done(tx, [item.lease])
        return False
    endpoint = (
        select(endpoints.c.status, endpoints.c.owner)
        .where(endpoints.c.id == row["endpoint_id"])
        .with_for_update()
    )
    found = tx.connection.execute(endpoint).first()
    if found is None or found.status == "disabled":
        finish(tx, row["id"], "cancelled")
        return False
    if known := _kept(tx, item.events):
        born = {"due_at": tx.now, "attempts": 0, "fence": 0, "deaths": 0, "faults": 0}
        of = {
            "owner": found.owner or OPERATORS,
            "endpoint_id": row["endpoint_id"],
            "replay_id": row["id"],
        }
        made = [
            {"event_id": event["id"], "task_id": event["task_id"], "id": tx.id("delivery")}
            for event in known
        ]
        rows = [{**each, **of, **born, "state": "pending", "created_at": tx.now} for each in made]
        tx.connection.execute(insert(deliveries), rows)
        tx.due.add("redeliver")
    values = {
        "made": row["made"] + len(known),
        "position": row["position"] if item.position is None else item.position,
    }
    if item.wait_ms is None:
        finish(tx, row["id"], "done", **values)
    else:
        values |= leases.release("replay", tx.now + item.wait_ms, attempts=0)
        tx.connection.execute(update(replays).where(replays.c.id == row["id"]).values(values))
    return True


def _kept(tx: Transaction, found: Sequence[Row]) -> list[Row]:
    """Those that retention has not taken meanwhile; it does not take them before the commit."""
    statement = select(events.c.sequence).where(
        events.c.sequence.in_([row["sequence"] for row in found])
    )
    known = set(tx.connection.execute(statement.with_for_update()).scalars()) if found else set()
    return [row for row in found if row["sequence"] in known]


@dataclass(frozen=True, slots=True)
class Cancelled:
    """A replay that is to end; `owner` None: whoever owns it (admin)."""

    id: str
    owner: str | None


def cancel_replays(tx: Transaction, items: Sequence[Cancelled]) -> list[bool]:
    """Ends replays, with what they have not yet delivered; False for those that are not there for
    this owner.
    """
    results = []
    for item in items:
        statement = select(replays).where(replays.c.id == item.id).with_for_update()
        if item.owner is not None:
            statement = statement.where(replays.c.owner == item.owner)
        row = tx.connection.execute(statement).mappings().first()
        if row is not None:
            if row["state"] == "running":
                finish(tx, item.id, "cancelled")
            pending = update(deliveries).where(
                deliveries.c.replay_id == item.id, deliveries.c.state == "pending"
            )
            tx.connection.execute(pending.values(state="dead", finished_at=tx.now, due_at=None))
        results.append(row is not None)
    return results


def finish(tx: Transaction, replay_id: str, state: str, **more: int) -> None:
    values = {**leases.release("replay", None), "state": state, "finished_at": tx.now, **more}
    tx.connection.execute(update(replays).where(replays.c.id == replay_id).values(values))


def dead_letter_replay(tx: Transaction, lease: Lease, cause: str) -> None:
    """Cancels a replay whose row is out of its queue for good, and tells operators."""
    tx.change(replays, lease.key, {"state": "cancelled", "finished_at": tx.now})
    outbox.emit_dead_letter(tx, lease, cause, None)
