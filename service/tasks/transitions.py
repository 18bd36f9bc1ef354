"""Moves of a task from state to state. Each writes the row, its timeline step and its event."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from sqlalchemy import ColumnElement, Exists, Select, bindparam, delete, exists, or_, select

from service.db.prepared import run
from service.db.tables import images, inbox, steps, tasks
from service.db.transaction import Emitted, Lease, Transaction
from service.events import outbox
from service.queue import leases
from service.strict_json import JSON, storable
from service.tasks.document import event_task
from service.tasks.ledger import cost, entered
from service.tasks.rows import ImageRow, TaskRow, select_tasks, stored_images, task_rows
from service.tasks.state import UNPROVED, State, may_become
from service.upstreams.base import Report, Status

# An id from the second source replaces one from the first. `query`: an id by hand to which the
# upstream has answered, so that it is no slip of the pen.
REPLACES = {("callback", "answer"), ("hand", "answer"), ("query", "answer"), ("hand", "hand")}
RAW_KEPT = 3  # unreadable responses of one task

HELD = "held: the upstream refuses our key"  # of the step `task.held`
VERDICT_MS = 1000  # between looks of a decision that waits for the verdict on a callback


class Leased(Protocol):
    @property
    def lease(self) -> Lease: ...


Work = TypeVar("Work", bound=Leased)


def locking(ids: Any) -> Select[Any]:
    """A select of the tasks with these ids, which locks them in the order of their ids."""
    return select_tasks(tasks.c.id.in_(ids)).order_by(tasks.c.id).with_for_update()


_LOCKING = locking(bindparam("ids", expanding=True))


def lock(tx: Transaction, ids: Iterable[str]) -> dict[str, TaskRow]:
    """The tasks' rows, locked until the transaction ends, in the order of their ids."""
    rows = task_rows(tx.connection, _LOCKING, {"ids": list(set(ids))})
    return {row.id: row for row in rows}


def lock_leased(tx: Transaction, items: Sequence[Work]) -> Iterator[tuple[Work, TaskRow | None]]:
    """Items with their locked rows, or with None where the lease was lost."""
    rows = lock(tx, (item.lease.key for item in items))
    for item in items:
        row = rows.get(item.lease.key)
        yield item, row if row is not None and leases.holds(item.lease, row) else None


def callback_waits(task_id: ColumnElement[str] | str) -> Exists:
    """Whether a callback of the task waits for its verdict. It may prove what time would decide."""
    return exists().where(inbox.c.task_id == task_id)


def change(tx: Transaction, row: TaskRow | ImageRow, **values: Any) -> None:
    """Sets columns of a locked row, in the record and in the database."""
    if not values:
        return
    before = cost(row) if isinstance(row, TaskRow) else ()
    for name, value in values.items():
        setattr(row, name, value)
    if isinstance(row, TaskRow):
        tx.change(tasks, row.id, values)
        tx.touched[row.id] = row
        if cost(row) != before:
            tx.costs.add(row.id)
    else:
        tx.change(images, row.id, values)


def move(tx: Transaction, row: TaskRow, after: State, **values: Any) -> None:
    """Changes the state. AssertionError: the table of moves does not allow it.

    The body goes with the last state from which the task could be submitted.
    """
    if not may_become(row.state, after):
        raise AssertionError(f"a task cannot go from {row.state} to {after}")
    if after not in UNPROVED:
        values["body"] = b""
    change(tx, row, state=after, **values)


def fill(row: TaskRow, report: Report) -> dict[str, Any]:
    """The columns that a report fills. Progress never goes back, and no value becomes unknown."""
    progress = report.progress
    values = {
        "estimated_time": report.estimated_time,
        "billing_rule": report.billing_rule,
        "user_group": report.user_group,
        "credits_reserved": report.credits_reserved,
        "credits_used": report.credits_used,
        "credits_refunded": report.credits_refunded,
        "can_cancel": report.can_cancel,
        "progress": progress if progress is not None and progress > row.progress else None,
    }
    unpaid = report.status in (Status.FAILED, Status.CANCELLED) and row.settled_digest is None
    if unpaid and report.credits_used is None and row.credits_used is not None:
        values["credits_used"] = 0  # a task that failed is not charged, unless the report says so
    return {name: value for name, value in values.items() if value is not None}


def submitted(
    tx: Transaction,
    row: TaskRow,
    upstream_id: str | None,
    source: str,
    report: Report,
    first_query_ms: int | None = None,
) -> None:
    """Binds the upstream's id, if it gave one, to the task and, unless that happened before, emits
    `image.task.submitted`.

    `source` is `answer`, `callback` or `hand`, and `REPLACES` says which wins. `first_query_ms`
    None: the next query is planned already.
    """
    values = fill(row, report)
    if row.state not in UNPROVED:  # this answer is late: a query may have filled newer values
        values = {name: value for name, value in values.items() if getattr(row, name) is None}
    if upstream_id is not None:
        values |= _named(tx, row, upstream_id, source)
    unsettled = not row.terminal or row.settled_digest is None  # its credits are still unknown
    if first_query_ms is not None and row.settle_due_at is None and unsettled:
        values["settle_due_at"] = tx.now + first_query_ms
    if row.state is State.QUEUED:  # the upstream refused the call, and made the task all the same
        move(tx, row, State.SUBMITTING)
    if row.state in (State.SUBMITTING, State.UNCERTAIN):
        status = None if report.final else report.status
        values |= {"submitted_at": tx.now, "upstream_status": status, "submit_due_at": None}
        move(tx, row, State.SUBMITTED, **values)
        tx.step(row.id, "task.submitted", upstream_id=row.upstream_id, source=source)
        _emit(tx, row, State.SUBMITTED)
    elif values:
        change(tx, row, **values)
    entered(tx, row, {"answer": "submit", "callback": "callback"}.get(source))


