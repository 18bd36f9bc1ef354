"""How far each broker has come in the outbox, and which process publishes there: one at a time,
under a lease with a fence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Update, insert, select, update

from service.db.tables import counters, sinks
from service.db.transaction import Transaction
from service.events import event_queries
from service.queue.leases import LEASE_MS, TOLERANCE_MS


@dataclass(frozen=True, slots=True)
class Hold:
    """The right to publish events after `position` until the lease ends."""

    name: str
    fence: int
    position: int


def hold_sinks(tx: Transaction, names: Sequence[str]) -> list[Hold | None]:
    """Leases sinks to this process, or renews its leases; None: another process has it. A sink that
    is new begins at the outbox's end.
    """
    return [_hold(tx, name) for name in names]


def _hold(tx: Transaction, name: str) -> Hold | None:
    wanted = select(sinks).where(sinks.c.name == name).with_for_update()
    row = tx.connection.execute(wanted).first()
    if row is None:  # two processes that start together make it once
        tx.connection.execute(select(counters).where(counters.c.name == "clock").with_for_update())
        row = tx.connection.execute(wanted).first()
    lease: dict[str, Any] = {
        "lease_until": tx.now + LEASE_MS,
        "lease_owner": tx.process,
        "seen_at": tx.now,
    }
    if row is None:
        position = event_queries.outbox_end(tx.connection)
        tx.connection.execute(insert(sinks).values(name=name, position=position, fence=1, **lease))
        return Hold(name, 1, position)
    held = (
        row.lease_until is not None and tx.now < row.lease_until <= tx.now + LEASE_MS + TOLERANCE_MS
    )  # further ahead: a clock jumped
    if held and row.lease_owner != tx.process:
        return None
    fence = row.fence if held else row.fence + 1
    tx.connection.execute(update(sinks).where(sinks.c.name == name).values(fence=fence, **lease))
    return Hold(name, fence, row.position)


def advance_sinks(tx: Transaction, holds: Sequence[Hold]) -> list[bool]:
    """Notes that brokers have everything up to `position`; False: the lease is another's by now,
    and theirs counts.
    """
    return [
        tx.connection.execute(_under(hold).values(position=hold.position)).rowcount == 1
        for hold in holds
    ]


def release_sinks(tx: Transaction, holds: Sequence[Hold]) -> list[bool]:
    """Gives sinks up, for others to take at once."""
    return [
        tx.connection.execute(_under(hold).values(lease_until=None, lease_owner=None)).rowcount == 1
        for hold in holds
    ]


def _under(hold: Hold) -> Update:
    return update(sinks).where(
        sinks.c.name == hold.name, sinks.c.fence == hold.fence, sinks.c.lease_until.is_not(None)
    )
