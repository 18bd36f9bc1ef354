"""Submissions that wait until our key and account are taken again: put off unsent, due at once when
they are.

A row that is held keeps the name of the process that put it off in `submit_lease_owner`, without a
lease. It is due by itself after its wait: if that process dies, whoever lives tries it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select, update

from service.db.tables import tasks
from service.db.transaction import Lease, Transaction
from service.queue import leases
from service.tasks.rows import TaskRow
from service.tasks.state import State
from service.tasks.transitions import change, lock


@dataclass(frozen=True, slots=True)
class Hold:
    """Nothing was sent: looked at again after `wait_ms`, and when it is `give_up_ms` old: then it
    is tried before it is given up.
    """

    lease: Lease
    wait_ms: int
    give_up_ms: int


def hold_submissions(tx: Transaction, items: Sequence[Hold]) -> list[bool]:
    """Puts tasks off, the attempt uncounted; whoever waits for the first outcome is told. False:
    the lease was lost.
    """
    rows = lock(tx, (item.lease.key for item in items))
    results = []
    for item in items:
        row = rows.get(item.lease.key)
        held = row is not None and leases.holds(item.lease, row)
        results.append(held)
        if row is not None and held:
            change(tx, row, **_held(tx, row, item))
    return results


def _held(tx: Transaction, row: TaskRow, item: Hold) -> dict[str, Any]:
    state, give_up_at, due_at = (row.state, row.created_at + item.give_up_ms, tx.now + item.wait_ms)
    if state not in (State.QUEUED, State.UNCERTAIN):  # cancelled meanwhile, or proved to be there
        return leases.release("submit", row.submit_due_at)
    if state is State.QUEUED and tx.now < give_up_at:
        due_at = min(due_at, give_up_at)
    more = {"lease_owner": tx.process, "attempts": row.submit_attempts - 1}
    return leases.release("submit", due_at, **more) | {
        "submit_outcomes": max(1, row.submit_outcomes)
    }


def resume_submissions(tx: Transaction, items: Sequence[int]) -> list[int]:
    """Makes tasks that this process holds due, so many of each item at most, in their turn; how
    many they were.
    """
    due, lease, owner = (
        tasks.c[f"submit_{name}"] for name in ("due_at", "lease_until", "lease_owner")
    )
    counts = []
    for most in items:
        held = (
            select(tasks.c.id)
            .where(due > tx.now, lease.is_(None), owner == tx.process)
            .order_by(tasks.c.submit_turn)
            .limit(most)
        )
        # Materialised: a plan that ran the subquery once for each row would take more than so many.
        chosen = held.with_for_update(skip_locked=True).cte("held").prefix_with("MATERIALIZED")
        resumed = (
            update(tasks)
            .where(tasks.c.id.in_(select(chosen.c.id)))
            .values({due: tx.now, owner: None})
            .returning(tasks.c.id)
        )
        counts.append(len(tx.connection.execute(resumed).all()))
        if counts[-1]:
            tx.due.add("submit")
    return counts
