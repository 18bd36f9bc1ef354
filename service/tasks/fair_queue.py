"""Fair queueing among owners: start-time fair queueing (Goyal, Vin, Cheng 1996) for submissions.

The tag of a task is its column `submit_turn`. A new task gets the turn after its owner's last
waiting task, but no earlier turn than the queue has reached. An owner with ten thousand waiting
tasks and an owner with one are therefore served alternately, and an owner without waiting tasks
saves no turns up.
"""

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from sqlalchemy import ColumnElement, Select, bindparam, func, or_, select, union_all

from service.db.prepared import run
from service.db.tables import tasks
from service.db.transaction import Transaction
from service.tasks.state import State

turn, due, lease = tasks.c.submit_turn, tasks.c.submit_due_at, tasks.c.submit_lease_until
waits = due.is_not(None)
# Not yet served. The expression is no column, or SQLite would read and sort all tasks of a state.
state = func.coalesce(tasks.c.state, "")
unsent = state.in_([State.QUEUED.value, State.SUBMITTING.value])
untried = tasks.c.submit_attempts == 0  # a task that is sent again keeps an old turn


class FairQueue:
    """Gives turns to the tasks that these owners have in one transaction.

    `behind` means that other tasks are due, so that none of these may be sent before them. The one
    statement also reads the `more` columns of the caller, whose values are in `found`. `given`: the
    parameters of these columns.
    """

    def __init__(
        self,
        tx: Transaction,
        owners: Iterable[str],
        more: tuple[ColumnElement[Any], ...] = (),
        given: Mapping[str, Any] | None = None,
    ) -> None:
        names = sorted(set(owners))
        bound = {f"taker_{number}": name for number, name in enumerate(names)}
        statement = _turns(len(names), more)
        (row,) = run(tx.connection, statement, {"now": tx.now, **bound, **(given or {})})
        self.behind: bool = row[0] is not None
        self._reached: int = row[1] or 0
        self._last: dict[str, int | None] = dict(zip(names, row[2:], strict=False))
        self.found = row[2 + len(names) :]

    def next_turn(self, owner: str) -> int:
        last, earliest = self._last[owner], self._reached - 1
        self._last[owner] = number = 1 + (earliest if last is None else max(earliest, last))
        return number


@cache
def _turns(owners: int, more: tuple[ColumnElement[Any], ...]) -> Select[Any]:
    """Any turn that is due, the turn that the queue has reached, and the last turn of each owner's
    waiting tasks.

    The queue has reached the first turn that is due. While no new task is due, it is the last turn
    under a lease, or, if it is later, the highest of the owners' first waiting turns.
    """
    free = or_(lease.is_(None), lease <= bindparam("now"))
    ready = select(turn).where(due <= bindparam("now"), free).order_by(turn).limit(1)
    waiting = select(func.max(turn).label("turn")).where(waits, unsent, ~free)
    first = select(func.min(turn)).where(waits, unsent, free).group_by(tasks.c.owner)
    idle = union_all(waiting, first).subquery()
    latest = select(func.max(idle.c.turn)).scalar_subquery()
    reached = func.coalesce(ready.where(unsent, untried).scalar_subquery(), latest)
    own = select(turn).where(waits, unsent).order_by(turn.desc()).limit(1)
    last = (
        own.where(tasks.c.owner == bindparam(f"taker_{number}")).scalar_subquery()
        for number in range(owners)
    )
    return select(ready.scalar_subquery(), reached, *last, *more)
