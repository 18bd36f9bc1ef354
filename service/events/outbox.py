"""The outbox: events and their deliveries, written last in the transaction that causes them.

The sequence comes from one counter row, which stays locked until the commit. So events become
visible in the order of their sequence, and a reader that continues after the last event it saw
misses none, with any number of writers.
"""

from dataclasses import dataclass
from typing import Any

import structlog
from sqlalchemy import bindparam, or_, select

from service.db.counters import number
from service.db.paging import Row
from service.db.prepared import run, run_many
from service.db.tables import deliveries, endpoints, events, steps, tasks
from service.db.transaction import Emitted, Lease, Transaction, inserting
from service.events import endpoint_options
from service.events.documents import type_matches
from service.ids import sequence_text
from service.ops.metrics import Metrics
from service.ops.tracing import NO_ORIGIN, Origin
from service.queue import leases
from service.queue.stage import ADVICE
from service.strict_json import JSON

log = structlog.get_logger()

OPERATORS = "admin"
COLUMNS = ("sequence", "id", "owner", "type", "task_id", "called_back_at", "data")
ORIGIN = tasks.c.upstream_id, tasks.c.request_id, tasks.c.traceparent  # of an `Origin`
SUBSCRIBER = (
    *("id", "owner", "types", "url", "secret", "status", "paused_until"),
    *("options", "headers"),
)


@dataclass(frozen=True, slots=True)
class DeliveryToSend:
    """A delivery with all that an attempt needs.

    `url` None: the endpoint or the task is gone. `secret` None: the owner has no callback secret
    yet. `event` None: retention has deleted it.
    """

    id: str
    owner: str
    endpoint_id: str | None  # None: the task's own callback_url
    task_id: str | None
    state: str  # pending | delivered | dead
    url: str | None
    secret: bytes | None  # encrypted
    endpoint_status: str | None
    paused_until: int | None
    event: Row | None
    planned_at: int | None = None  # when a delivery that was brought forward was due
    origin: Origin = NO_ORIGIN  # of the task
    headers: bytes | None = None  # encrypted
    paced: bool = False  # the endpoint has a rate
    order_key: str | None = None  # the endpoint is ordered
    behind: bool = False  # an earlier delivery of its key is pending
    slot_at: int | None = None  # the time that the rate gave it


def emit_operators(tx: Transaction, type: str, data: JSON, *, task_id: str | None = None) -> None:
    tx.emitted.append(Emitted(tx.id("event"), OPERATORS, type, task_id, data))


def emit_dead_letter(tx: Transaction, lease: Lease, cause: str, task_id: str | None) -> None:
    """Adds the operators' event of a row that left its queue for good."""
    data = {"task_id": task_id, "stage": lease.stage, "key": lease.key, "cause": cause}
    data["advice"] = ADVICE[lease.stage]
    emit_operators(tx, "task.parked", data, task_id=task_id)


def flush(tx: Transaction) -> None:
    """Inserts the transaction's timeline steps, its events in sequence, and their deliveries."""
    if tx.steps:
        run_many(tx.connection, inserting(steps), tx.steps)
    if not tx.emitted:
        return
    subscribers = _subscribers(tx)
    _find_origins(tx)
    event_rows = [
        {name: getattr(event, name) for name in COLUMNS}
        | {"terminal": event.terminal or None, "time": tx.now}
        | {"traceparent": origin_of(tx, event.task_id).traceparent}
        for event in tx.emitted
    ]
    rows = [
        row
        for event, event_row in zip(tx.emitted, event_rows, strict=True)
        for row in _deliveries(tx, event, event_row, subscribers)
    ]
    number(tx, "events", event_rows)
    sequences = {row["id"]: row["sequence"] for row in event_rows}
    for event in tx.emitted:
        event.sequence = sequences[event.id]
    for row in rows:
        row["sequence"] = sequences[row["event_id"]] if row["order_key"] else None
    run_many(tx.connection, inserting(events), event_rows)
    if rows:
        run_many(tx.connection, inserting(deliveries), rows)


