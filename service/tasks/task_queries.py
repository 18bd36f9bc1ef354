"""Queries about tasks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    FromClause,
    RowMapping,
    Select,
    and_,
    bindparam,
    exists,
    func,
    or_,
    select,
    tuple_,
    union_all,
)

from service.db.list_indexes import ENDED_BADLY, HAS_ERROR, task_metadata
from service.db.paging import Selection, matching, page
from service.db.prepared import run
from service.db.tables import attempts, callbacks, deliveries, events, steps, tasks
from service.ids import PREFIXES, rfc3339, sequence_text
from service.strict_json import JSON, storable
from service.tasks.rows import ImageRow, TaskRow, select_tasks, stored_images, task_rows
from service.tasks.state import TERMINAL, State

Task = tuple[TaskRow, list[ImageRow]]  # with its stored images
FORMATS: Mapping[str, Callable[[Any], str]] = {
    "time": rfc3339,
    "last_seen_at": rfc3339,
    "sequence": sequence_text,
}
RAW_BYTES = 2048  # shown of a callback that could not be read
CALLBACKS = 100  # of a task, in an answer
COUNTED = 100  # tasks with a pair of metadata, to find the rarest pair
ATTEMPTS = 1000  # of deliveries, in a timeline
CLOCKS_MS = 60_000  # how far the upstream's clock may be from ours


def task_row(connection: Connection, task_id: str, owner: str | None) -> TaskRow | None:
    """A task by the service's id or the upstream's. `owner` None: any owner's."""
    statement = _one(ours=task_id.startswith(PREFIXES["task"]), owned=owner is not None)
    given = {"task_id": task_id, "owner": owner}
    return next(iter(task_rows(connection, statement, given)), None)


_BY_ID = select_tasks(tasks.c.id.in_(bindparam("ids", expanding=True)))


def tasks_by_id(connection: Connection, ids: Sequence[str]) -> dict[str, TaskRow]:
    return {row.id: row for row in task_rows(connection, _BY_ID, {"ids": list(ids)})}


@cache
def _one(*, ours: bool, owned: bool) -> Select[Any]:
    condition = tasks.c.id == bindparam("task_id")
    if not ours:
        condition = or_(condition, tasks.c.upstream_id == bindparam("task_id"))
    if not owned:
        return select_tasks(condition)
    # Not the plain column, or SQLite would read all tasks of that owner.
    return select_tasks(condition, func.coalesce(tasks.c.owner, "") == bindparam("owner"))


def task(connection: Connection, task_id: str, owner: str | None) -> Task | None:
    row = task_row(connection, task_id, owner)
    if row is None:
        return None
    return row, stored_images(connection, [row.id]).get(row.id, []) if has_images(row) else []


def has_images(row: TaskRow) -> bool:
    """Whether a query has confirmed results, so that the task may show images."""
    return row.settled_digest is not None or row.incomplete_since is not None


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
    statement = matching(select_tasks(), tasks, model=model_name)
    if state is not None:
        statement = statement.where(*_in_state(State(state), wanted.owner))
        wanted = wanted if State(state) in TERMINAL else replace(wanted, owner=None)
    if error is not None:
        statement = statement.where(HAS_ERROR, tasks.c.error["code"].as_string() == error)
    if prompt is not None:
        part = tasks.c.prompt.icontains(prompt[1], autoescape=True)
        statement = statement.where(tasks.c.owner == prompt[0], part)
    table, key = tasks, "id"
    if metadata:
        # The rarest pair leads: its index has the order of the list.
        pairs = list(metadata.items())
        if len(pairs) > 1:
            pairs.sort(key=lambda pair: _count_pair(connection, pair, wanted.owner))
        first, *others = pairs
        table, key = task_metadata, "task_id"
        statement = statement.where(task_metadata.c.task_id == tasks.c.id, *_is_pair(table, first))
        for pair in others:
            other = task_metadata.alias()
            names = ("created_at", "task_id")  # all of the index, so that one row is read
            same = [other.c[name] == task_metadata.c[name] for name in names]
            statement = statement.where(exists().where(*same, *_is_pair(other, pair)))
    rows = task_rows(connection, page(statement, table, wanted, key))
    images = stored_images(connection, [row.id for row in rows])
    return [(row, images.get(row.id, [])) for row in rows]


