"""Deliveries: what an attempt needs, the record of what came of it, and lists of them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, and_, bindparam, case, func, over, select, update

from service.db.list_indexes import REFUSED, UNFINISHED
from service.db.paging import Row, Selection, matching, page
from service.db.prepared import run, run_many, run_mappings
from service.db.tables import attempts, deliveries, endpoints, events, owners, tasks
from service.db.transaction import Lease, Transaction, changing, inserting, one_by_one
from service.events import delivery_order, failures, outbox
from service.events.endpoint_health import note_attempt, type_of
from service.events.endpoints import DeliveryAttempt, lock_endpoint
from service.events.outbox import ORIGIN, DeliveryToSend
from service.ops.tracing import Origin
from service.queue import leases

COLUMNS = ("id", "status", "duration_ms", "error", "answer")  # of an attempt
ATTEMPTS = 200  # of a delivery in a list
_to_callback = deliveries.c.endpoint_id.is_(None)
_DELIVERIES_TO_SEND = (
    select(
        *(deliveries.c[name] for name in ("id", "owner", "endpoint_id", "task_id", "state")),
        func.coalesce(endpoints.c.url, case((_to_callback, tasks.c.callback_url))).label("url"),
        func.coalesce(endpoints.c.secret, owners.c.callback_secret).label("secret"),
        endpoints.c.status.label("endpoint_status"),
        endpoints.c.paused_until,
        deliveries.c.planned_at,
        *(deliveries.c[name] for name in ("event_id", "order_key", "sequence", "slot_at")),
        *(endpoints.c.options, endpoints.c.headers),
        *ORIGIN,
    )
    .select_from(
        deliveries.outerjoin(endpoints, endpoints.c.id == deliveries.c.endpoint_id)
        .outerjoin(tasks, tasks.c.id == deliveries.c.task_id)
        .outerjoin(owners, and_(_to_callback, owners.c.name == deliveries.c.owner))
    )
    .where(deliveries.c.id.in_(bindparam("ids", expanding=True)))
)
_EVENTS = select(events).where(events.c.id.in_(bindparam("ids", expanding=True)))


def deliveries_to_send(connection: Connection, ids: Sequence[str]) -> dict[str, DeliveryToSend]:
    """The deliveries by id."""
    rows = run_mappings(connection, _DELIVERIES_TO_SEND, {"ids": list(ids)})
    parameters = {"ids": list({row["event_id"] for row in rows})}
    by_id = {row["id"]: row for row in run_mappings(connection, _EVENTS, parameters)}
    return {row["id"]: _to_send(connection, row, by_id.get(row["event_id"])) for row in rows}


def delivery_to_send(connection: Connection, delivery_id: str) -> DeliveryToSend | None:
    return deliveries_to_send(connection, [delivery_id]).get(delivery_id)


def _to_send(connection: Connection, row: Row, event: Row | None) -> DeliveryToSend:
    values = dict(row)
    origin = Origin(*(values.pop(column.name) for column in ORIGIN))
    paced = bool(delivery_order.interval_ms(values.pop("options")))
    del values["sequence"], values["event_id"]
    behind = row["order_key"] is not None and delivery_order.is_behind(connection, row)
    return DeliveryToSend(**values, event=event, origin=origin, paced=paced, behind=behind)


@dataclass(frozen=True, slots=True)
class DeliveryOutcome:
    """The end of a lease: `delivered`, `retry` after `wait_ms`, `dead`, `gone` (410), `held`
    (the endpoint is paused), `snooze` (not tried, due again after `wait_ms`) or `behind` (not
    tried, an earlier delivery of its key goes first).

    `wake`: other deliveries snoozed until this attempt ended. `early`: the delivery was brought
    forward, so that the attempt does not count and the planned one still comes.
    """

    lease: Lease
    result: str
    attempt: DeliveryAttempt | None = None
    wait_ms: int = 0
    disable_after_ms: int = 0
    wake: bool = False
    early: bool = False


def seen(attempt: DeliveryAttempt | None) -> tuple[int | None, str | None]:
    """The response's status, and what went wrong."""
    return (attempt.status, attempt.error) if attempt is not None else (None, None)


