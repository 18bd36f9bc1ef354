"""A task's row: put in, locked, moved from state to state, ended, cancelled."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, or_, select, tuple_

from service import model
from service.model import JSON, State
from service.store import Transaction
from service.store.operations import leases, outbox
from service.store.operations.turns import Turns
from service.store.records import counts, image_record, task_record
from service.store.tables import images, tasks

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
    if not model.may_become(State(row["state"]), after):
        raise AssertionError(f"a task cannot go from {row['state']} to {after}")
    change(tx, row, state=after.value, **values)


def fill(row: Row, report: model.Report) -> dict[str, Any]:
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
    report: model.Report,
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
            values |= leases.freed("settle", tx.now)
    if (
        first_query_ms is not None
        and row["settle_due_at"] is None
        and (
            State(row["state"]) not in model.TERMINAL
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
        outbox.emit(tx, "image.task.submitted", task_record(row), row)
    elif values:
        change(tx, row, **values)


def ask(tx: Transaction, row: Row) -> None:
    """The upstream is asked about the task as soon as somebody is free and its id is known; an
    answer under way does not count.
    """
    due = leases.wanted(tx, "settle", row["id"], row) if row["upstream_id"] is not None else {}
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
        task_record(row, stored_images(tx, row["id"])),
        row,
        terminal=True,
    )


def stored_images(tx: Transaction, task_id: str) -> list[model.Image]:
    tx.write()
    statement = (
        select(images).where(images.c.task_id == task_id, counts).order_by(images.c.position)
    )
    return [image_record(row) for row in tx.connection.execute(statement).mappings()]


@dataclass(frozen=True, slots=True)
class NewTask:
    """A submission as a client asked for it; `body` is what the upstream will be sent."""

    id: str
    owner: str
    upstream: str
    model: str
    prompt: str | None
    request: JSON
    metadata: Mapping[str, str]
    body: bytes
    callback_url: str | None = None
    idempotency_key: str | None = None
    idempotency_hash: str | None = None


@dataclass(frozen=True, slots=True)
class Inserted:
    """`created` False: an earlier task has this owner and idempotency key, with the body of that
    hash.
    """

    task_id: str
    created: bool
    idempotency_hash: str | None


def insert_tasks(tx: Transaction, items: Sequence[NewTask]) -> list[Inserted]:
    """Accepts submissions as `queued`. Run again after a lost commit, or with a key that exists, it
    finds the first row.
    """
    known = _known(tx, items)
    turns = Turns(tx)
    results = []
    for item in items:
        name = (item.owner, item.idempotency_key)
        earlier = known.get(item.id) or (known.get(name) if item.idempotency_key else None)
        if earlier is None:
            inserted = Inserted(item.id, True, item.idempotency_hash)
            known[item.id] = inserted
            known[name] = Inserted(item.id, False, item.idempotency_hash)
            tx.insert(tasks, _new_row(tx, item, turns))
            tx.step(item.id, "task.queued", model=item.model)
            earlier = inserted
        results.append(earlier)
    return results


def _known(tx: Transaction, items: Sequence[NewTask]) -> dict[Any, Inserted]:
    columns = (tasks.c.id, tasks.c.owner, tasks.c.idempotency_key, tasks.c.idempotency_hash)
    names = [(item.owner, item.idempotency_key) for item in items if item.idempotency_key]
    known: dict[Any, Inserted] = {}
    for row in tx.connection.execute(
        select(*columns).where(tasks.c.id.in_([item.id for item in items]))
    ):
        known[row.id] = Inserted(row.id, True, row.idempotency_hash)
    if names:
        statement = select(*columns).where(
            tuple_(tasks.c.owner, tasks.c.idempotency_key).in_(names)
        )
        for row in tx.connection.execute(statement):
            known[row.owner, row.idempotency_key] = Inserted(row.id, False, row.idempotency_hash)
    return known


def _new_row(tx: Transaction, item: NewTask, turns: Turns) -> Row:
    return {
        "id": item.id,
        "owner": item.owner,
        "upstream": item.upstream,
        "state": State.QUEUED.value,
        "created_at": tx.now,
        "model": item.model,
        "prompt": item.prompt,
        "request": item.request,
        "metadata": dict(item.metadata),
        "body": item.body,
        "callback_url": item.callback_url,
        "idempotency_key": item.idempotency_key,
        "idempotency_hash": item.idempotency_hash,
        "submit_turn": turns.next(item.owner),
        **leases.born(tx, "submit", item.id, behind=turns.behind),
    }


@dataclass(frozen=True, slots=True)
class Cancellation:
    task_id: str
    owner: str | None  # None: whoever owns it (admin)


def cancel_tasks(tx: Transaction, items: Sequence[Cancellation]) -> list[str | None]:
    """Stops waiting for tasks, here alone: None, or why not: `missing`, or the terminal state that
    was there first.
    """
    rows = lock(tx, (item.task_id for item in items))
    results: list[str | None] = []
    for item in items:
        row = rows.get(item.task_id)
        if row is None or item.owner not in (None, row["owner"]):
            results.append("missing")
        elif State(row["state"]) in model.TERMINAL:
            results.append(str(row["state"]))
        else:
            error = {
                "code": "request_cancelled",
                "message": "cancelled by its owner",
                "type": "task_error",
            }
            asked = row["settle_due_at"] if row["upstream_id"] is not None else None
            tx.connection.execute(delete(images).where(images.c.task_id == row["id"]))
            end(tx, row, State.CANCELLED, error)
            change(tx, row, settle_due_at=asked)  # what it cost is still recorded
            results.append(None)
    return results


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
