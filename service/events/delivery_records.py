"""Records what came of deliveries."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import and_, insert, or_, select, update

from service.db.tables import ZERO, attempts, deliveries, endpoints, events
from service.db.transaction import Lease, Transaction
from service.events import outbox
from service.events.endpoints import _change, disable
from service.ids import rfc3339
from service.queue import leases

HASTENED = 1000  # deliveries of an endpoint that is back


@dataclass(frozen=True, slots=True)
class Attempt:
    """One request to a subscriber. `status` None: no answer. `answer` is at most its first 2
    KiB.
    """

    id: str
    status: int | None
    duration_ms: int
    error: str | None
    answer: bytes


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an attempt leads to: `delivered`, `retry` after `wait_ms`, `dead`, `gone` (the endpoint
    wants no more), `held` (it is paused), `later` (not tried, due again after `wait_ms`).

    `pause_ms`: the endpoint asked for peace. `ours`: the fault was on this side, the endpoint is
    not to blame. `waited`: others have been put off until this one was over, and may be due. `url`:
    where the endpoint was when it was sent there; what an old address says is not held against the
    new one.
    """

    lease: Lease
    result: str
    attempt: Attempt | None = None
    wait_ms: int = 0
    pause_ms: int = 0
    ours: bool = False
    disable_after_ms: int = 0
    waited: bool = False
    url: str | None = None


def record_attempts(tx: Transaction, items: Sequence[Outcome]) -> list[bool]:
    """Records attempts; False where the lease had ended: the attempt is kept, the delivery's state
    is somebody else's.
    """
    statement = (
        select(deliveries)
        .where(deliveries.c.id.in_([item.lease.key for item in items]))
        .order_by(deliveries.c.id)
        .with_for_update()
    )
    rows = {row["id"]: dict(row) for row in tx.connection.execute(statement).mappings()}
    ids = [item.attempt.id for item in items if item.attempt]
    known = (
        set(tx.connection.execute(select(attempts.c.id).where(attempts.c.id.in_(ids))).scalars())
        if ids
        else set()
    )
    written = [
        item
        for item in items
        if item.attempt and item.lease.key in rows and item.attempt.id not in known
    ]
    if written:
        tx.connection.execute(insert(attempts), [_attempt_row(tx, item) for item in written])
    results = []
    for item in items:
        row = rows.get(item.lease.key)
        held = row is not None and leases.holds(item.lease, row)
        if item.waited:
            tx.due.add(item.lease.stage)
        if row is not None and held:
            _record(tx, row, item)
        results.append(held)
    return results


def _attempt_row(tx: Transaction, item: Outcome) -> dict[str, Any]:
    attempt = item.attempt
    assert attempt is not None
    return {
        "id": attempt.id,
        "delivery_id": item.lease.key,
        "time": tx.now,
        "status": attempt.status,
        "duration_ms": attempt.duration_ms,
        "error": attempt.error,
        "answer": attempt.answer,
    }


def _record(tx: Transaction, row: dict[str, Any], item: Outcome) -> None:
    endpoint_id = row["endpoint_id"]
    if item.result == "gone" and _moved(tx, endpoint_id, item.url):
        item = replace(item, result="retry")
    finished = item.result in ("delivered", "dead", "gone")
    held = item.result == "held" and _paused(tx, endpoint_id)
    due = (
        None if finished or held or row["state"] != "pending" else tx.now + item.wait_ms
    )  # buried meanwhile: not tried again
    values = leases.release(item.lease.stage, due)
    if finished:
        values |= {
            "state": "delivered" if item.result == "delivered" else "dead",
            "finished_at": tx.now,
        }
    elif item.result in ("held", "later"):  # nothing was tried: the schedule is not shortened
        values["attempts"] = row["attempts"] - 1
    row.update(values)
    tx.connection.execute(update(deliveries).where(deliveries.c.id == row["id"]).values(values))
    if item.result == "dead" and item.attempt is not None:
        _exhausted(tx, row)
    if endpoint_id is not None and item.attempt is not None and not item.ours:
        _judge(tx, endpoint_id, item)


@dataclass(frozen=True, slots=True)
class ByHand:
    """An attempt that somebody asked for: `delivered`, `gone` or `failed`. What was planned goes
    on, unless this one brought it there or the subscriber wants no more. Else as in an `Outcome`.
    """

    delivery_id: str
    result: str
    attempt: Attempt
    pause_ms: int = 0
    url: str | None = None


