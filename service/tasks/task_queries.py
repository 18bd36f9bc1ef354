"""Queries about tasks."""

from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import Connection, RowMapping, Select, or_, select

from service.db.paging import Selection, matching, page
from service.db.tables import attempts, callbacks, deliveries, events, steps, tasks
from service.ids import PREFIXES, rfc3339, sequence_text
from service.strict_json import JSON, storable
from service.tasks.rows import ImageRow, TaskRow, select_tasks, stored_images, task_rows
from service.tasks.state import State

Task = tuple[TaskRow, list[ImageRow]]  # with its stored images
FORMATS: Mapping[str, Callable[[Any], str]] = {
    "time": rfc3339,
    "last_seen_at": rfc3339,
    "sequence": sequence_text,
}
RAW_BYTES = 2048  # shown of a callback that could not be read
CALLBACKS = 100  # of a task, in an answer
ATTEMPTS = 1000  # of deliveries, in a timeline
CLOCKS_MS = 60_000  # how far the upstream's clock may be from ours


def task_row(connection: Connection, task_id: str, owner: str | None) -> TaskRow | None:
    """A task by the service's id or the upstream's. `owner` None: any owner's."""
    wanted = tasks.c.id == task_id
    if not task_id.startswith(PREFIXES["task"]):
        wanted = or_(wanted, tasks.c.upstream_id == task_id)
    statement = select_tasks(wanted)
    if owner is not None:
        statement = statement.where(tasks.c.owner == owner)
    return next(iter(task_rows(connection, statement)), None)


def task(connection: Connection, task_id: str, owner: str | None) -> Task | None:
    row = task_row(connection, task_id, owner)
    if row is None:
        return None
    confirmed = row.settled_digest is not None or row.incomplete_since is not None
    return row, stored_images(connection, [row.id]).get(row.id, []) if confirmed else []


def task_list(
    connection: Connection,
    wanted: Selection,
    state: str | None = None,
    model_name: str | None = None,
    metadata: Mapping[str, str] | None = None,
    error: str | None = None,
    prompt: tuple[str, str] | None = None,
) -> list[Task]:
    """Tasks, newest first. `error`: the code. `prompt`: an owner, and a part of its prompts."""
    statement = matching(select_tasks(), tasks, state=state, model=model_name)
    if error is not None:
        statement = statement.where(tasks.c.error["code"].as_string() == error)
    if prompt is not None:
        part = tasks.c.prompt.icontains(prompt[1], autoescape=True)
        statement = statement.where(tasks.c.owner == prompt[0], part)
    for key, value in (metadata or {}).items():
        statement = statement.where(tasks.c.metadata[key].as_string() == value)
    rows = task_rows(connection, page(statement, tasks, wanted))
    images = stored_images(connection, [row.id for row in rows])
    return [(row, images.get(row.id, [])) for row in rows]


def task_by_key(
    connection: Connection, owner: str, idempotency_key: str
) -> tuple[str, str | None] | None:
    """The id and the body's hash of the owner's task with this key."""
    statement = select(tasks.c.id, tasks.c.idempotency_hash).where(
        tasks.c.owner == owner, tasks.c.idempotency_key == idempotency_key
    )
    row = connection.execute(statement).first()
    return None if row is None else (row.id, row.idempotency_hash)


def may_be_anothers(
    connection: Connection, upstream: str, upstream_id: str, owner: str, created: int | None
) -> bool:
    """Whether another owner's task has that id at the upstream, or may have it: its id is unknown,
    and it was on its way at the time `created`, by the upstream's clock. None: an unknown time.
    """
    anothers = select(tasks.c.id).where(tasks.c.upstream == upstream, tasks.c.owner != owner)
    sent = or_(tasks.c.state != State.QUEUED.value, tasks.c.submit_outcomes > 0)
    unnamed = anothers.where(tasks.c.upstream_id.is_(None), tasks.c.refusal_status.is_(None), sent)
    if created is not None:
        ended = or_(tasks.c.terminal_at.is_(None), tasks.c.terminal_at >= created - CLOCKS_MS)
        unnamed = unnamed.where(tasks.c.created_at <= created + CLOCKS_MS, ended)
    named = anothers.where(tasks.c.upstream_id == upstream_id)
    return bool(connection.scalar(select(or_(named.exists(), unnamed.exists()))))


