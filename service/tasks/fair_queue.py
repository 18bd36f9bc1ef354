"""Fair queueing among owners: start-time fair queueing (Goyal, Vin, Cheng 1996) for submissions.

The tag of a task is its column `submit_turn`. A new task gets the turn after its owner's last
waiting task, but no earlier turn than the queue has reached. An owner with ten thousand waiting
tasks and an owner with one are therefore served alternately, and an owner without waiting tasks
saves no turns up.
"""

from sqlalchemy import ColumnElement, func, or_, select

from service.db.tables import tasks
from service.db.transaction import Transaction
from service.tasks.state import State

turn, due, lease = tasks.c.submit_turn, tasks.c.submit_due_at, tasks.c.submit_lease_until
waits = due.is_not(None)
unsent = tasks.c.state.in_([State.QUEUED.value, State.SUBMITTING.value])  # not yet served
untried = tasks.c.submit_attempts == 0  # a task that is sent again keeps an old turn


class FairQueue:
    """Gives turns to the tasks of one transaction. `behind` means that other tasks are due, so that
    none of these may be sent before them.
    """

    def __init__(self, tx: Transaction) -> None:
        self._connection = tx.connection
        free = or_(lease.is_(None), lease <= tx.now)
        ready = select(turn).where(due <= tx.now, free).order_by(turn).limit(1)
        looks = ready.where(unsent, untried).scalar_subquery(), ready.scalar_subquery()
        first, any_ready = self._connection.execute(select(*looks)).one()
        self.behind = any_ready is not None
        self._reached: int = self._idle(free) if first is None else first
        self._last: dict[str, int] = {}

    def _idle(self, free: ColumnElement[bool]) -> int:
        """The turn that the queue has reached while no new task is due: the last turn under a
        lease, or, if it is later, the highest of the owners' first waiting turns.
        """
        leased, first = func.max(turn).filter(~free), func.min(turn).filter(free)
        rows = self._connection.execute(
            select(leased, first).where(waits, unsent).group_by(tasks.c.owner)
        )
        return max((value for row in rows for value in row if value is not None), default=0)

    def next_turn(self, owner: str) -> int:
        if owner not in self._last:
            own = select(turn).where(tasks.c.owner == owner, waits, unsent)
            last = self._connection.scalar(own.order_by(turn.desc()).limit(1))
            self._last[owner] = max(self._reached - 1, self._reached - 1 if last is None else last)
        self._last[owner] += 1
        return self._last[owner]
