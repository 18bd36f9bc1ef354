"""What waits in the queues, and when more will: a look that changes nothing."""

from dataclasses import dataclass
from functools import cache
from itertools import compress
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, bindparam, func, select

from service.db.prepared import run
from service.db.queues import QUEUES
from service.queue.leases import LONGEST_LEASE_MS, ready_rows


@dataclass(frozen=True, slots=True)
class Outlook:
    """The stages of which `claim` would lease a row, those of which `claim_candidate` would, and
    the first due time that is still to come. Rows under a lease count by their due time.
    """

    ready: frozenset[str]
    candidates: frozenset[str]
    next_due: int | None


def outlook(connection: Connection, now: int) -> Outlook:
    """One statement, which a quiet process repeats."""
    bound = {"now": now, "longest": now + LONGEST_LEASE_MS, "free": 1}
    (row,) = run(connection, _outlook(), bound)
    count = len(QUEUES)
    ready, candidates, dues = row[:count], row[count : 2 * count], row[2 * count :]
    return Outlook(
        frozenset(compress(QUEUES, ready)),
        frozenset(compress(QUEUES, candidates)),
        min((due for due in dues if due is not None), default=None),
    )


@cache
def _outlook() -> Select[Any]:
    columns: list[ColumnElement[Any]] = []
    for candidate in (False, True):
        ready = (ready_rows(queue, candidate=candidate) for queue in QUEUES.values())
        columns += [rows.exists() for rows in ready]
    for queue in QUEUES.values():
        due = queue.column("due_at")
        later = select(func.min(due)).where(due > bindparam("now"))
        later = later if queue.where is None else later.where(queue.where)
        columns.append(later.scalar_subquery())
    return select(*columns)
