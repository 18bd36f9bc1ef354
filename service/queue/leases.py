"""Leases: which process works on which row, and until when. A claim is one statement. A finish
checks the fence.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from sqlalchemy import Connection, Select, and_, bindparam, case, or_, select, update
from sqlalchemy.sql.dml import ReturningUpdate

from service.db.prepared import run
from service.db.queues import QUEUES, Queue
from service.db.tables import ZERO
from service.db.transaction import Lease, Transaction, one_by_one
from service.fair_slots import has_share

Rows = Callable[[Connection, Sequence[str]], Mapping[str, Any]]  # what leases need, by key

LEASE_MS = 15_000  # a dead process's rows wait so long on PostgreSQL
RENEW_S = 5.0
# The longest lease is that of a submission with the longest `SUBMIT_TIMEOUT_S` (25 minutes). A
# lease that ends later was written before a clock went back, and counts as ended.
LONGEST_LEASE_MS = 1_800_000
# A transaction reads the time when it begins and may then wait for a lock. Times of concurrent
# transactions differ by less than this.
TOLERANCE_MS = 15_000
# Waits between runs of a poison candidate, by its crashes so far. Kills from outside come in
# bursts, and a row that takes long meets all of them.
CANDIDATE_WAITS_MS = {2: 5_000, 3: 20_000, 4: 80_000}
LONGEST_WAIT_MS = 320_000
# An owner may use one slot for each four that stay free (see `fair_slots`). A delivery holds its
# slot until the server answers or the attempt times out.
REST = 4


def enqueue(
    tx: Transaction,
    stage: str,
    key: str,
    row: object = None,
    *,
    owner: str = "",
    behind: bool = False,
) -> dict[str, Any]:
    """Values of a new row that is due now. This process leases it if it has a free slot for the
    owner, unless other rows must go first (`behind`).
    """
    values: dict[str, Any] = {
        "due_at": tx.now,
        "lease_until": None,
        "lease_owner": None,
        "fence": 0,
        "attempts": 0,
    }
    if behind:
        tx.due.add(stage)
    elif take_slot(tx, stage, owner):
        values |= _lease(tx, stage, key, 1, row, owner)
    return _prefixed(stage, values)


def requeue(tx: Transaction, stage: str, key: str, row: object) -> dict[str, Any]:
    """New values of a row that is due before its planned time. Like `enqueue`, unless a process
    holds a lease on it.
    """
    until = _value(stage, row, "lease_until")
    if until is not None and tx.now < until <= tx.now + LONGEST_LEASE_MS:
        return _prefixed(stage, {"due_at": tx.now})
    values: dict[str, Any] = {"due_at": tx.now, "attempts": 0}
    if take_slot(tx, stage):
        values |= _lease(tx, stage, key, _value(stage, row, "fence") + 1, row)
    return _prefixed(stage, values)


def _lease(
    tx: Transaction, stage: str, key: str, fence: int, row: object, owner: str = ""
) -> dict[str, Any]:
    tx.leased.append(Lease(stage, key, fence, 1, owner, row))
    until = tx.now + LEASE_MS
    return {"lease_until": until, "lease_owner": tx.process, "fence": fence, "attempts": 1}


def _prefixed(stage: str, values: Mapping[str, Any]) -> dict[str, Any]:
    prefix = QUEUES[stage].prefix
    return {prefix + name: value for name, value in values.items()}


def release(stage: str, due_at: int | None, **more: Any) -> dict[str, Any]:
    """Values that end a lease after its work. The row is due again at `due_at`, or not at all."""
    ended = {"lease_until": None, "lease_owner": None, "due_at": due_at, "deaths": 0}
    return _prefixed(stage, ended | more)


def holds(lease: Lease, row: object) -> bool:
    """Whether the row is still held under this lease."""
    stage = lease.stage
    leased = _value(stage, row, "lease_until") is not None
    return leased and _value(stage, row, "fence") == lease.fence


def _value(stage: str, row: object, name: str) -> Any:
    """A lease column of a typed row or of a mapping."""
    column = QUEUES[stage].prefix + name
    return row[column] if isinstance(row, Mapping) else getattr(row, column)


def take_slot(tx: Transaction, stage: str, owner: str = "") -> bool:
    """Uses a free slot of this process for a row of the owner. False: the row stays due."""
    used, free = tx.shares.get(stage), tx.slots.get(stage, 0)
    if free > 0 and (used is None or has_share(used.get(owner, 0), free, REST)):
        use_slot(tx, stage, owner)
        return True
    tx.due.add(stage)
    return False


def use_slot(tx: Transaction, stage: str, owner: str) -> None:
    tx.slots[stage] -= 1
    if (used := tx.shares.get(stage)) is not None:
        used[owner] = used.get(owner, 0) + 1


def claimable(tx: Transaction, stage: str) -> tuple[int, list[str]]:
    """How many rows one statement may lease, and the owners whose rows it must pass over.

    The rows may all be one owner's. So their number fits into the share of each owner that still
    has one.
    """
    used, free = tx.shares.get(stage), tx.slots[stage]
    if used is None:
        return free, []
    full = [owner for owner, slots in used.items() if not has_share(slots, free, REST)]
    most = max((slots for slots in used.values() if has_share(slots, free, REST)), default=0)
    return max(1, -(-(free - REST * most) // (REST + 1))), full


@one_by_one
def claim(tx: Transaction, stage: str) -> int:
    """Leases due rows of a stage to this process, up to its free slots and to the shares of their
    owners, and returns their number. Each statement passes over the owners whose share the one
    before has used up.
    """
    count = 0
    while tx.slots.get(stage, 0):
        most, full = claimable(tx, stage)
        statement = _claiming(QUEUES[stage], passing=bool(full))
        rows = run(tx.connection, statement, _bound(tx, most) | ({"full": full} if full else {}))
        leases = [Lease(stage, *row[:-1]) for row in rows]
        for lease in leases:
            use_slot(tx, stage, lease.owner)
        tx.leased += leases
        count += len(leases)
        if len(leases) < most:
            return count
    tx.due.add(stage)  # there may be more
    return count


@one_by_one
def claim_with_rows(tx: Transaction, item: tuple[str, Rows]) -> int:
    """Like `claim`, and reads the rows of all leases with one call."""
    (stage, rows), first = item, len(tx.leased)
    (count,), leases = claim(tx, [stage]), tx.leased[first:]
    by_key = rows(tx.connection, [lease.key for lease in leases]) if leases else {}
    tx.leased[first:] = [replace(lease, row=by_key.get(lease.key)) for lease in leases]
    return count


def claim_candidate(tx: Transaction, stage: str) -> tuple[Lease, int] | None:
    """Leases one due poison candidate, which `claim` passes over. Returns it with its crashes.

    After each further crash the row is due later.
    """
    row = tx.connection.execute(_claiming(QUEUES[stage], candidate=True), _bound(tx, 1)).first()
    return None if row is None else (Lease(stage, *row[:-1]), row[-1])


def _bound(tx: Transaction, limit: int) -> dict[str, Any]:
    return {
        "now": tx.now,
        "until": tx.now + LEASE_MS,
        "longest": tx.now + LONGEST_LEASE_MS,
        "process": tx.process,
        "free": limit,
    }


@cache
def ready_rows(queue: Queue, *, candidate: bool, passing: bool = False) -> Select[Any]:
    """The rows that may be claimed, in the order of their queue. `passing` over some owners'."""
    until, crashes = queue.column("lease_until"), queue.column("deaths")
    # A lease that ended by itself is a crash that is not counted yet.
    if candidate:
        poison = and_(crashes > ZERO, or_(crashes > 1, until.is_not(None)))
    else:
        poison = or_(crashes < 1, and_(crashes < 2, until.is_(None)))
    ended = or_(until.is_(None), until <= bindparam("now"), until > bindparam("longest"))
    ready = (
        select(queue.table.c.id)
        .where(queue.column("due_at") <= bindparam("now"), ended, poison)
        .order_by(queue.order)
        .limit(bindparam("free"))
    )
    if passing:  # the second column of the order selects the index that has the owner
        owner = queue.table.c.owner
        ready = ready.where(owner.not_in(bindparam("full", expanding=True))).order_by(owner)
    return ready if queue.where is None else ready.where(queue.where)


