"""Acts of operators on many tasks: the tasks that match a filter, counted first, then changed in
pages, the oldest task first. Each page is one transaction with an entry of the audit.
"""

from dataclasses import asdict, dataclass

from sqlalchemy import Connection, Select, and_, exists, func, or_, select, tuple_

from service.db.paging import matching
from service.db.tables import images, tasks
from service.db.transaction import Transaction, one_by_one
from service.queue.crashes import FAULT_LIMIT
from service.tasks.admin import TaskResolution, reconcile_tasks, resolve_tasks
from service.tasks.state import State

PAGE = 200
MOST = 100_000  # tasks of one act


@dataclass(frozen=True, slots=True)
class TaskFilter:
    """None: any value. Times are milliseconds of the creation."""

    owner: str | None = None
    state: str | None = None
    model: str | None = None
    error: str | None = None
    since: int | None = None
    until: int | None = None


@dataclass(frozen=True, slots=True)
class BulkPage:
    """One page of an act on the tasks that were created up to `until` and come after `after`."""

    act: str  # reconcile | resolve | requeue
    filter: TaskFilter
    after: tuple[int, str]
    until: int
    resubmit: bool = False


@dataclass(frozen=True, slots=True)
class BulkResult:
    """`last`: the position of the last task. None: there are no more."""

    done: int
    refused: int
    last: tuple[int, str] | None


# A row of the task left the queue of queries or of downloads for good.
_QUERY = and_(tasks.c.settle_due_at.is_(None), tasks.c.settle_faults >= FAULT_LIMIT)
_IMAGE = exists().where(
    images.c.task_id == tasks.c.id,
    images.c.state == "lost",
    images.c.confirmed,
    images.c.faults >= FAULT_LIMIT,
    tasks.c.state != State.CANCELLED.value,
)
# The tasks that an act can change.
ELIGIBLE = {
    "reconcile": or_(tasks.c.upstream_id.is_not(None), tasks.c.settled_digest.is_not(None)),
    "resolve": tasks.c.state == State.UNCERTAIN.value,
    "requeue": or_(_QUERY, _IMAGE),
}


def _selected(act: str, wanted: TaskFilter) -> Select[tuple[int, str]]:
    columns = tasks.c
    conditions = [ELIGIBLE[act], columns.erased_at.is_(None)]
    given = asdict(wanted)
    error = given.pop("error")
    if error is not None:
        conditions.append(columns.error["code"].as_string() == error)
    return matching(select(columns.created_at, columns.id), tasks, **given).where(*conditions)


def count_tasks(connection: Connection, act: str, wanted: TaskFilter) -> int:
    """How many tasks match, at most one more than an act may have."""
    some = _selected(act, wanted).limit(MOST + 1).subquery()
    count: int = connection.execute(select(func.count()).select_from(some)).scalar_one()
    return count


@one_by_one
def act_on_pages(tx: Transaction, item: BulkPage) -> BulkResult:
    """Changes the next tasks of an act. A task that no longer allows it counts as refused."""
    created, id = tasks.c.created_at, tasks.c.id
    page = _selected(item.act, item.filter).where(
        tuple_(created, id) > tuple_(*item.after), created <= item.until
    )
    rows = tx.connection.execute(page.order_by(created, id).limit(PAGE)).all()
    ids = [row.id for row in rows]
    if item.act == "resolve":
        resolutions = [TaskResolution(each, resubmit=item.resubmit) for each in ids]
        refused = resolve_tasks(tx, resolutions)
    else:
        refused = reconcile_tasks(tx, ids)
    done = refused.count(None)
    last = (rows[-1].created_at, rows[-1].id) if len(rows) == PAGE else None
    return BulkResult(done, len(ids) - done, last)
