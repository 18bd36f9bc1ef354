"""Turns between owners in submitting: start-time fair queueing (Goyal, Vin, Cheng 1996), its tags kept in the rows.

A new task's turn is the one after its owner's last that still waits, but no earlier than where submitting stands. So
whoever has ten thousand waiting and whoever has one are served alternately, and nobody saves turns up by having waited for none.
"""

from typing import Any

from sqlalchemy import ColumnElement, Select, func, or_, select

from service.model import State
from service.store import Transaction
from service.store.tables import tasks

turn, due, lease = tasks.c.submit_turn, tasks.c.submit_due_at, tasks.c.submit_lease_until
waits = due.is_not(None)
unsent = tasks.c.state.in_([State.QUEUED.value, State.SUBMITTING.value])  # an uncertain task has had its turn


class Turns:
    """The turns of a transaction's new tasks. `behind`: others are due already, and none of these may be sent before them."""

    def __init__(self, tx: Transaction) -> None:
        self._tx = tx
        free = or_(lease.is_(None), lease <= tx.now)
        first = self._one(select(turn).where(due <= tx.now, free).order_by(turn).limit(1))
        self.behind = first is not None
        self._now = self._idle(free) if first is None else first
        self._last: dict[str, int] = {}

    def _idle(self, free: ColumnElement[bool]) -> int:
        """Where submitting stands while nobody is due: at the last that is on its way, else at the first that waits for its time."""
        on_its_way, first = func.max(turn).filter(~free, unsent), func.min(turn).filter(free)
        row = self._tx.connection.execute(select(on_its_way, first).where(waits)).one()
        return next((value for value in row if value is not None), 0)

    def _one(self, statement: Select[Any]) -> int | None:
        value: int | None = self._tx.connection.execute(statement).scalar()
        return value

    def next(self, owner: str) -> int:
        if owner not in self._last:
            last = self._one(select(turn).where(tasks.c.owner == owner, waits, unsent).order_by(turn.desc()).limit(1))
            self._last[owner] = max(self._now - 1, self._now - 1 if last is None else last)
        self._last[owner] += 1
        return self._last[owner]
