"""The pause of submission: an operator stops all submitting to the upstreams, in every process.

The row of `pauses` decides. The transaction that makes a task `submitting` reads it under a shared
lock, so that no submission starts once the pause is committed. A task that a worker claims
meanwhile is held: it is due far ahead, and its timeline says why.

At the end of a pause every process makes held tasks due, and so does each start. A process that
dies in between therefore leaves no task behind.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Select, func, select, update

from service.db.batching import BatchingStore
from service.db.operator_tables import pauses
from service.db.tables import tasks
from service.db.transaction import Lease, Transaction, one_by_one
from service.errors import StoreUnavailable
from service.events import outbox
from service.ids import rfc3339, rfc3339_or_none
from service.ops.metrics import Metrics
from service.queue import leases
from service.strict_json import JSON
from service.tasks.rows import TaskRow
from service.tasks.state import State
from service.tasks.transitions import hold, lock

SUBMISSION = "submission"  # the row's name
LOOK_S = 15.0  # without a hint, how late a process sees the pause of another
HOLD_MS = 3_600_000
AT_ONCE = 500  # tasks that become due in one transaction
_COLUMNS = pauses.c.paused_at, pauses.c.reason, pauses.c.key_id  # of a `Pause`
_ROW = select(*_COLUMNS).where(pauses.c.name == SUBMISSION)
_SHARED = _ROW.with_for_update(read=True)  # does not change until the transaction ends


@dataclass(frozen=True, slots=True)
class Pause:
    """`paused_at` None: submission goes on."""

    paused_at: int | None = None
    reason: str | None = None
    key_id: str | None = None

    @property
    def message(self) -> str | None:
        """Why a task is held. None: it is not."""
        return None if self.paused_at is None else f"held: submission is paused: {self.reason}"


def submission_pause(connection: Connection, statement: Select[Any] = _ROW) -> Pause:
    row = connection.execute(statement).first()
    return Pause(*row) if row else Pause()


def with_pause(statement: Select[Any]) -> Select[Any]:
    """A select that locks tasks, with the pause as its last columns, which does not change until
    the transaction ends.
    """
    statement = statement.add_columns(*_COLUMNS).join(pauses, pauses.c.name == SUBMISSION)
    locked = statement.with_for_update(of=tasks)
    return locked.suffix_with("FOR SHARE OF pauses", dialect="postgresql")


@dataclass(frozen=True, slots=True)
class PauseChange:
    paused: bool
    reason: str | None
    key_id: str


@one_by_one
def change_pause(tx: Transaction, item: PauseChange) -> tuple[Pause, bool]:
    """Pauses or resumes submission. Returns the pause, and whether it began or ended. A pause that
    is under way takes the new reason.
    """
    since = submission_pause(tx.connection, _ROW.with_for_update()).paused_at
    after = Pause(tx.now if since is None else since, item.reason, item.key_id)
    if not item.paused:
        after = Pause()
    tx.touched[SUBMISSION] = None  # hints to every process
    values = {"paused_at": after.paused_at, "reason": after.reason, "key_id": after.key_id}
    tx.connection.execute(update(pauses).where(pauses.c.name == SUBMISSION).values(values))
    changed = (since is None) == item.paused
    if changed:
        data: JSON = {"reason": item.reason, "key_id": item.key_id}
        if since is not None:
            data |= {"paused_at": rfc3339(since), "seconds": round((tx.now - since) / 1000, 1)}
        name = "submission.paused" if item.paused else "submission.resumed"
        outbox.emit_operators(tx, name, data)
    return after, changed


def hold_paused(tx: Transaction, items: Sequence[Lease]) -> list[bool]:
    """Holds claimed tasks while submission is paused. False: it is not, or the lease was lost."""
    pause = submission_pause(tx.connection, _SHARED)
    rows = lock(tx, (lease.key for lease in items))
    pairs = ((lease, rows.get(lease.key)) for lease in items)
    return [
        row is not None and leases.holds(lease, row) and held_back(tx, row, pause)
        for lease, row in pairs
    ]


def held_back(tx: Transaction, row: TaskRow, pause: Pause) -> bool:
    """Holds a leased task that would be sent now. False: submission is not paused."""
    if pause.message is None or row.state not in (State.QUEUED, State.UNCERTAIN):
        return False
    hold(tx, row, tx.now + HOLD_MS, pause.message)
    return True


def release_held(tx: Transaction, limit: int, *where: Any) -> int:
    """Makes up to so many held tasks due, in their turn. Returns how many.

    A held row has no lease, but names a process in `submit_lease_owner`.
    """
    due, lease, owner = (tasks.c[f"submit_{x}"] for x in ("due_at", "lease_until", "lease_owner"))
    statement = select(tasks.c.id).where(due > tx.now, lease.is_(None), *where)
    statement = statement.order_by(tasks.c.submit_turn).limit(limit)
    statement = statement.with_for_update(skip_locked=True)
    # Materialized: a plan that ran the subquery for each row would take more than the limit.
    chosen = statement.cte("held").prefix_with("MATERIALIZED")
    resumed = update(tasks).where(tasks.c.id.in_(select(chosen.c.id)))
    resumed = resumed.values({due: tx.now, owner: None})
    count = len(tx.connection.execute(resumed.returning(tasks.c.id)).all())
    if count:
        tx.due.add("submit")
    return count


@one_by_one
def release_paused(tx: Transaction, limit: int) -> int:
    """Makes held tasks of every process due, unless submission is paused."""
    if submission_pause(tx.connection, _SHARED).paused_at is not None:
        return 0
    return release_held(tx, limit, tasks.c.submit_lease_owner.is_not(None))


class PauseWatch:
    """What this process knows of the pause. It looks after each hint, and every `LOOK_S`."""

    def __init__(self, store: BatchingStore, metrics: Metrics) -> None:
        self._store, self._metrics = store, metrics
        self._looked = False
        self.pause = Pause()

    async def run(self) -> None:
        signals = self._store.signals
        while not signals.stopping:
            with signals.listen(SUBMISSION) as hint:
                with suppress(StoreUnavailable):
                    await self.look()
                await signals.wait(hint, LOOK_S)

    async def look(self) -> None:
        pause = await self._store.read(submission_pause)
        more = pause.paused_at is None and (self.pause.paused_at is not None or not self._looked)
        while more:
            more = await self._store.write(release_paused, AT_ONCE) == AT_ONCE
        self.pause, self._looked = pause, True
        self._metrics.submission_paused.set(pause.paused_at is not None)


def pause_document(connection: Connection) -> JSON:
    pause = submission_pause(connection)
    waiting = select(func.count()).where(tasks.c.state == State.QUEUED.value)
    return {
        "paused": pause.paused_at is not None,
        "reason": pause.reason,
        "since": rfc3339_or_none(pause.paused_at),
        "key_id": pause.key_id,
        "waiting": connection.execute(waiting).scalar_one(),
    }
