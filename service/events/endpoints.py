"""Endpoints: inserted, changed, disabled."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, insert, select, update

from service.db.tables import deliveries, endpoints
from service.db.transaction import Transaction
from service.events import outbox
from service.ids import rfc3339


def disable(tx: Transaction, endpoint_id: str, reason: str) -> None:
    """Switches an endpoint off: what is pending for it is dead, and nothing new is made until it is
    enabled again.
    """
    _change(tx, endpoint_id, status="disabled", disabled_at=tx.now, disabled_reason=reason)
    bury(tx, endpoint_id)
    outbox.emit_operators(
        tx,
        "endpoint.disabled",
        {"endpoint_id": endpoint_id, "reason": reason, "disabled_at": rfc3339(tx.now)},
    )


def bury(tx: Transaction, endpoint_id: str) -> None:
    """Makes every pending delivery of an endpoint dead."""
    tx.connection.execute(
        update(deliveries)
        .where(deliveries.c.endpoint_id == endpoint_id, deliveries.c.state == "pending")
        .values(state="dead", finished_at=tx.now, due_at=None)
    )


def _change(tx: Transaction, endpoint_id: str, **values: Any) -> None:
    tx.connection.execute(update(endpoints).where(endpoints.c.id == endpoint_id).values(values))


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A subscription to be made; `secret` is encrypted. `owner` None: every owner's events."""

    id: str
    owner: str | None
    url: str
    types: tuple[str, ...]
    description: str
    secret: bytes


def insert_endpoints(tx: Transaction, items: Sequence[Endpoint]) -> list[None]:
    known = set(
        tx.connection.execute(
            select(endpoints.c.id).where(endpoints.c.id.in_([item.id for item in items]))
        ).scalars()
    )
    for item in items:
        if item.id not in known:
            tx.connection.execute(
                insert(endpoints).values(
                    id=item.id,
                    owner=item.owner,
                    url=item.url,
                    types=list(item.types),
                    description=item.description,
                    status="enabled",
                    secret=item.secret,
                    created_at=tx.now,
                )
            )
    return [None] * len(items)


@dataclass(frozen=True, slots=True)
class EndpointChange:
    """New values for an endpoint, or with `delete` its end. `owner` None: whoever owns it
    (admin).
    """

    id: str
    owner: str | None
    url: str | None = None
    types: tuple[str, ...] | None = None
    description: str | None = None
    status: str | None = None  # enabled | paused | disabled
    delete: bool = False


def change_endpoints(tx: Transaction, items: Sequence[EndpointChange]) -> list[bool]:
    """Changes endpoints. False: this owner has no such endpoint."""
    return [_change_endpoint(tx, item) for item in items]


def _change_endpoint(tx: Transaction, item: EndpointChange) -> bool:
    statement = select(endpoints).where(endpoints.c.id == item.id).with_for_update()
    if (
        item.owner is not None
    ):  # nobody waits for the lock of another's: how long it took would tell that it is there
        statement = statement.where(endpoints.c.owner == item.owner)
    row = tx.connection.execute(statement).mappings().first()
    if row is None:
        return False
    if item.delete:
        bury(tx, item.id)
        tx.connection.execute(delete(endpoints).where(endpoints.c.id == item.id))
        return True
    told = {
        "url": item.url,
        "types": list(item.types) if item.types is not None else None,
        "description": item.description,
    }
    values: dict[str, Any] = {name: value for name, value in told.items() if value is not None}
    if item.url not in (None, row["url"]):  # what the old address did is not the new one's
        values |= {"failing_since": None, "paused_until": None}
    if item.status is not None and item.status != row["status"]:
        values |= {"status": item.status, "disabled_at": None, "disabled_reason": None}
        if item.status == "enabled":
            values |= {"failing_since": None, "paused_until": None}
            tx.connection.execute(  # what was held while it was paused
                update(deliveries)
                .where(
                    deliveries.c.endpoint_id == item.id,
                    deliveries.c.state == "pending",
                    deliveries.c.due_at.is_(None),
                )
                .values(due_at=tx.now)
            )
            tx.due.update(("deliver", "redeliver"))
        if item.status == "disabled":
            values |= {"disabled_at": tx.now, "disabled_reason": "by its owner"}
            bury(tx, item.id)
    if values:
        _change(tx, item.id, **values)
    return True
