"""Moves of a task from state to state."""

from collections.abc import Iterable
from typing import Any

from sqlalchemy import delete, or_, select

from service.db.tables import images, tasks
from service.db.transaction import Transaction
from service.events import outbox
from service.queue import leases
from service.strict_json import JSON
from service.tasks.document import Image, task_document
from service.tasks.rows import counts, image_record, task_record
from service.tasks.state import TERMINAL, State, may_become
from service.upstreams.base import Report

Row = dict[str, Any]


RENAMES = {
    ("callback", "answer"),
    ("hand", "answer"),
    ("query", "answer"),
    ("hand", "hand"),
}  # from where an id was, and is


def lock(tx: Transaction, ids: Iterable[str]) -> dict[str, Row]:
    """The tasks' rows, locked to the end of the transaction, always in the order of their ids."""
    statement = select(tasks).where(tasks.c.id.in_(set(ids))).order_by(tasks.c.id).with_for_update()
    return {row["id"]: dict(row) for row in tx.connection.execute(statement).mappings()}


def change(tx: Transaction, row: Row, **values: Any) -> None:
    """Writes new values to a locked row and to the copy in hand."""
    row.update(values)
    tx.change(tasks, row["id"], values)
    tx.touched.add(row["id"])


def move(tx: Transaction, row: Row, after: State, **values: Any) -> None:
    """Changes the state; a move that the contract's table does not know is a defect of ours."""
    if not may_become(State(row["state"]), after):
        raise AssertionError(f"a task cannot go from {row['state']} to {after}")
    change(tx, row, state=after.value, **values)


def fill(row: Row, report: Report) -> dict[str, Any]:
    """What a report adds to a task's row: usage and progress, never backwards, never to nothing."""
    told = {
        "estimated_time": report.estimated_time,
        "billing_rule": report.billing_rule,
        "user_group": report.user_group,
        "credits_reserved": report.credits_reserved,
        "credits_used": report.credits_used,
        "can_cancel": report.can_cancel,
        "progress": report.progress
        if report.progress is not None and report.progress > row["progress"]
        else None,
    }
    return {name: value for name, value in told.items() if value is not None}


def submitted(
    tx: Transaction,
    row: Row,
    upstream_id: str,
    source: str,
    report: Report,
    first_query_ms: int | None,
) -> None:
    """The upstream has the task: binds its id and, on the way from `queued`, tells everybody once.

    An id from the submit answer wins over one from a callback or by hand (`source`: answer |
    callback | hand), and one by hand over one by hand before it. Who asks about the old one
    meanwhile loses the lease: the answer would be another task's. `first_query_ms` None: settling
    is planned already.
    """
    values = fill(row, report)
    if State(row["state"]) not in (
        State.QUEUED,
        State.SUBMITTING,
        State.UNCERTAIN,
    ):  # an answer that comes late knows nothing better
        values = {name: value for name, value in values.items() if row[name] is None}
    if row["upstream_id"] is None or (row["upstream_id_from"], source) in RENAMES:
        values |= {"upstream_id": upstream_id, "upstream_id_from": source}
        if row["upstream_id"] not in (None, upstream_id):
            values |= leases.release("settle", tx.now)
    if (
        first_query_ms is not None
        and row["settle_due_at"] is None
        and (
            State(row["state"]) not in TERMINAL
            or row["settled_digest"] is None  # after an end of our own making, for its credits
        )
    ):
        values["settle_due_at"] = tx.now + first_query_ms
    if (
        State(row["state"]) is State.QUEUED
    ):  # proof of a submission that looked as if it had created nothing
        move(tx, row, State.SUBMITTING)
    if State(row["state"]) in (State.SUBMITTING, State.UNCERTAIN):
        status = None if report.final or report.status is None else report.status.value
        move(
            tx,
            row,
            State.SUBMITTED,
            submitted_at=tx.now,
            upstream_status=status,
            submit_due_at=None,
            **values,
        )
        tx.step(row["id"], "task.submitted", upstream_id=row["upstream_id"], source=source)
        outbox.emit(
            tx,
            "image.task.submitted",
            owner=row["owner"],
            task_id=row["id"],
            data=task_document(task_record(row)),
        )
    elif values:
        change(tx, row, **values)


def ask(tx: Transaction, row: Row) -> None:
    """The upstream is asked about the task as soon as somebody is free and its id is known; an
    answer under way does not count.
    """
    due = leases.requeue(tx, "settle", row["id"], row) if row["upstream_id"] is not None else {}
    change(tx, row, settle_requests=row["settle_requests"] + 1, **due)


def end(tx: Transaction, row: Row, state: State, error: JSON | None = None, **values: Any) -> None:
    """Ends a task: its one terminal event is written in this transaction."""
    move(
        tx,
        row,
        state,
        error=error,
        terminal_at=tx.now,
        submit_due_at=None,
        settle_due_at=None,
        **values,
    )
    tx.step(row["id"], "task.settled", state=state.value, error=error["code"] if error else None)
    outbox.emit(
        tx,
        f"image.task.{state}",
        owner=row["owner"],
        task_id=row["id"],
        data=task_document(task_record(row, stored_images(tx, row["id"]))),
        terminal=True,
        task_callback=row["callback_url"] is not None,
        called_back_at=row["called_back_at"],
    )


def stored_images(tx: Transaction, task_id: str) -> list[Image]:
    tx.write()
    statement = (
        select(images).where(images.c.task_id == task_id, counts).order_by(images.c.position)
    )
    return [image_record(row) for row in tx.connection.execute(statement).mappings()]


def forget_downloads(tx: Transaction, task_id: str) -> None:
    """Results on their way are not fetched any more, and what only a callback named does not
    count.
    """
    tx.connection.execute(
        delete(images).where(
            images.c.task_id == task_id,
            or_(images.c.state == "pending", images.c.confirmed.is_(False)),
        )
    )
