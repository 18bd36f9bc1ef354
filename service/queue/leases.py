"""Leases: who works on which row, until when. A claim is one statement; a finish checks the
fence.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from sqlalchemy import BindParameter, Select, and_, bindparam, case, or_, select, update
from sqlalchemy.sql.dml import ReturningUpdate

from service.db.tables import QUEUES, ZERO, Queue, counters, endpoints, sinks
from service.db.transaction import Lease, Transaction

LEASE_MS = 30_000


RENEW_S = 10.0


# Times of different processes differ by less: a transaction reads its own at its beginning, and may
# then wait for its turn.
TOLERANCE_MS = 15_000

# From a try alone to the next, by the deaths before it: kills from outside come in bursts, and what
# takes long meets them all.
CANDIDATE_WAITS_MS = {2: 5_000, 3: 20_000, 4: 80_000}
LONGEST_WAIT_MS = 320_000


def enqueue(tx: Transaction, stage: str, key: str, *, behind: bool = False) -> dict[str, Any]:
    """Values of a new row that wants work now: leased to this process if it has a free place, else,
    or `behind` others, simply due.
    """
    queue = QUEUES[stage]
    values: dict[str, Any] = {
        "due_at": tx.now,
        "lease_until": None,
        "lease_owner": None,
        "fence": 0,
        "attempts": 0,
    }
    if behind:
        tx.due.add(stage)
    elif take_slot(tx, stage):
        values |= {
            "lease_until": tx.now + LEASE_MS,
            "lease_owner": tx.process,
            "fence": 1,
            "attempts": 1,
        }
        tx.leased.append(Lease(stage, key, 1, 1))
    return {queue.prefix + name: value for name, value in values.items()}


def _value(row: object, name: str) -> Any:
    return row[name] if isinstance(row, Mapping) else getattr(row, name)


def requeue(tx: Transaction, stage: str, key: str, row: object) -> dict[str, Any]:
    """New values of a row that wants work now, whatever was planned; like `born`, unless somebody
    works on it already.
    """
    queue = QUEUES[stage]
    prefix = queue.prefix
    values: dict[str, Any] = {"due_at": tx.now, "attempts": 0}
    until = _value(row, prefix + "lease_until")
    if until is not None and tx.now < until:
        del values["attempts"]
    elif take_slot(tx, stage):
        fence = _value(row, prefix + "fence") + 1
        values |= {
            "lease_until": tx.now + LEASE_MS,
            "lease_owner": tx.process,
            "fence": fence,
            "attempts": 1,
        }
        tx.leased.append(Lease(stage, key, fence, 1))
    return {prefix + name: value for name, value in values.items()}


def take_slot(tx: Transaction, stage: str) -> bool:
    if tx.slots.get(stage, 0) > 0:
        tx.slots[stage] -= 1
        return True
    tx.due.add(stage)
    return False


def release(stage: str, due_at: int | None, **more: Any) -> dict[str, Any]:
    """Values that end a lease whose work was done; the row is due again at `due_at`, or not at
    all.
    """
    values = {"lease_until": None, "lease_owner": None, "due_at": due_at, "deaths": 0, **more}
    return {QUEUES[stage].prefix + name: value for name, value in values.items()}


def holds(lease: Lease, row: object) -> bool:
    """Whether the row is still leased under this lease."""
    prefix = QUEUES[lease.stage].prefix
    return bool(
        _value(row, prefix + "fence") == lease.fence
        and _value(row, prefix + "lease_until") is not None
    )


def claim(tx: Transaction, stages: Sequence[str]) -> list[int]:
    """Leases due rows of a stage to this process, as many as it has free places; how many there
    were.
    """
    counts = []
    for stage in stages:
        free = tx.slots.get(stage, 0)
        leases = _claim(tx, QUEUES[stage], free) if free > 0 else []
        if len(leases) == free:
            tx.due.add(stage)  # there may be more
        if free > 0:
            tx.slots[stage] = free - len(leases)
        tx.leased += leases
        counts.append(len(leases))
    return counts


def claim_candidate(tx: Transaction, stage: str) -> tuple[Lease, int] | None:
    """Leases one due row that outlived two deaths of its process, which `claim` leaves alone; with
    how many it outlived.

    If the process dies again the row is due later each time.
    """
    for *lease, deaths in tx.connection.execute(
        _claiming(QUEUES[stage], candidate=True), _figures(tx, 1)
    ):
        return Lease(stage, *lease), deaths
    return None


def has_candidate(tx: Transaction, stages: Sequence[str]) -> list[bool]:
    """Whether a stage has a row that `claim_suspect` would lease."""
    return [
        tx.connection.execute(_ready(QUEUES[stage], candidate=True), _figures(tx, 1)).first()
        is not None
        for stage in stages
    ]


def _claim(tx: Transaction, queue: Queue, limit: int) -> list[Lease]:
    return [
        Lease(queue.stage, *row[:-1])
        for row in tx.connection.execute(_claiming(queue), _figures(tx, limit))
    ]


def _figures(tx: Transaction, limit: int) -> dict[str, Any]:
    return {"now": tx.now, "until": tx.now + LEASE_MS, "process": tx.process, "free": limit}


@cache
def _ready(queue: Queue, *, candidate: bool) -> Select[Any]:
    """The rows that may be claimed, first things first."""
    until, deaths = queue.column("lease_until"), queue.column("deaths")
    now: BindParameter[int] = bindparam("now")
    # A lease that ran out is a death that is not counted yet.
    died = (
        and_(deaths > ZERO, or_(deaths > 1, until.is_not(None)))
        if candidate
        else or_(deaths < 1, and_(deaths < 2, until.is_(None)))
    )
    ready = (
        select(queue.table.c.id)
        .where(queue.column("due_at") <= now, or_(until.is_(None), until <= now), died)
        .order_by(queue.order)
        .limit(bindparam("free"))
    )
    return ready if queue.where is None else ready.where(queue.where)


@cache
def _claiming(queue: Queue, *, candidate: bool = False) -> ReturningUpdate[Any]:
    until, key = queue.column("lease_until"), queue.table.c.id
    fence, attempts, deaths = (queue.column(name) for name in ("fence", "attempts", "deaths"))
    now: BindParameter[int] = bindparam("now")
    count = case((until.is_not(None), deaths + 1), else_=deaths)
    values = {
        until: bindparam("until"),
        queue.column("lease_owner"): bindparam("process"),
        fence: fence + 1,
        attempts: attempts + 1,
        deaths: count,
    }
    if candidate:
        values[queue.column("due_at")] = now + case(
            CANDIDATE_WAITS_MS, value=count, else_=LONGEST_WAIT_MS
        )
    # Materialised: a plan that ran the subquery once for each row would lease more than there are
    # places.
    chosen = (
        _ready(queue, candidate=candidate)
        .with_for_update(skip_locked=True)
        .cte("ready")
        .prefix_with("MATERIALIZED")
    )
    return (
        update(queue.table)
        .where(key.in_(select(chosen.c.id)))
        .values(values)
        .returning(key, fence, attempts, deaths)
    )


def renew(tx: Transaction, leases: Sequence[Lease]) -> list[bool]:
    """Extends leases that still hold, and never shortens one; False for those that do not."""
    until = tx.now + LEASE_MS
    columns = [QUEUES[lease.stage].column("lease_until") for lease in leases]
    return [
        change(tx, lease, {"lease_until": case((column > until, column), else_=until)})
        for lease, column in zip(leases, columns, strict=True)
    ]


def give_back(tx: Transaction, leases: Sequence[Lease]) -> list[bool]:
    """Gives work back untouched, as a stopping process does: the attempt does not count."""
    return [_give_back(tx, lease, QUEUES[lease.stage]) for lease in leases]


def _give_back(tx: Transaction, lease: Lease, queue: Queue, wait_ms: int = 0) -> bool:
    due_at, attempts = queue.column("due_at"), queue.column("attempts")
    at_once = case(
        (due_at > tx.now, tx.now), else_=due_at
    )  # a suspect's was put off for the case that it dies
    values = {"attempts": attempts - 1, "due_at": tx.now + wait_ms if wait_ms else at_once}
    return change(tx, lease, {"lease_until": None, "lease_owner": None, **values})


def snooze(tx: Transaction, items: Sequence[tuple[Lease, int]]) -> list[bool]:
    """`release` of work that the store would not take down, due again after so many milliseconds:
    others come first meanwhile.
    """
    return [_give_back(tx, lease, QUEUES[lease.stage], wait_ms) for lease, wait_ms in items]


def done(tx: Transaction, leases: Sequence[Lease]) -> list[bool]:
    """Ends work that turned out to be none: the row is not due any more."""
    return [
        change(tx, lease, {"lease_until": None, "lease_owner": None, "due_at": None, "deaths": 0})
        for lease in leases
    ]


def change(tx: Transaction, lease: Lease, values: Mapping[str, Any]) -> bool:
    """Writes lease columns (without their prefix) of a row that is held under this lease; False
    when it is not.
    """
    queue = QUEUES[lease.stage]
    statement = (
        update(queue.table)
        .where(
            queue.table.c.id == lease.key,
            queue.column("fence") == lease.fence,
            queue.column("lease_until").is_not(None),
        )
        .values({queue.column(name): value for name, value in values.items()})
    )
    return tx.connection.execute(statement).rowcount == 1


def keep_time(tx: Transaction, items: Sequence[None], *, wait: bool = False) -> list[None]:
    """Notes what time it is. Was it later when that was last done, the clock went back: what is
    planned comes nearer by as much.

    `wait` for somebody who is about it, as whoever has seen that must, before anything is planned
    by the new time.
    """
    noted = counters.c.name == "clock"
    last = tx.connection.execute(
        select(counters.c.value).where(noted).with_for_update(skip_locked=not wait)
    ).scalar()
    if last is None:  # somebody else is about it; who stands still meanwhile holds nobody up
        return [None] * len(items)
    if last - tx.now > TOLERANCE_MS:
        _set_back(tx, last - tx.now)
    elif last > tx.now:
        return [None] * len(items)
    tx.connection.execute(update(counters).where(noted).values(value=tx.now))
    return [None] * len(items)


def _set_back(tx: Transaction, by_ms: int) -> None:
    """Nobody waits for the clock, and no lease lasts longer for it."""
    planned = [queue.column(name) for queue in _own_columns() for name in ("due_at", "lease_until")]
    for column in (*planned, endpoints.c.paused_until):
        tx.connection.execute(
            update(column.table).where(column > tx.now).values({column: column - by_ms})
        )
    tx.due.update(QUEUES)


def _own_columns() -> list[Queue]:
    """A queue for each set of lease columns: retries and reconciling share those of what they are
    about.
    """
    return list({(queue.table.name, queue.prefix): queue for queue in QUEUES.values()}.values())


def free_all(tx: Transaction) -> None:
    """Ends every lease. Only for a store whose lock proves that nobody else lives (SQLite, at the
    start).
    """
    for queue in _own_columns():
        until, deaths = queue.column("lease_until"), queue.column("deaths")
        tx.connection.execute(
            update(queue.table)
            .where(until.is_not(None))
            .values({until: None, queue.column("lease_owner"): None, deaths: deaths + 1})
        )
    tx.connection.execute(update(sinks).values(lease_until=None, lease_owner=None))
