"""The outbox: events and the deliveries derived from them, written last in the transaction that
caused them.

The sequence comes from one counter row that stays locked to the commit, so numbers become visible
in their own order: a reader who continues after the last one it saw misses nothing, with any number
of writers.
"""

from typing import Any

from sqlalchemy import RowMapping, insert, or_, select, update

from service.db.tables import counters, deliveries, endpoints, events, steps
from service.db.transaction import Emitted, Lease, Transaction
from service.events.documents import type_matches
from service.queue import leases
from service.strict_json import JSON

OPERATORS = "admin"


def emit(
    tx: Transaction,
    type: str,
    *,
    owner: str,
    task_id: str,
    data: JSON,
    terminal: bool = False,
    task_callback: bool = False,
    called_back_at: int | None = None,
) -> None:
    """Adds an event of a task. `data` is the task's document as it is now.

    `task_callback`: the event also goes to the task's own callback_url. `called_back_at`: when
    the upstream's first terminal callback arrived.
    """
    tx.emitted.append(
        Emitted(
            id=tx.id("event"),
            owner=owner,
            type=type,
            task_id=task_id,
            data=data,
            terminal=terminal,
            task_callback=task_callback,
            called_back_at=called_back_at,
        )
    )


def emit_operators(tx: Transaction, type: str, data: JSON, *, task_id: str | None = None) -> None:
    """Adds an operators' event."""
    tx.emitted.append(
        Emitted(id=tx.id("event"), owner=OPERATORS, type=type, task_id=task_id, data=data)
    )


def emit_dead_letter(tx: Transaction, lease: Lease, cause: str, task_id: str | None) -> None:
    """Adds the operators' event of a row that left its queue for good."""
    data = {"task_id": task_id, "stage": lease.stage, "key": lease.key, "cause": cause}
    emit_operators(tx, "task.parked", data, task_id=task_id)


def flush(tx: Transaction) -> None:
    """Writes what the transaction's operations left: timeline steps, events in sequence, their
    deliveries.
    """
    if tx.steps:
        tx.connection.execute(insert(steps), tx.steps)
    if not tx.emitted:
        return
    takers = _takers(tx)
    rows = [row for event in tx.emitted for row in _deliveries(tx, event, takers)]
    last = tx.connection.execute(
        update(counters)
        .where(counters.c.name == "events")
        .values(value=counters.c.value + len(tx.emitted))
        .returning(counters.c.value)
    ).scalar_one()
    for event, sequence in zip(
        tx.emitted, range(last - len(tx.emitted) + 1, last + 1), strict=True
    ):
        event.sequence = sequence
    tx.connection.execute(
        insert(events),
        [
            {
                "sequence": event.sequence,
                "id": event.id,
                "owner": event.owner,
                "type": event.type,
                "task_id": event.task_id,
                "terminal": event.terminal or None,
                "time": tx.now,
                "called_back_at": event.called_back_at,
                "data": event.data,
            }
            for event in tx.emitted
        ],
    )
    if rows:
        tx.connection.execute(insert(deliveries), rows)


def _takers(tx: Transaction) -> list[RowMapping]:
    owners = {event.owner for event in tx.emitted}
    statement = select(endpoints.c.id, endpoints.c.owner, endpoints.c.types).where(
        endpoints.c.status != "disabled",
        or_(endpoints.c.owner.is_(None), endpoints.c.owner.in_(owners)),
    )
    return list(tx.connection.execute(statement).mappings())


def _deliveries(tx: Transaction, event: Emitted, takers: list[RowMapping]) -> list[dict[str, Any]]:
    targets: list[tuple[str | None, str]] = [
        (taker["id"], taker["owner"] or OPERATORS)
        for taker in takers
        if taker["owner"] in (None, event.owner)
        and any(type_matches(pattern, event.type) for pattern in taker["types"])
    ]
    if event.task_callback:
        targets.append((None, event.owner))
    rows = []
    for endpoint_id, owner in targets:
        delivery_id = tx.id("delivery")
        rows.append(
            {
                "id": delivery_id,
                "owner": owner,
                "endpoint_id": endpoint_id,
                "event_id": event.id,
                "task_id": event.task_id,
                "state": "pending",
                "created_at": tx.now,
                **leases.enqueue(tx, "deliver", delivery_id),
            }
        )
    event.deliveries = len(rows)
    return rows
