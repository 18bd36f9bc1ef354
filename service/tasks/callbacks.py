"""The verdicts on callbacks with the right token (docs/callbacks.md).

The transaction that keeps a verdict makes its task due for the confirmation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import starmap
from typing import Any

from sqlalchemy import Select, bindparam, func, select

from service.db.prepared import run
from service.db.tables import callbacks
from service.db.transaction import Transaction
from service.events import outbox
from service.ops import tracing
from service.tasks.results import anticipate
from service.tasks.rows import TaskRow
from service.tasks.state import State
from service.tasks.transitions import ask, change, fill, is_taken, submitted
from service.upstreams.base import Report, Status, outcome_digest

UNREADABLE_BYTES = 16 * 1024  # kept of an unreadable body
KEPT = 20  # different callbacks of one task. Later ones are counted on the last row
# How many of them keep their bodies, and how many bytes of each. The first terminal callback keeps
# its whole body (at most 256 KiB): without a confirming query, that body is the task's result.
BODIES, BODY_BYTES = 5, 64 * 1024


@dataclass(frozen=True, slots=True)
class Callback:
    """A callback with the right token. `report` None: unreadable. `digest` is the body's hash, and
    `size` its length. It `waited_ms` for its verdict, and the links that it names live for
    `result_ttl_ms` from now.
    """

    id: str
    upstream: str
    task_id: str
    report: Report | None
    digest: str
    body: bytes
    result_ttl_ms: int
    received_at: int
    size: int = 0
    waited_ms: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """`verdict` is `accepted`, `duplicate`, `conflict`, `unreadable` or `unknown`."""

    verdict: str
    callback_id: str | None = None
    owner: str | None = None
    origin: tracing.Origin = tracing.NO_ORIGIN


@dataclass(slots=True)
class CallbackRow:
    """The columns of `callbacks` that a verdict needs. `first`: the first terminal one."""

    id: str
    task_id: str
    digest: str
    verdict: str
    count: int
    first: bool | None
    has_body: bool


@dataclass(slots=True)
class Inbox:
    """The locked task of a callback, and its earlier callbacks by digest."""

    tx: Transaction
    row: TaskRow
    kept: dict[str, CallbackRow] = field(default_factory=dict)

    @property
    def first(self) -> str | None:
        """The digest of the first terminal callback."""
        return next((callback.digest for callback in self.kept.values() if callback.first), None)


_EARLIER: Select[Any] = (
    select(
        *(callbacks.c[name] for name in CallbackRow.__slots__[:-1]),
        (func.length(callbacks.c.body) > 0).label("has_body"),
    )
    .where(callbacks.c.task_id.in_(bindparam("task_ids", expanding=True)))
    .order_by(callbacks.c.received_at)
)


def give_verdicts(
    tx: Transaction, rows: dict[str, TaskRow], items: Sequence[Callback]
) -> list[Verdict]:
    """Judges callbacks of the locked tasks `rows`, in their order, and keeps them. An accepted one
    makes its task due for a confirmation.
    """
    inboxes = {task_id: Inbox(tx, row) for task_id, row in rows.items()}
    for callback in starmap(CallbackRow, run(tx.connection, _EARLIER, {"task_ids": list(rows)})):
        inboxes[callback.task_id].kept[callback.digest] = callback
    verdicts = []
    for item in items:
        inbox = inboxes.get(item.task_id)
        if inbox is None:
            verdicts.append(Verdict("unknown"))
            continue
        verdict = _judge(inbox, item)
        verdicts.append(Verdict(verdict, item.id, inbox.row.owner, inbox.row.origin))
    return verdicts


def _judge(inbox: Inbox, item: Callback) -> str:
    row, report = inbox.row, item.report
    for callback in inbox.kept.values():
        if callback.id == item.id:  # a second run of this very call, after a lost commit
            return callback.verdict
    if report is None:
        if _keep(inbox, item, item.digest, "unreadable"):
            ask(inbox.tx, row)
        return "unreadable"
    named, report = report.upstream_id, report.without_credits()  # until a query confirms them
    if named and row.upstream_id != named and (row.upstream_id or is_taken(inbox.tx, row, named)):
        digest = outcome_digest(report.status, report.results, named)
        return _conflict(inbox, item, digest, f"names {named}, known is {row.upstream_id}")
    digest = outcome_digest(report.status, report.results)
    if named and row.upstream_id is None:
        submitted(inbox.tx, row, named, "callback", report)
        if not report.final or inbox.first == digest:
            # The submit response, which plans the first query, may never come, and the first
            # terminal callback found no id to query.
            ask(inbox.tx, row)
    if report.final:
        return _judge_outcome(inbox, item, report, digest)
    _keep(inbox, item, digest, "accepted")
    values = fill(row, report)
    if report.status is Status.PROCESSING and row.state is State.SUBMITTED:
        values["upstream_status"] = Status.PROCESSING
    if not row.terminal:
        change(inbox.tx, row, **values)
    return "accepted"


def _judge_outcome(inbox: Inbox, item: Callback, report: Report, digest: str) -> str:
    """Compares a terminal callback with the settled state, or else with the first terminal one."""
    tx, row, first, settled = inbox.tx, inbox.row, inbox.first, inbox.row.settled_digest
    if settled is None and first is None:
        _keep(inbox, item, digest, "accepted", first=True)
        change(tx, row, called_back_at=item.received_at)
        wanted = row.state in (State.SUBMITTED, State.FAILED, State.EXPIRED)
        if report.status is Status.COMPLETED and wanted and row.erased_at is None:
            anticipate(tx, row, report.results, item.result_ttl_ms)
        ask(tx, row)
        return "accepted"
    # A callback agrees with its first delivery even if the query gave other links.
    same_status = digest == first and report.status == row.upstream_status
    if digest == (settled or first) or (settled is not None and same_status):
        _keep(inbox, item, digest, "duplicate", first=True if first is None else None)
        return "duplicate"
    return _conflict(inbox, item, digest, f"says {report.status}, other than before")


def _conflict(inbox: Inbox, item: Callback, digest: str, reason: str) -> str:
    row = inbox.row
    if callback_id := _keep(inbox, item, digest, "conflict"):
        ask(inbox.tx, row)
        data = {
            "task_id": row.id,
            "callback_id": callback_id,
            "upstream_id": row.upstream_id,
            "reason": reason,
        }
        outbox.emit_operators(inbox.tx, "callback.conflict", data, task_id=row.id)
    return "conflict"


def _keep(
    inbox: Inbox, item: Callback, digest: str, verdict: str, *, first: bool | None = None
) -> str | None:
    """Inserts a callback, or counts it on the row that says the same. Returns the row's id if this
    verdict is new on it.
    """
    tx, row, kept = inbox.tx, inbox.row, inbox.kept
    same = kept.get(digest)
    turned = same is not None and verdict == "conflict" != same.verdict  # it agreed before
    if same is None and len(kept) >= KEPT and not first:
        same = next(reversed(kept.values()))
    if same is not None:
        same.count += 1
        same.verdict = verdict if turned else same.verdict
        values = {"count": same.count, "verdict": same.verdict, "last_seen_at": item.received_at}
        tx.change(callbacks, same.id, values)
        return same.id if turned else None
    body, report = _body(inbox, item, whole=bool(first)), item.report or Report()
    kept[digest] = CallbackRow(item.id, row.id, digest, verdict, 1, first, bool(body))
    columns = {
        "id": item.id,
        "task_id": row.id,
        "owner": row.owner,
        "received_at": item.received_at,
        "last_seen_at": item.received_at,
        "count": 1,
        "verdict": verdict,
        "status": report.status,
        "upstream_id": report.upstream_id,
        "digest": digest,
        "first": first,
        "body": body,
    }
    tx.insert(callbacks, columns)
    return item.id


def _body(inbox: Inbox, item: Callback, *, whole: bool) -> bytes:
    if inbox.row.erased_at is not None:
        return b""
    bodies = sum(callback.has_body for callback in inbox.kept.values())
    return item.body if whole else item.body[:BODY_BYTES] if bodies < BODIES else b""
