"""Queries about tasks."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, or_, select

from service.db.paging import After, Row
from service.db.paging import page as _page
from service.db.tables import attempts, callbacks, deliveries, events, steps, tasks
from service.ids import PREFIXES, rfc3339, sequence_text
from service.strict_json import JSON
from service.tasks.rows import ImageRow, TaskRow, select_tasks, stored_images, task_rows
from service.tasks.state import State

CLOCKS_MS = 60_000  # so far the upstream's clock and ours may be apart


def task_row(connection: Connection, task_id: str, owner: str | None) -> TaskRow | None:
    """A task by the service's id or the upstream's. `owner` None: any owner's."""
    column = tasks.c.id if task_id.startswith(PREFIXES["task"]) else tasks.c.upstream_id
    statement = select_tasks(column == task_id)
    if owner is not None:
        statement = statement.where(tasks.c.owner == owner)
    return next(iter(task_rows(connection, statement)), None)


def task(
    connection: Connection, task_id: str, owner: str | None
) -> tuple[TaskRow, list[ImageRow]] | None:
    """A task and its stored images."""
    row = task_row(connection, task_id, owner)
    return None if row is None else (row, stored_images(connection, [row.id]).get(row.id, []))


def may_be_anothers(
    connection: Connection, upstream: str, upstream_id: str, owner: str, created: int | None
) -> bool:
    """Whether another owner's task has that id upstream, or may have: its own is unknown, and it
    was on its way when that one was made.

    `created`: when that was, in milliseconds by the upstream's clock; None: nobody knows.
    """
    others = select(tasks.c.id).where(tasks.c.upstream == upstream, tasks.c.owner != owner)
    sent = or_(tasks.c.state != State.QUEUED.value, tasks.c.submit_outcomes > 0)
    unknown = others.where(tasks.c.upstream_id.is_(None), tasks.c.refusal_status.is_(None), sent)
    if created is not None:
        there = or_(tasks.c.terminal_at.is_(None), tasks.c.terminal_at >= created - CLOCKS_MS)
        unknown = unknown.where(tasks.c.created_at <= created + CLOCKS_MS, there)
    either = or_(others.where(tasks.c.upstream_id == upstream_id).exists(), unknown.exists())
    return bool(connection.execute(select(either)).scalar())


def task_by_key(connection: Connection, owner: str, idempotency_key: str) -> Row | None:
    statement = select(tasks.c.id, tasks.c.idempotency_hash).where(
        tasks.c.owner == owner, tasks.c.idempotency_key == idempotency_key
    )
    return connection.execute(statement).mappings().first()


def task_list(
    connection: Connection,
    owner: str | None,
    limit: int,
    after: After = None,
    state: str | None = None,
    model_name: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> list[tuple[TaskRow, list[ImageRow]]]:
    """Tasks with their stored images, newest first."""
    statement = select_tasks()
    if owner is not None:
        statement = statement.where(tasks.c.owner == owner)
    if state is not None:
        statement = statement.where(tasks.c.state == state)
    if model_name is not None:
        statement = statement.where(tasks.c.model == model_name)
    for key, value in (metadata or {}).items():
        statement = statement.where(tasks.c.metadata[key].as_string() == value)
    rows = task_rows(connection, _page(statement, tasks, after, limit))
    images = stored_images(connection, [row.id for row in rows])
    return [(row, images.get(row.id, [])) for row in rows]


def timeline(connection: Connection, task_id: str, delivery_owner: str | None) -> list[JSON]:
    """Every step of a task in the order of time, named as the log names it; deliveries of
    `delivery_owner` alone.
    """
    lines: list[tuple[int, int, JSON]] = []

    def add(time: int, step: str, **detail: Any) -> None:
        lines.append((time, len(lines), {"time": rfc3339(time), "step": step, **detail}))

    for row in connection.execute(
        select(steps).where(steps.c.task_id == task_id).order_by(steps.c.id)
    ):
        add(row.time, row.step, **row.detail)
    for erased_at in connection.execute(
        select(tasks.c.erased_at).where(tasks.c.id == task_id, tasks.c.erased_at.is_not(None))
    ).scalars():
        add(erased_at, "task.erased")
    for row in connection.execute(select(callbacks).where(callbacks.c.task_id == task_id)):
        add(
            row.received_at,
            "callback.received",
            callback_id=row.id,
            verdict=row.verdict,
            status=row.status,
            count=row.count,
            last_seen_at=rfc3339(row.last_seen_at),
        )
    for row in connection.execute(
        select(events).where(events.c.task_id == task_id, events.c.type.startswith("image.task."))
    ):
        add(
            row.time,
            "event.emitted",
            event_id=row.id,
            type=row.type,
            sequence=sequence_text(row.sequence),
        )
    statement = (
        select(attempts, deliveries.c.endpoint_id, deliveries.c.event_id)
        .join(deliveries, deliveries.c.id == attempts.c.delivery_id)
        .where(deliveries.c.task_id == task_id)
    )
    if delivery_owner is not None:
        statement = statement.where(deliveries.c.owner == delivery_owner)
    for row in connection.execute(statement):
        add(
            row.time,
            "delivery.attempted",
            delivery_id=row.delivery_id,
            endpoint_id=row.endpoint_id,
            event_id=row.event_id,
            status=row.status,
            duration_ms=row.duration_ms,
            error=row.error,
        )
    return [line for _, _, line in sorted(lines, key=lambda line: line[:2])]


def settling(connection: Connection, task_id: str) -> tuple[TaskRow, bytes | None] | None:
    """A task and the body of its first terminal callback."""
    row = task_row(connection, task_id, None)
    first = select(callbacks.c.body).where(
        callbacks.c.task_id == task_id, callbacks.c.first.is_(True)
    )
    return None if row is None else (row, connection.execute(first).scalar())