@cache
def _claiming(
    queue: Queue, *, candidate: bool = False, passing: bool = False
) -> ReturningUpdate[Any]:
    until, key = queue.column("lease_until"), queue.table.c.id
    fence, attempts, crashes = (queue.column(name) for name in ("fence", "attempts", "deaths"))
    count = case((until.is_not(None), crashes + 1), else_=crashes)
    values = {
        until: bindparam("until"),
        queue.column("lease_owner"): bindparam("process"),
        fence: fence + 1,
        attempts: attempts + 1,
        crashes: count,
    }
    if candidate:
        wait = case(CANDIDATE_WAITS_MS, value=count, else_=LONGEST_WAIT_MS)
        values[queue.column("due_at")] = bindparam("now") + wait
    # Materialised: a plan that runs the subquery once for each row leases more rows than `free`.
    chosen = (
        ready_rows(queue, candidate=candidate, passing=passing)
        .with_for_update(skip_locked=True)
        .cte("ready")
        .prefix_with("MATERIALIZED")
    )
    return (
        update(queue.table)
        .where(key.in_(select(chosen.c.id)))
        .values(values)
        .returning(key, fence, attempts, queue.table.c.owner, crashes)
    )


@one_by_one
def renew(tx: Transaction, lease: Lease) -> bool:
    """Extends a lease and never shortens it. False: it no longer holds."""
    until, column = tx.now + LEASE_MS, QUEUES[lease.stage].column("lease_until")
    longer = case((column.between(until, tx.now + LONGEST_LEASE_MS), column), else_=until)
    return change(tx, lease, {"lease_until": longer})


def give_back(tx: Transaction, items: Sequence[Lease]) -> list[bool]:
    """Returns work untouched, as a stopping process does. The attempt does not count."""
    return snooze(tx, [(lease, 0) for lease in items])


@one_by_one
def snooze(tx: Transaction, item: tuple[Lease, int]) -> bool:
    """Returns work that the store could not record. It is due again after so many milliseconds, so
    that other rows go first.
    """
    (lease, wait_ms), queue = item, QUEUES[item[0].stage]
    due_at, attempts = queue.column("due_at"), queue.column("attempts")
    # The due time of a poison candidate lies ahead, in case it crashes.
    at_once = case((due_at > tx.now, tx.now), else_=due_at)
    values = {"attempts": attempts - 1, "due_at": tx.now + wait_ms if wait_ms else at_once}
    return change(tx, lease, {"lease_until": None, "lease_owner": None, **values})


@one_by_one
def done(tx: Transaction, lease: Lease) -> bool:
    """Ends the lease on a row that turned out to need no work. It is not due any more."""
    ended = {"lease_until": None, "lease_owner": None, "due_at": None, "deaths": 0}
    return change(tx, lease, ended)


def change(tx: Transaction, lease: Lease, values: Mapping[str, Any]) -> bool:
    """Writes lease columns (named without their prefix) of a row. False if the lease no longer
    holds.
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