def record_attempts(tx: Transaction, items: Sequence[DeliveryOutcome]) -> list[bool]:
    """Records attempts. False: the lease had ended. The attempt is kept, and the holder of the
    next lease decides about the delivery.
    """
    locked = _lock_deliveries(tx.connection, items)
    rows = {row["id"]: row for row in locked}
    recorded = {row["known_attempt"] for row in locked}
    pairs = [(rows[item.lease.key], item.attempt) for item in items if item.lease.key in rows]
    _insert_attempts(tx, [(row, each) for row, each in pairs if each and each.id not in recorded])
    # A success changes no endpoint that did not fail before, nor in this batch.
    failed = {each.lease.key for each in items if each.attempt and each.result != "delivered"}
    uncalm = {row["endpoint_id"] for row in locked if row["failing_since"] or row["id"] in failed}
    calm = {row["endpoint_id"] for row in locked} - uncalm
    results = []
    for item in items:
        row = rows.get(item.lease.key)
        leased = row is not None and leases.holds(item.lease, row)
        if item.wake:
            tx.due.add(item.lease.stage)
        if row is not None and leased:
            if _is_plain(row, item, calm):
                ended = {"state": "delivered", "finished_at": tx.now, "slot_at": None}
                ended |= leases.release(item.lease.stage, None)
                tx.change(deliveries, row["id"], ended | {"last_status": seen(item.attempt)[0]})
            else:
                tx.write()
                _record(tx, row, item, calm)
            del rows[item.lease.key]  # its lease has ended
        results.append(leased)
    return results


_KNOWN = and_(
    attempts.c.delivery_id == deliveries.c.id, attempts.c.id.in_(bindparam("tried", expanding=True))
)
_LOCKING = (
    select(deliveries, attempts.c.id.label("known_attempt"), endpoints.c.failing_since)
    .select_from(
        deliveries.outerjoin(attempts, _KNOWN).outerjoin(
            endpoints, endpoints.c.id == deliveries.c.endpoint_id
        )
    )
    .where(deliveries.c.id.in_(bindparam("keys", expanding=True)))
    .order_by(deliveries.c.id)
    .with_for_update(of=deliveries)
)


def _lock_deliveries(
    connection: Connection, items: Sequence[DeliveryOutcome]
) -> list[dict[str, Any]]:
    """The deliveries, locked, with those of the attempts that are there already: an operation runs
    again if the answer to its commit was lost. The endpoint's `failing_since` is not locked.
    """
    tried = [item.attempt.id for item in items if item.attempt]
    keys = [item.lease.key for item in items]
    return run_mappings(connection, _LOCKING, {"tried": tried, "keys": keys})


def _insert_attempts(tx: Transaction, pairs: Sequence[tuple[Row, DeliveryAttempt]]) -> None:
    rows = [
        {
            "delivery_id": row["id"],
            "endpoint_id": row["endpoint_id"],
            "time": tx.now,
            **{name: getattr(attempt, name) for name in COLUMNS},
        }
        for row, attempt in pairs
    ]
    if rows:
        run_many(tx.connection, inserting(attempts), rows)


def _is_plain(row: Row, item: DeliveryOutcome, calm: Collection[str]) -> bool:
    """Whether the outcome changes no other row than the delivery's: it arrived at its first
    attempt, and it was not replayed, ordered or moved.
    """
    more = any(row[name] is not None for name in ("cause", "order_key", "replay_id", "planned_at"))
    plain = row["state"] == "pending" and row["endpoint_id"] in calm and not more
    return plain and item.result == "delivered"