def settling(connection: Connection, task_id: str) -> tuple[TaskRow | None, bytes | None]:
    """A task and the body of its first terminal callback."""
    first = (callbacks.c.task_id == task_id, callbacks.c.first.is_(True))
    body = connection.execute(select(callbacks.c.body).where(*first)).scalar()
    return task_row(connection, task_id, None), body


def timeline(connection: Connection, task_id: str, delivery_owner: str | None) -> list[JSON]:
    """Every step of a task in the order of time, named as the log names it. `delivery_owner`
    limits the deliveries to one owner's, and leaves out what the upstream sent word for word.
    """

    def read(statement: Select[Any]) -> list[RowMapping]:
        return list(connection.execute(statement).mappings())

    def add(step: str, statement: Select[Any]) -> None:
        lines.extend({"time": row["time"], "step": step, **row} for row in read(statement))

    own = select(steps.c.time, steps.c.step, steps.c.detail).where(steps.c.task_id == task_id)
    lines: list[JSON] = [
        {"time": row["time"], "step": row["step"], **row["detail"]}
        for row in read(own.order_by(steps.c.id))
    ]
    erased = select(tasks.c.erased_at.label("time")).where(tasks.c.id == task_id)
    add("task.erased", erased.where(tasks.c.erased_at.is_not(None)))
    called = select(
        callbacks.c.received_at.label("time"),
        callbacks.c.id.label("callback_id"),
        *(callbacks.c[name] for name in ("verdict", "status", "count", "last_seen_at")),
    )
    add("callback.received", called.where(callbacks.c.task_id == task_id))
    unreadable = (callbacks.c.task_id == task_id, callbacks.c.verdict == "unreadable")
    for row in read(select(callbacks.c.id, callbacks.c.body).where(*unreadable)):
        line = next(line for line in lines if line.get("callback_id") == row["id"])
        line["raw"] = storable(row["body"][:RAW_BYTES].decode("utf-8", "replace"))
    if delivery_owner is not None:
        for line in lines:
            line.pop("raw", None)
    emitted = select(
        events.c.time, events.c.id.label("event_id"), events.c.type, events.c.sequence
    ).where(events.c.task_id == task_id, events.c.type.startswith("image.task."))
    add("event.emitted", emitted)
    names = ("time", "delivery_id", "status", "duration_ms", "error")
    attempted = select(
        *(attempts.c[name] for name in names), deliveries.c.endpoint_id, deliveries.c.event_id
    ).join(deliveries, deliveries.c.id == attempts.c.delivery_id)
    attempted = attempted.where(deliveries.c.task_id == task_id)
    if delivery_owner is not None:
        attempted = attempted.where(deliveries.c.owner == delivery_owner)
    add("delivery.attempted", attempted.order_by(attempts.c.time.desc()).limit(ATTEMPTS))
    lines.sort(key=lambda line: line["time"])
    return [
        {name: FORMATS[name](value) if name in FORMATS else value for name, value in line.items()}
        for line in lines
    ]


def callback_list(connection: Connection, task_id: str) -> list[RowMapping]:
    """The callbacks of a task, the oldest first."""
    statement = select(callbacks).where(callbacks.c.task_id == task_id)
    order = callbacks.c.received_at, callbacks.c.id
    return list(connection.execute(statement.order_by(*order).limit(CALLBACKS)).mappings())


def callback_document(row: RowMapping, *, bodies: bool) -> JSON:
    """A callback as clients see it. `bodies`: with what the upstream sent, word for word."""
    body = storable(row["body"].decode("utf-8", "replace")) if bodies and row["body"] else None
    names = ("id", "verdict", "status", "count", "upstream_id")
    times = {name: rfc3339(row[name]) for name in ("received_at", "last_seen_at")}
    return {**{name: row[name] for name in names}, **times, "body": body}