def record_by_hand(tx: Transaction, items: Sequence[ByHand]) -> list[None]:
    for item in items:
        row = (
            tx.connection.execute(
                select(deliveries).where(deliveries.c.id == item.delivery_id).with_for_update()
            )
            .mappings()
            .first()
        )
        if (
            row is None
            or tx.connection.execute(
                select(attempts.c.id).where(attempts.c.id == item.attempt.id)
            ).first()
        ):
            continue
        lease = Lease("deliver", item.delivery_id, row["fence"], row["attempts"])
        outcome = Outcome(lease, item.result, item.attempt, pause_ms=item.pause_ms, url=item.url)
        tx.connection.execute(insert(attempts), [_attempt_row(tx, outcome)])
        if item.result == "delivered" or (
            item.result == "gone" and row["state"] == "pending" and row["endpoint_id"] is None
        ):
            values = leases.release(
                "deliver",
                None,
                state="dead" if item.result == "gone" else "delivered",
                finished_at=tx.now,
            )
            tx.connection.execute(
                update(deliveries).where(deliveries.c.id == item.delivery_id).values(values)
            )
        if row["endpoint_id"] is not None and item.result != "failed":
            _judge(tx, row["endpoint_id"], outcome)
        elif (
            row["endpoint_id"] is not None and item.pause_ms
        ):  # and no beginning of a time in which all failed
            until = tx.now + item.pause_ms
            mine = and_(endpoints.c.id == row["endpoint_id"], endpoints.c.status != "disabled")
            mine = and_(mine, endpoints.c.url == item.url) if item.url else mine
            sooner = or_(endpoints.c.paused_until.is_(None), endpoints.c.paused_until < until)
            tx.connection.execute(update(endpoints).where(mine, sooner).values(paused_until=until))
    return [None] * len(items)


def _paused(tx: Transaction, endpoint_id: str | None) -> bool:
    """Whether the endpoint is paused still: what is held is released once, when it is enabled."""
    statement = select(endpoints.c.status).where(endpoints.c.id == endpoint_id).with_for_update()
    return bool(tx.connection.execute(statement).scalar() == "paused")


def _moved(tx: Transaction, endpoint_id: str | None, url: str | None) -> bool:
    """Whether the endpoint has another address by now."""
    statement = select(endpoints.c.url).where(endpoints.c.id == endpoint_id).with_for_update()
    return url is not None and tx.connection.execute(statement).scalar() not in (None, url)


def _exhausted(tx: Transaction, row: dict[str, Any]) -> None:
    type = tx.connection.execute(
        select(events.c.type).where(events.c.id == row["event_id"])
    ).scalar()
    if type is not None and type.startswith(
        "image.task."
    ):  # a dead delivery of an operators' event raises none
        data = {
            "delivery_id": row["id"],
            "endpoint_id": row["endpoint_id"],
            "event_id": row["event_id"],
            "task_id": row["task_id"],
        }
        outbox.emit_operators(tx, "delivery.exhausted", data, task_id=row["task_id"])


def _judge(tx: Transaction, endpoint_id: str, item: Outcome) -> None:
    """Keeps what the attempt says of its endpoint, and disables one that is gone or only failed for
    too long.
    """
    columns = (
        endpoints.c.status,
        endpoints.c.failing_since,
        endpoints.c.paused_until,
        endpoints.c.url,
    )
    endpoint = tx.connection.execute(
        select(*columns).where(endpoints.c.id == endpoint_id).with_for_update()
    ).first()
    if endpoint is None or endpoint.status == "disabled" or item.url not in (None, endpoint.url):
        return
    if item.result == "delivered":
        if endpoint.failing_since is not None:
            _change(tx, endpoint_id, failing_since=None)
            if (endpoint.paused_until or 0) <= tx.now:
                _hasten(tx, endpoint_id)
        return
    since = endpoint.failing_since if endpoint.failing_since is not None else tx.now
    values: dict[str, Any] = {} if endpoint.failing_since is not None else {"failing_since": tx.now}
    if item.pause_ms:
        values["paused_until"] = max(tx.now + item.pause_ms, endpoint.paused_until or 0)
    if values:
        _change(tx, endpoint_id, **values)
    if item.result == "gone":
        disable(tx, endpoint_id, "the endpoint answered 410 Gone")
    elif tx.now - since >= item.disable_after_ms > 0:
        disable(tx, endpoint_id, f"every attempt failed since {rfc3339(since)}")


def _hasten(tx: Transaction, endpoint_id: str) -> None:
    """An endpoint takes deliveries again: what was put off meanwhile, and never tried, is due now,
    at most `HASTENED` of it.
    """
    mine = and_(
        deliveries.c.endpoint_id == endpoint_id,
        deliveries.c.state == "pending",
        deliveries.c.attempts == ZERO,
    )
    waiting = select(deliveries.c.id).where(
        mine, deliveries.c.lease_until.is_(None), deliveries.c.due_at > tx.now
    )
    locked = waiting.order_by(deliveries.c.due_at).limit(HASTENED).with_for_update(skip_locked=True)
    tx.connection.execute(
        update(deliveries).where(deliveries.c.id.in_(locked)).values(due_at=tx.now)
    )
    tx.due.update(("deliver", "redeliver"))


def dead_letter_delivery(tx: Transaction, lease: Lease, cause: str) -> None:
    """Ends a delivery whose row is out of its queue for good, and tells operators."""
    statement = select(deliveries.c.task_id).where(deliveries.c.id == lease.key)
    task_id = tx.connection.execute(statement).scalar()
    tx.change(deliveries, lease.key, {"state": "dead", "finished_at": tx.now})
    outbox.emit_dead_letter(tx, lease, cause, task_id)
