"""The ledger: entries about a task's credits, appended in the transaction that causes them.

An operation that learns something about a task's cost calls `entered`. At the end of the
transaction, `post` compares the task's row with its earlier entries and appends what is missing.
The same report twice, in any order and after any crash, therefore adds nothing the second time,
and the sums of the entries equal the upstream's last word (docs/money.md).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import structlog
from sqlalchemy import Connection, bindparam, func, select

from service.credits import credits_number
from service.db.counters import number
from service.db.operator_tables import ledger
from service.db.prepared import run, run_many
from service.db.transaction import Transaction, inserting
from service.events.outbox import log_emitted, origin_of
from service.ops.metrics import Metrics
from service.tasks.rows import TaskRow
from service.tasks.state import State
from service.upstreams.base import Status

log = structlog.get_logger()

ESTIMATE, RESERVE, CHARGE, REFUND, ADJUST = "estimate", "reserve", "charge", "refund", "adjust"
SPENT = (CHARGE, REFUND, ADJUST)
COLUMNS = ("owner", "model", "upstream", "created_at")  # of an entry and of its task
NO_SUMS: Mapping[str, int] = {}


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    kind: str
    credits: int
    source: str


class Cost(NamedTuple):
    """All of a task that `missing` depends on, beside the entries. While it stays, no entry is
    missing.

    `closed`: the upstream is not queried any more. `reserved`: the reservation, or else the
    estimate.
    """

    closed: bool
    over: bool
    reserved: int | None
    used: int | None
    refunded: int | None
    completed: bool


def cost(row: TaskRow) -> Cost:
    closed = row.terminal and row.settle_due_at is None
    reserved = row.credits_estimated if row.credits_reserved is None else row.credits_reserved
    completed = closed and row.upstream_status is Status.COMPLETED
    over = row.terminal and row.state is not State.CANCELLED
    return Cost(closed, over, reserved, row.credits_used, row.credits_refunded, completed)


def entered(tx: Transaction, row: TaskRow, source: str | None = None, *, new: bool = False) -> None:
    """Has the entries of a locked task written when the transaction ends, if its cost changed or
    the task is `new`. `source` None: no report of the upstream caused this, unless an earlier call
    in the transaction says so.
    """
    _, earlier, was_new = tx.deferred.get(post, {}).get(row.id, (row, None, False))
    tx.defer(post, row.id, (row, source or earlier, new or was_new))


def post(tx: Transaction, items: Mapping[str, tuple[TaskRow, str | None, bool]]) -> None:
    changed = [task_id for task_id, item in items.items() if task_id in tx.costs and not item[2]]
    sums = booked(tx.connection, changed) if changed else {}
    rows = [
        {"id": tx.id("entry"), "time": tx.now, "task_id": row.id}
        | {name: getattr(row, name) for name in COLUMNS}
        | {"kind": entry.kind, "credits": entry.credits, "source": entry.source}
        for task_id, (row, source, new) in items.items()
        if new or task_id in tx.costs
        for entry in missing(row, sums.get(row.id, NO_SUMS), source or "operator")
    ]
    if not rows:
        return
    number(tx, "ledger", rows)
    run_many(tx.connection, inserting(ledger), rows)
    tx.posted += rows
    tx.origins |= {row.id: row.origin for row, *_ in items.values()}


_BOOKED = (
    select(ledger.c.task_id, ledger.c.kind, func.sum(ledger.c.credits))
    .where(ledger.c.task_id.in_(bindparam("task_ids", expanding=True)))
    .group_by(ledger.c.task_id, ledger.c.kind)
)


def booked(connection: Connection, task_ids: list[str]) -> dict[str, dict[str, int]]:
    sums: dict[str, dict[str, int]] = {}
    for task_id, kind, credits in run(connection, _BOOKED, {"task_ids": task_ids}):
        sums.setdefault(task_id, {})[kind] = int(credits)
    return sums


def missing(row: TaskRow, sums: Mapping[str, int], source: str) -> list[LedgerEntry]:
    """The entries that a task lacks. `sums` are the sums of its earlier entries by kind.

    The upstream's reservation replaces the estimate, and its charge replaces the reservation. The
    reservation of a cancelled task stays while the upstream is queried about its cost. After any
    other end, a query is no reason to reserve again: a false callback may have asked for it. A
    completed task whose cost the upstream never names costs what was reserved.
    """
    closed, over, reserved, used, refunded, completed = cost(row)
    basis = "catalogue" if row.credits_reserved is None else "submit"
    source_of_used = source
    if used is None and completed:
        used, source_of_used = reserved, basis
    entries = []
    if ESTIMATE not in sums and row.credits_estimated is not None:
        entries.append(LedgerEntry(ESTIMATE, row.credits_estimated, "catalogue"))
    released = closed or over or used is not None
    change = (0 if released else reserved or 0) - sums.get(RESERVE, 0)
    if change:
        entries.append(LedgerEntry(RESERVE, change, source if released else basis))
    if used is None and (used := refunded) is None:
        return entries
    charged = sums.get(CHARGE, 0) + sums.get(ADJUST, 0)
    if used > charged:
        kind = ADJUST if CHARGE in sums else CHARGE
        entries.append(LedgerEntry(kind, used - charged, source_of_used))
        charged = used
    change = max(0, used - (refunded or 0)) - charged - sums.get(REFUND, 0)
    if change:
        entries.append(LedgerEntry(REFUND if change < 0 else ADJUST, change, source))
    return entries


def log_committed(tx: Transaction, metrics: Metrics) -> None:
    log_emitted(tx, metrics)
    for row in tx.posted:
        log.info(
            "ledger.entered",
            owner=row["owner"],
            task_id=row["task_id"],
            **origin_of(tx, row["task_id"]).ids,
            entry_id=row["id"],
            kind=row["kind"],
            credits=credits_number(row["credits"]),
            source=row["source"],
        )