def origin_of(tx: Transaction, task_id: str | None) -> Origin:
    return tx.origins.get(task_id or "", NO_ORIGIN)


def _find_origins(tx: Transaction) -> None:
    """Reads the origins of tasks that operators' events name."""
    missing = {event.task_id for event in tx.emitted if event.task_id} - tx.origins.keys()
    if missing:
        statement = select(tasks.c.id, *ORIGIN).where(tasks.c.id.in_(missing))
        for id, *values in tx.connection.execute(statement):
            tx.origins[id] = Origin(*values)


_SUBSCRIBERS = select(*(endpoints.c[name] for name in SUBSCRIBER)).where(
    endpoints.c.status != "disabled",
    or_(endpoints.c.owner.is_(None), endpoints.c.owner.in_(bindparam("owners", expanding=True))),
)


def _subscribers(tx: Transaction) -> list[JSON]:
    owners = list({event.owner for event in tx.emitted})
    rows = run(tx.connection, _SUBSCRIBERS, {"owners": owners})
    return [dict(zip(SUBSCRIBER, row, strict=True)) for row in rows]


def _deliveries(
    tx: Transaction, event: Emitted, event_row: JSON, subscribers: list[JSON]
) -> list[dict[str, Any]]:
    targets: list[tuple[JSON | None, str]] = [
        (endpoint, endpoint["owner"] or OPERATORS)
        for endpoint in subscribers
        if endpoint["owner"] in (None, event.owner)
        and any(type_matches(pattern, event.type) for pattern in endpoint["types"])
        and endpoint_options.wants(endpoint["options"], event.data)
    ]
    if event.task_callback:
        targets.append((None, event.owner))
    rows = []
    for endpoint, owner in targets:
        delivery_id = tx.id("delivery")
        options = None if endpoint is None else endpoint["options"]
        named: JSON = {
            "id": delivery_id,
            "owner": owner,
            "endpoint_id": endpoint and endpoint["id"],
            "task_id": event.task_id,
            "state": "pending",
        }
        new = None  # the worker reads the row itself if it has to know of other deliveries
        if endpoint is not None and not endpoint_options.paced(options):
            new = DeliveryToSend(
                **named,
                **{name: endpoint[name] for name in ("url", "secret", "paused_until", "headers")},
                endpoint_status=endpoint["status"],
                event=event_row,
                origin=origin_of(tx, event.task_id),
            )
        named["event_id"], named["created_at"] = event.id, tx.now
        named["order_key"] = endpoint_options.order_key(options, event.task_id, event.data)
        rows.append(named | leases.enqueue(tx, "deliver", delivery_id, new, owner=owner))
    event.deliveries = len(rows)
    return rows


def log_emitted(tx: Transaction, metrics: Metrics) -> None:
    for event in tx.emitted:
        origin = origin_of(tx, event.task_id).ids
        fields = {"owner": event.owner, "task_id": event.task_id, **origin}
        if event.terminal:
            task = event.data
            log.info(
                "task.settled",
                **fields,
                state=task["state"],
                code=task["error"]["code"] if task["error"] else None,
                images=len(task["images"]),
                seconds=round(tx.now / 1000 - task["created"], 1),
            )
            if event.called_back_at is not None:
                metrics.callback_to_event_seconds.observe(
                    max(0, tx.now - event.called_back_at) / 1000
                )
        if event.type == "endpoint.disabled":
            endpoint_id, reason = event.data["endpoint_id"], event.data["reason"]
            log.warning("endpoint.disabled", endpoint_id=endpoint_id, reason=reason)
        log.info(
            "event.emitted",
            **fields,
            event_id=event.id,
            type=event.type,
            sequence=sequence_text(event.sequence),
            deliveries=event.deliveries,
        )
