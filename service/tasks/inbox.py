"""The inbox: callbacks that carried the right token, deduplicated by constraint (contract section
4).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select, tuple_

from service.db.tables import callbacks, tasks
from service.db.transaction import Transaction
from service.events import outbox
from service.tasks.results import anticipate
from service.tasks.rows import TaskRow
from service.tasks.state import TERMINAL, State
from service.tasks.transitions import ask, change, fill, lock, submitted
from service.upstreams.base import Report, Status, outcome_digest

# distinct callbacks of one task, and the first terminal one; further ones are answered and counted
# on the last
KEPT = 20
# How many of them keep their bodies, and how many bytes of each. The first terminal callback keeps
# all of its own (at most 256 KiB): without a confirming query, its body is the task's result.
BODIES, BODY_BYTES = 5, 64 * 1024


@dataclass(frozen=True, slots=True)
class Callback:
    """A callback whose token was right. `report` None: unreadable; `digest` is then the hash of the
    body.
    """

    id: str
    upstream: str
    task_id: str
    report: Report | None
    digest: str
    body: bytes
    result_ttl_ms: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """`verdict` is `accepted`, `duplicate`, `conflict`, `unreadable` or `unknown`."""

    verdict: str
    callback_id: str | None = None
    owner: str | None = None
    upstream_id: str | None = None


Kept = dict[str, dict[str, Any]]  # the callbacks of one task by digest


def accept_callbacks(tx: Transaction, items: Sequence[Callback]) -> list[Verdict]:
    """Judges callbacks and keeps what must be kept; each task is settled by whoever was granted it,
    or soon.
    """
    rows = lock(tx, (item.task_id for item in items))
    kept: dict[str, Kept] = {task_id: {} for task_id in rows}
    statement = (
        select(callbacks).where(callbacks.c.task_id.in_(rows)).order_by(callbacks.c.received_at)
    )
    for known in tx.connection.execute(statement).mappings():
        kept[known["task_id"]][known["digest"]] = dict(known)
    taken = _taken(tx, items, rows)
    verdicts = []
    for item in items:
        row = rows.get(item.task_id)
        verdicts.append(
            _judge(tx, row, kept[item.task_id], item, taken) if row else Verdict("unknown")
        )
    return verdicts


def _taken(tx: Transaction, items: Sequence[Callback], rows: dict[str, TaskRow]) -> dict[str, str]:
    """Which task has an upstream id that a callback names for a task without one."""
    names = {
        (item.upstream, item.report.upstream_id)
        for item in items
        if item.report
        and item.report.upstream_id
        and item.task_id in rows
        and rows[item.task_id].upstream_id is None
    }
    if not names:
        return {}
    statement = select(tasks.c.upstream_id, tasks.c.id).where(
        tuple_(tasks.c.upstream, tasks.c.upstream_id).in_(names)
    )
    return {row.upstream_id: row.id for row in tx.connection.execute(statement)}


def _judge(
    tx: Transaction, row: TaskRow, kept: Kept, item: Callback, taken: dict[str, str]
) -> Verdict:
    report = item.report
    if any(callback["id"] == item.id for callback in kept.values()):  # this very call, run again
        return _verdict(
            next(callback["verdict"] for callback in kept.values() if callback["id"] == item.id),
            item,
            row,
        )
    if report is None:
        if _keep(tx, row, kept, item, item.digest, "unreadable"):
            ask(tx, row)
        return _verdict("unreadable", item, row)
    named = report.upstream_id
    if named and (taken.get(named, row.id) != row.id or row.upstream_id not in (None, named)):
        digest = outcome_digest(report.status, report.results, named)
        return _conflict(tx, row, kept, item, digest, f"names {named}, known is {row.upstream_id}")
    digest = outcome_digest(report.status, report.results)
    first = next((callback["digest"] for callback in kept.values() if callback["first"]), None)
    if named and row.upstream_id is None:
        taken[named] = row.id
        submitted(tx, row, named, "callback", report, None)
        if not report.final or first == digest:
            ask(
                tx,
                row,
                # the submission's answer, which would have planned it, may never come, and the
                # first had no id to ask for
            )
    if not report.final:
        _keep(tx, row, kept, item, digest, "accepted")
        _progress(tx, row, report)
        return _verdict("accepted", item, row)
    settled = row.settled_digest
    if settled is None and first is None:
        _keep(tx, row, kept, item, digest, "accepted", first=True)
        change(tx, row, called_back_at=tx.now)
        wanted = (
            row.state in (State.SUBMITTED, State.FAILED, State.EXPIRED) and row.erased_at is None
        )
        if report.status is Status.COMPLETED and wanted:
            anticipate(tx, row, report.results, item.result_ttl_ms)
        ask(tx, row)
        return _verdict("accepted", item, row)
    agrees = (
        digest == first
        if settled is None
        else digest == settled or (digest == first and report.status == row.upstream_status)
    )
    if agrees:  # the first callback still agrees when only the links were others than the query's
        _keep(tx, row, kept, item, digest, "duplicate", first=True if first is None else None)
        return _verdict("duplicate", item, row)
    return _conflict(tx, row, kept, item, digest, f"says {report.status}, other than before")


def _conflict(
    tx: Transaction, row: TaskRow, kept: Kept, item: Callback, digest: str, reason: str
) -> Verdict:
    if callback_id := _keep(tx, row, kept, item, digest, "conflict"):
        ask(tx, row)
        data = {
            "task_id": row.id,
            "callback_id": callback_id,
            "upstream_id": row.upstream_id,
            "reason": reason,
        }
        outbox.emit_operators(tx, "callback.conflict", data, task_id=row.id)
    return _verdict("conflict", item, row)


def _keep(
    tx: Transaction,
    row: TaskRow,
    kept: Kept,
    item: Callback,
    digest: str,
    verdict: str,
    *,
    first: bool | None = None,
) -> str | None:
    """Writes a callback down, or counts it on the row that says the same; the row's id if this
    verdict on it is new.
    """
    known = kept.get(digest)
    turned = (
        known is not None and verdict == "conflict" != known["verdict"]
    )  # it agreed with what was known then
    if known is None and len(kept) >= KEPT and not first:
        known = next(reversed(kept.values()))
    if known is not None:
        known |= {"count": known["count"] + 1, "verdict": verdict if turned else known["verdict"]}
        tx.change(
            callbacks,
            known["id"],
            {"count": known["count"], "verdict": known["verdict"], "last_seen_at": tx.now},
        )
        return str(known["id"]) if turned else None
    callback = {
        "id": item.id,
        "task_id": row.id,
        "owner": row.owner,
        "received_at": tx.now,
        "last_seen_at": tx.now,
        "count": 1,
        "verdict": verdict,
        "status": item.report.status if item.report else None,
        "upstream_id": item.report.upstream_id if item.report else None,
        "digest": digest,
        "first": first,
        "body": _body(row, kept, item, whole=bool(first)),
    }
    kept[digest] = callback
    tx.insert(callbacks, callback)
    return item.id


def _body(row: TaskRow, kept: Kept, item: Callback, *, whole: bool) -> bytes:
    if row.erased_at is not None:
        return b""
    if whole:
        return item.body
    bodies = sum(1 for callback in kept.values() if callback["body"])
    return item.body[:BODY_BYTES] if bodies < BODIES else b""


def _progress(tx: Transaction, row: TaskRow, report: Report) -> None:
    values = fill(row, report)
    if report.status is Status.PROCESSING and row.state is State.SUBMITTED:
        values["upstream_status"] = Status.PROCESSING.value
    if values and row.state not in TERMINAL:
        change(tx, row, **values)


def _verdict(verdict: str, item: Callback, row: TaskRow) -> Verdict:
    return Verdict(verdict, item.id, row.owner, row.upstream_id)