def _named(tx: Transaction, row: TaskRow, upstream_id: str, source: str) -> dict[str, Any]:
    """The columns that bind an id. A new id ends the lease of a worker that queries the old one,
    because the answer would be about another task.
    """
    if row.upstream_id is not None and (row.upstream_id_from, source) not in REPLACES:
        return {}
    values: dict[str, Any] = {"upstream_id": upstream_id, "upstream_id_from": source}
    if row.upstream_id not in (None, upstream_id):
        values |= leases.release("settle", tx.now)
    return values


def is_taken(tx: Transaction, row: TaskRow, upstream_id: str) -> bool:
    """Whether another task has this id at the upstream."""
    tx.write()  # this transaction may have bound it
    same = (tasks.c.upstream == row.upstream, tasks.c.upstream_id == upstream_id)
    return tx.connection.scalar(select(tasks.c.id).where(*same, tasks.c.id != row.id)) is not None


def ask(tx: Transaction, row: TaskRow) -> None:
    """Requests a query of the upstream now. A query that is under way does not count."""
    due = leases.requeue(tx, "settle", row.id, row) if row.upstream_id is not None else {}
    change(tx, row, settle_requests=row.settle_requests + 1, **due)


def end(
    tx: Transaction,
    row: TaskRow,
    state: State,
    error: JSON | None = None,
    images: Sequence[ImageRow] | None = None,
    **values: Any,
) -> None:
    """Ends a task and emits its one terminal event. `images`: all images of the task, in their
    order, as this transaction leaves them. None: they are read.
    """
    values |= {"terminal_at": tx.now, "submit_due_at": None, "settle_due_at": None}
    move(tx, row, state, error=error, **values)
    entered(tx, row)
    tx.step(row.id, "task.settled", state=state.value, error=error["code"] if error else None)
    if images is None:
        tx.write()
        images = stored_images(tx.connection, [row.id]).get(row.id, ())
    shown = [image for image in images if image.state == "stored" and image.confirmed]
    _emit(tx, row, state, shown, terminal=True)


def keep_raw(tx: Transaction, task_id: str, answer_to: str, raw: bytes) -> None:
    """Keeps the beginning of a response that could not be read in the timeline, for operators.
    Equal responses and the later ones of many are not kept.
    """
    tx.write()
    unreadable = (steps.c.task_id == task_id, steps.c.step == "upstream.unreadable")
    kept = list(tx.connection.execute(select(steps.c.detail).where(*unreadable)).scalars())
    text = storable(raw.decode("utf-8", "replace"))
    if len(kept) < RAW_KEPT and all(detail["raw"] != text for detail in kept):
        tx.step(task_id, "upstream.unreadable", answer_to=answer_to, raw=text)


def task_error(code: str, message: str) -> JSON:
    """An error of the service's own, as `TaskRow.error` keeps it."""
    return {"code": code, "message": message, "type": "task_error"}


def _emit(
    tx: Transaction,
    row: TaskRow,
    state: State,
    images: Sequence[ImageRow] = (),
    *,
    terminal: bool = False,
) -> None:
    tx.origins[row.id] = row.origin
    id, type, data = tx.id("event"), f"image.task.{state}", event_task(row, images)
    event = Emitted(id, row.owner, type, row.id, data)
    if terminal:
        event.terminal, event.task_callback = True, row.callback_url is not None
        event.called_back_at = row.called_back_at
    tx.emitted.append(event)


def note_once(tx: Transaction, row: TaskRow, step: str, **detail: str) -> None:
    """Adds a step, unless it is the last one already."""
    last = select(steps.c.step, steps.c.detail).where(steps.c.task_id == row.id)
    previous = tx.connection.execute(last.order_by(steps.c.id.desc()).limit(1)).first()
    if previous is None or tuple(previous) != (step, detail):
        tx.step(row.id, step, **detail)


def hold(tx: Transaction, row: TaskRow, due_at: int, message: str = HELD) -> None:
    """Ends the lease of a task that is not sent for now, without counting the attempt. A request
    that waits for the first outcome gets its response.

    A held row has no lease, but names this process in `submit_lease_owner`.
    """
    note_once(tx, row, "task.held", message=message)
    columns = {"lease_owner": tx.process, "attempts": row.submit_attempts - 1}
    outcomes = max(1, row.submit_outcomes)
    change(tx, row, submit_outcomes=outcomes, **leases.release("submit", due_at, **columns))


_FORGETTING = delete(images).where(
    images.c.task_id == bindparam("task_id"),
    or_(images.c.state == "pending", images.c.confirmed.is_(False)),
)


def forget_downloads(tx: Transaction, task_id: str) -> None:
    """Deletes results that are not fetched yet, or that only a callback named."""
    run(tx.connection, _FORGETTING, {"task_id": task_id})


def dead_letter_task(tx: Transaction, lease: Lease, cause: str) -> None:
    """Fails a task with a row that left its queue for good, and tells operators.

    A task that is storing or has ended keeps its state. Its images have a queue of their own.
    """
    task = lock(tx, [lease.key])[lease.key]
    if task.state in (State.QUEUED, State.SUBMITTING, State.UNCERTAIN, State.SUBMITTED):
        forget_downloads(tx, lease.key)
        message = f"parked after {cause}"
        error = {"code": "internal_error", "message": message, "type": "server_error"}
        end(tx, task, State.FAILED, error)
    tx.costs.add(task.id)
    entered(tx, task)  # an ended task is asked about its cost no more
    outbox.emit_dead_letter(tx, lease, cause, lease.key)