def _record(tx: Transaction, row: Row, item: DeliveryOutcome, calm: Collection[str]) -> None:
    result, endpoint_id, endpoint = item.result, row["endpoint_id"], None
    if result in ("gone", "held") and endpoint_id is not None:
        endpoint = lock_endpoint(tx, endpoint_id)
    if item.attempt is not None and endpoint is not None and result == "gone":
        result = "gone" if item.attempt.url in (None, endpoint.url) else "retry"
    finished = result in ("delivered", "dead", "gone")
    # A held delivery has no due time: it is released when the endpoint is enabled. If the endpoint
    # was enabled meanwhile, nothing would release it, so it is due at once.
    paused = result == "held" and endpoint is not None and endpoint.status == "paused"
    ended = finished or paused or row["state"] != "pending"
    wait_ms = delivery_order.wait_behind(tx, row) if result == "behind" else item.wait_ms
    values = leases.release(item.lease.stage, None if ended else tx.now + wait_ms)
    if finished:
        state = "delivered" if result == "delivered" else "dead"
        values |= {"state": state, "finished_at": tx.now}
    elif result in ("held", "snooze", "behind") or item.early:
        values["attempts"] = row["attempts"] - 1  # no request was made, or one beside the schedule
    else:
        values["planned_at"] = None
    if item.attempt is not None:
        values["slot_at"] = None  # a retry takes a time of its own
    values |= failures.after(tx, row, result, *seen(item.attempt))
    run(tx.connection, changing(deliveries, frozenset(values)), {"row_id": row["id"], **values})
    if finished:
        delivery_order.release_next(tx, row)
    attempt = item.attempt
    if attempt is not None and result == "dead":
        _emit_exhausted(tx, row)
    if attempt is not None and endpoint_id is not None and not attempt.ours:
        more = row["planned_at"] is not None
        if endpoint_id in calm and not more:
            return
        note_attempt(tx, row, result, attempt, item.disable_after_ms, more=more)


@dataclass(frozen=True, slots=True)
class ManualAttempt:
    """An attempt that a client asked for: `delivered`, `gone` or `failed`. Planned retries go on
    unless this one was delivered, or a task's own callback_url answered 410.
    """

    delivery_id: str
    result: str
    attempt: DeliveryAttempt


@one_by_one
def record_manual_attempts(tx: Transaction, item: ManualAttempt) -> None:
    mine = deliveries.c.id == item.delivery_id
    rows = tx.connection.execute(select(deliveries).where(mine).with_for_update()).mappings()
    row = rows.first()
    existing = select(attempts.c.id).where(attempts.c.id == item.attempt.id)
    if row is None or tx.connection.scalar(existing) is not None:
        return
    _insert_attempts(tx, [(row, item.attempt)])
    gone = item.result == "gone" and row["state"] == "pending" and row["endpoint_id"] is None
    values: dict[str, Any] = {}
    if item.result == "delivered" or gone:
        state = "dead" if gone else "delivered"
        values = leases.release("deliver", None, state=state, finished_at=tx.now)
    if item.result == "delivered" or row["state"] != "delivered":
        values |= failures.after(tx, row, item.result, *seen(item.attempt))
    if values:
        tx.connection.execute(update(deliveries).where(mine).values(values))
    if "state" in values:
        delivery_order.release_next(tx, row)
    if row["endpoint_id"] is not None:
        note_attempt(tx, row, item.result, item.attempt, manual=True)


def _emit_exhausted(tx: Transaction, row: Row) -> None:
    """A dead delivery of an operators' event emits none, or a dead operators' endpoint would feed
    itself for ever.
    """
    type = type_of(tx, row)
    if type is not None and type.startswith("image.task."):
        data = {name: row[name] for name in ("endpoint_id", "event_id", "task_id")}
        data["delivery_id"] = row["id"]
        outbox.emit_operators(tx, "delivery.exhausted", data, task_id=row["task_id"])


def dead_letter_delivery(tx: Transaction, lease: Lease, cause: str) -> None:
    """Ends a delivery that left its queue for good, and emits the operators' event."""
    statement = select(deliveries).where(deliveries.c.id == lease.key)
    row = tx.connection.execute(statement).mappings().first()
    failure = failures.failed(row, "worker fault", tx.now) if row else {}
    tx.change(deliveries, lease.key, {"state": "dead", "finished_at": tx.now, **failure})
    if row is not None:
        delivery_order.release_next(tx, row)
    outbox.emit_dead_letter(tx, lease, cause, row["task_id"] if row else None)


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
    by_id: dict[str, list[Row]] = {row["id"]: [] for row in rows}
    order = attempts.c.time, attempts.c.id
    latest = over(func.row_number(), attempts.c.delivery_id, [each.desc() for each in order])
    tried = select(attempts, latest.label("number")).where(attempts.c.delivery_id.in_(by_id))
    shown = tried.subquery()
    few = select(shown).where(shown.c.number <= ATTEMPTS).order_by(shown.c.time, shown.c.id)
    for attempt in connection.execute(few).mappings():
        by_id[attempt["delivery_id"]].append(attempt)
    return [(row, by_id[row["id"]]) for row in rows]
