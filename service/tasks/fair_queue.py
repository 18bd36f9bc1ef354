"""Turns between owners in submitting: start-time fair queueing (Goyal, Vin, Cheng 1996), its tags
kept in the rows.

A new task's turn is the one after its owner's last that still waits, but no earlier than where
submitting stands. So whoever has ten thousand waiting and whoever has one are served alternately,
and nobody saves turns up by having waited for none.
"""

from sqlalchemy import ColumnElement, func, or_, select

from service.db.tables import tasks
from service.db.transaction import Transaction
from service.tasks.state import State

turn, due, lease = tasks.c.submit_turn, tasks.c.submit_due_at, tasks.c.submit_lease_until
waits = due.is_not(None)
unsent = tasks.c.state.in_(
    [State.QUEUED.value, State.SUBMITTING.value]
)  # an uncertain task has had its turn
untried = tasks.c.submit_attempts == 0  # what is sent again keeps a turn of long ago


class Turns:
    """The turns of a transaction's new tasks. `behind`: others are due already, and none of these
    may be sent before them.
    """

    def __init__(self, tx: Transaction) -> None:
        self._connection = tx.connection
        free = or_(lease.is_(None), lease <= tx.now)
        ready = select(turn).where(due <= tx.now, free).order_by(turn).limit(1)
        first = self._connection.scalar(ready.where(unsent, untried))
        self.behind = first is not None or self._connection.scalar(ready) is not None
        self._now: int = self._idle(free) if first is None else first
        self._last: dict[str, int] = {}

    def _idle(self, free: ColumnElement[bool]) -> int:
        """Where submitting stands while nobody is due for the first time: at the last that is on
        its way, or, if that is further, at the first that waits for its time, of the owner who is
        furthest.
        """
        on_its_way, first = func.max(turn).filter(~free), func.min(turn).filter(free)
        rows = self._connection.execute(
            select(on_its_way, first).where(waits, unsent).group_by(tasks.c.owner)
        )
        return max((value for row in rows for value in row if value is not None), default=0)

    def next(self, owner: str) -> int:
        if owner not in self._last:
            mine = (
                select(turn)
                .where(tasks.c.owner == owner, waits, unsent)
                .order_by(turn.desc())
                .limit(1)
            )
            last = self._connection.scalar(mine)
            self._last[owner] = self._now - 1 if last is None else max(self._now - 1, last)
        self._last[owner] += 1
        return self._last[owner]