def _in_state(state: State, owner: str | None) -> list[ColumnElement[bool]]:
    """The conditions of a state, so that each is looked up by what is rare. Most tasks are
    completed, so a page of those needs no index. Live tasks are few, and a condition on the plain
    column `owner` would let SQLite read all tasks of that owner for them.
    """
    if state is State.COMPLETED:
        others = [each.value for each in TERMINAL - {state}]
        return [tasks.c.terminal_at.is_not(None), tasks.c.state.not_in(sorted(others))]
    if state in TERMINAL:
        return [ENDED_BADLY, tasks.c.state == state.value]
    conditions: list[ColumnElement[bool]] = [
        tasks.c.id.in_(select(tasks.c.id).where(tasks.c.state == state.value))
    ]
    return conditions if owner is None else [*conditions, func.coalesce(tasks.c.owner, "") == owner]


def _is_pair(table: FromClause, pair: tuple[str, str]) -> tuple[ColumnElement[bool], ...]:
    return table.c.key == pair[0], table.c.value == pair[1]


def _count_pair(connection: Connection, pair: tuple[str, str], owner: str | None) -> int:
    """How many of the owner's tasks, or of all, have this pair of metadata, up to a limit."""
    some = matching(select(task_metadata.c.task_id), task_metadata, owner=owner)
    some = some.where(*_is_pair(task_metadata, pair)).limit(COUNTED)
    count: int = connection.scalar(select(func.count()).select_from(some.subquery())) or 0
    return count


_KEY = tasks.c.owner, tasks.c.idempotency_key
# The columns one by one as well: for pairs alone, SQLite would read all tasks.
_SAME = and_(
    tasks.c.owner.in_(bindparam("owners", expanding=True)),
    tasks.c.idempotency_key.in_(bindparam("names", expanding=True)),
    tuple_(*_KEY).in_(bindparam("keys", expanding=True)),
)
_FOUND = select(tasks.c.id, *_KEY, tasks.c.idempotency_hash)
# Tasks by id, and by owner and idempotency key.
EARLIER = union_all(
    _FOUND.where(tasks.c.id.in_(bindparam("ids", expanding=True))), _FOUND.where(_SAME)
)


_BY_KEY = select(tasks.c.id, tasks.c.idempotency_hash).where(
    tasks.c.owner == bindparam("owner"), tasks.c.idempotency_key == bindparam("key")
)


def task_by_key(
    connection: Connection, owner: str, idempotency_key: str
) -> tuple[str, str | None] | None:
    rows = run(connection, _BY_KEY, {"owner": owner, "key": idempotency_key})
    return (rows[0][0], rows[0][1]) if rows else None


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
    return task_row(connection, task_id, None), first_callback(connection, task_id)


_FIRST = select(callbacks.c.body).where(
    callbacks.c.task_id == bindparam("task_id"), callbacks.c.first.is_(True)
)


def first_callback(connection: Connection, task_id: str) -> bytes | None:
    """The body of the first terminal callback of a task."""
    rows = run(connection, _FIRST, {"task_id": task_id})
    return rows[0][0] if rows else None


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
    kept = read(select(callbacks.c.id, callbacks.c.body).where(*unreadable))
    bodies = {row["id"]: row["body"] for row in kept}
    for line in lines:  # a callback that was judged meanwhile has no line
        if (body := bodies.get(line.get("callback_id"))) is not None:
            line["raw"] = storable(body[:RAW_BYTES].decode("utf-8", "replace"))
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
    tried = matching(attempted, deliveries, task_id=task_id, owner=delivery_owner)
    add("delivery.attempted", tried.order_by(attempts.c.time.desc()).limit(ATTEMPTS))
    lines.sort(key=lambda line: line["time"])
    return [
        {name: FORMATS[name](value) if name in FORMATS else value for name, value in line.items()}
        for line in lines
    ]


def callback_list(connection: Connection, task_id: str) -> list[RowMapping]:
    statement = select(callbacks).where(callbacks.c.task_id == task_id)
    order = callbacks.c.received_at, callbacks.c.id
    return list(connection.execute(statement.order_by(*order).limit(CALLBACKS)).mappings())


def callback_document(row: RowMapping, *, bodies: bool) -> JSON:
    """A callback as clients see it. `bodies`: with what the upstream sent, word for word."""
    body = storable(row["body"].decode("utf-8", "replace")) if bodies and row["body"] else None
    names = ("id", "verdict", "status", "count", "upstream_id")
    times = {name: rfc3339(row[name]) for name in ("received_at", "last_seen_at")}
    return {**{name: row[name] for name in names}, **times, "body": body}
