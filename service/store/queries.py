"""What is read: functions of a connection. Every one that serves a client takes the owner, None for
all (admin).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, and_, func, or_, select

from service import model
from service.store.records import Row, counts, image_record, task_record
from service.store.tables import (
    QUEUES,
    ZERO,
    api_keys,
    attempts,
    callbacks,
    counters,
    deliveries,
    endpoints,
    events,
    images,
    owners,
    sinks,
    steps,
    tasks,
)

After = tuple[int, str] | None  # where a list goes on: time and id of the last one seen
CLOCKS_MS = 60_000  # so far the upstream's clock and ours may be apart


def _images(connection: Connection, task_ids: Sequence[str]) -> dict[str, list[model.Image]]:
    statement = (
        select(images).where(images.c.task_id.in_(task_ids), counts).order_by(images.c.position)
    )
    found: dict[str, list[model.Image]] = {}
    for row in connection.execute(statement).mappings():
        found.setdefault(row["task_id"], []).append(image_record(row))
    return found


def _page(statement: Select[Any], table: Any, after: After, limit: int) -> Select[Any]:
    """Newest first, from `after` on: by key, so that a page costs the same however far down it
    is.
    """
    created, key = table.c.created_at, table.c.id
    if after is not None:
        statement = statement.where(
            or_(created < after[0], and_(created == after[0], key < after[1]))
        )
    return statement.order_by(created.desc(), key.desc()).limit(limit)


def task_row(connection: Connection, task_id: str, owner: str | None) -> Row | None:
    """A task's row by our id or the upstream's."""
    column = tasks.c.id if task_id.startswith(model.PREFIXES["task"]) else tasks.c.upstream_id
    statement = select(tasks).where(column == task_id)
    if owner is not None:
        statement = statement.where(tasks.c.owner == owner)
    return connection.execute(statement).mappings().first()


def task(connection: Connection, task_id: str, owner: str | None) -> tuple[model.Task, Row] | None:
    """A task as it is shown, and its row."""
    row = task_row(connection, task_id, owner)
    if row is None:
        return None
    return task_record(row, _images(connection, [row["id"]]).get(row["id"], ())), row


def may_be_anothers(
    connection: Connection, upstream: str, upstream_id: str, owner: str, created: int | None
) -> bool:
    """Whether another owner's task has that id upstream, or may have: its own is unknown, and it
    was on its way when that one was made.

    `created`: when that was, in milliseconds by the upstream's clock; None: nobody knows.
    """
    others = select(tasks.c.id).where(tasks.c.upstream == upstream, tasks.c.owner != owner)
    sent = or_(tasks.c.state != model.State.QUEUED.value, tasks.c.submit_outcomes > 0)
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
) -> list[model.Task]:
    statement = select(tasks)
    if owner is not None:
        statement = statement.where(tasks.c.owner == owner)
    if state is not None:
        statement = statement.where(tasks.c.state == state)
    if model_name is not None:
        statement = statement.where(tasks.c.model == model_name)
    for key, value in (metadata or {}).items():
        statement = statement.where(tasks.c.metadata[key].as_string() == value)
    rows = list(connection.execute(_page(statement, tasks, after, limit)).mappings())
    found = _images(connection, [row["id"] for row in rows])
    return [task_record(row, found.get(row["id"], ())) for row in rows]


def timeline(connection: Connection, task_id: str, delivery_owner: str | None) -> list[model.JSON]:
    """Every step of a task in the order of time, named as the log names it; deliveries of
    `delivery_owner` alone.
    """
    lines: list[tuple[int, int, model.JSON]] = []

    def add(time: int, step: str, **detail: Any) -> None:
        lines.append((time, len(lines), {"time": model.rfc3339(time), "step": step, **detail}))

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
            last_seen_at=model.rfc3339(row.last_seen_at),
        )
    for row in connection.execute(
        select(events).where(events.c.task_id == task_id, events.c.type.startswith("image.task."))
    ):
        add(
            row.time,
            "event.emitted",
            event_id=row.id,
            type=row.type,
            sequence=model.sequence_text(row.sequence),
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


# --- work
# --------------------------------------------------------------------------------------------------


def settling(connection: Connection, task_id: str) -> tuple[Row, Row | None] | None:
    """A task's row and its first terminal callback, for whoever settles it."""
    row = connection.execute(select(tasks).where(tasks.c.id == task_id)).mappings().first()
    if row is None:
        return None
    first = select(callbacks).where(callbacks.c.task_id == task_id, callbacks.c.first.is_(True))
    return row, connection.execute(first).mappings().first()


def download(connection: Connection, image_id: str) -> Row | None:
    """An image to fetch, with the time its task was asked for."""
    statement = select(images, tasks.c.upstream_id, tasks.c.state.label("task_state")).join(
        tasks, tasks.c.id == images.c.task_id
    )
    return connection.execute(statement.where(images.c.id == image_id)).mappings().first()


@dataclass(frozen=True, slots=True)
class Parcel:
    """A delivery with all that an attempt needs; `endpoint` None with `callback_url` None: its
    endpoint is gone.
    """

    delivery: Row
    event: Row | None
    endpoint: Row | None
    callback_url: str | None
    callback_secret: bytes | None


def parcel(connection: Connection, delivery_id: str) -> Parcel | None:
    row = (
        connection.execute(select(deliveries).where(deliveries.c.id == delivery_id))
        .mappings()
        .first()
    )
    if row is None:
        return None
    event = (
        connection.execute(select(events).where(events.c.id == row["event_id"])).mappings().first()
    )
    if row["endpoint_id"] is not None:
        endpoint = (
            connection.execute(select(endpoints).where(endpoints.c.id == row["endpoint_id"]))
            .mappings()
            .first()
        )
        return Parcel(row, event, endpoint, None, None)
    url = connection.execute(
        select(tasks.c.callback_url).where(tasks.c.id == row["task_id"])
    ).scalar()
    return Parcel(row, event, None, url, callback_secret(connection, row["owner"]))


# --- events, endpoints, deliveries
# -----------------------------------------------------------------------------------


def event_list(
    connection: Connection,
    owner: str | None,
    after: int,
    limit: int,
    types: Sequence[str] = (),
    task_id: str | None = None,
) -> tuple[list[Row], int, int]:
    """Events after a place, the last place that was examined, and the last one whose event is no
    longer kept (0: none).

    The latter is read twice: before, so that a reader of an empty outbox gets past it, and after,
    so that nothing goes unnoticed meanwhile.
    """
    last = outbox_end(connection)
    statement = select(events).where(events.c.sequence > after, events.c.sequence <= last)
    if owner is not None:
        statement = statement.where(events.c.owner == owner)
    if task_id is not None:
        statement = statement.where(events.c.task_id == task_id)
    if types:
        statement = statement.where(type_conditions(types))
    rows: list[Row] = list(
        connection.execute(statement.order_by(events.c.sequence).limit(limit)).mappings()
    )
    return (
        rows,
        rows[-1]["sequence"] if len(rows) == limit else max(last, after),
        _forgotten(connection),
    )


def outbox_begin(connection: Connection) -> int:
    """The place of the oldest event that is kept; one that none has yet if there is none."""
    oldest = connection.execute(select(func.min(events.c.sequence))).scalar()
    return outbox_end(connection) + 1 if oldest is None else oldest


def outbox_end(connection: Connection) -> int:
    """The last place that readers have been able to see."""
    return max(
        _forgotten(connection),
        connection.execute(select(func.max(events.c.sequence))).scalar() or 0,
    )


def _forgotten(connection: Connection) -> int:
    value: int = connection.execute(
        select(counters.c.value).where(counters.c.name == "forgotten")
    ).scalar_one()
    return value


def type_conditions(patterns: Sequence[str]) -> ColumnElement[bool]:
    return or_(*(_type_condition(pattern) for pattern in patterns))


def _type_condition(pattern: str) -> Any:
    if pattern == "*":
        return events.c.sequence > 0
    if pattern.endswith(".*"):
        return events.c.type.startswith(pattern[:-1], autoescape=True)
    return events.c.type == pattern


def endpoint_row(connection: Connection, endpoint_id: str, owner: str | None) -> Row | None:
    statement = select(endpoints).where(endpoints.c.id == endpoint_id)
    if owner is not None:
        statement = statement.where(endpoints.c.owner == owner)
    return connection.execute(statement).mappings().first()


def endpoint_list(
    connection: Connection, owner: str | None, limit: int, after: After = None
) -> list[Row]:
    statement = select(endpoints)
    if owner is not None:
        statement = statement.where(endpoints.c.owner == owner)
    return list(connection.execute(_page(statement, endpoints, after, limit)).mappings())


def delivery_list(
    connection: Connection,
    owner: str | None,
    limit: int,
    after: After = None,
    where: Mapping[str, str] | None = None,
) -> list[tuple[Row, list[Row]]]:
    """Deliveries with their attempts; `where` names columns (`id`, `endpoint_id`, `event_id`,
    `task_id`, `state`).
    """
    statement = select(deliveries)
    if owner is not None:
        statement = statement.where(deliveries.c.owner == owner)
    for name, value in (where or {}).items():
        statement = statement.where(deliveries.c[name] == value)
    rows = list(connection.execute(_page(statement, deliveries, after, limit)).mappings())
    made: dict[str, list[Row]] = {row["id"]: [] for row in rows}
    tried = (
        select(attempts)
        .where(attempts.c.delivery_id.in_(made))
        .order_by(attempts.c.time, attempts.c.id)
    )
    for attempt in connection.execute(tried).mappings():
        made[attempt["delivery_id"]].append(attempt)
    return [(row, made[row["id"]]) for row in rows]


def image_row(connection: Connection, image_id: str) -> Row | None:
    """An image that is shown, or that was: `erased`."""
    shown = or_(counts, images.c.state == "erased")
    return (
        connection.execute(select(images).where(images.c.id == image_id, shown)).mappings().first()
    )


def suspects(connection: Connection) -> bool:
    """Whether a row outlived a death of its process and waits to be worked on."""
    for queue in QUEUES.values():
        statement = (
            select(queue.table.c.id)
            .where(queue.column("deaths") > ZERO, queue.column("due_at").is_not(None))
            .limit(1)
        )
        if connection.execute(statement).first() is not None:
            return True
    return False


def orphans(connection: Connection, blobs: Sequence[str]) -> list[str]:
    """Which of these blobs no row names, of known tasks that have ended and save nothing any
    more.
    """
    task_ids = {name.partition("/")[0] for name in blobs}
    terminal = [state.value for state in model.TERMINAL]
    over = set(
        connection.execute(
            select(tasks.c.id).where(tasks.c.id.in_(task_ids), tasks.c.state.in_(terminal))
        ).scalars()
    )
    named = set[str]()
    for row in connection.execute(
        select(images.c.task_id, images.c.state, images.c.blob).where(
            images.c.task_id.in_(task_ids)
        )
    ):
        named.add(row.blob)
        if row.state == "pending":
            over.discard(row.task_id)
    return [name for name in blobs if name.partition("/")[0] in over and name not in named]


# --- keys and figures
# ------------------------------------------------------------------------------------------------


def key_row(connection: Connection, hash: str) -> Row | None:
    return (
        connection.execute(
            select(api_keys).where(api_keys.c.hash == hash, api_keys.c.revoked_at.is_(None))
        )
        .mappings()
        .first()
    )


def callback_secret(connection: Connection, owner: str) -> bytes | None:
    """What an owner's tasks' own callbacks are signed with, encrypted; None before the owner's
    first key.
    """
    return connection.execute(
        select(owners.c.callback_secret).where(owners.c.name == owner)
    ).scalar()


def secrets(connection: Connection, table: str, after: str, limit: int) -> list[tuple[str, bytes]]:
    """Encrypted secrets of `endpoints` (by id) or `owners` (by name), from the one after
    `after`.
    """
    key, secret = {
        "endpoints": (endpoints.c.id, endpoints.c.secret),
        "owners": (owners.c.name, owners.c.callback_secret),
    }[table]
    return [
        (row[0], row[1])
        for row in connection.execute(
            select(key, secret).where(key > after).order_by(key).limit(limit)
        )
    ]


def needs_its_key(connection: Connection) -> bool:
    """Whether there is anything that was encrypted, or a callback URL that was signed."""
    return any(
        connection.execute(select(column).limit(1)).first()
        for column in (owners.c.name, endpoints.c.id, tasks.c.id)
    )


def key_list(connection: Connection) -> list[Row]:
    return list(
        connection.execute(
            select(api_keys).order_by(api_keys.c.created_at, api_keys.c.id)
        ).mappings()
    )


def figures(connection: Connection) -> dict[str, Any]:
    """What the gauges show, counted in the store: the same in every process."""
    states = {
        row.state: row[1]
        for row in connection.execute(select(tasks.c.state, func.count()).group_by(tasks.c.state))
    }
    depth = {}
    for stage, queue in QUEUES.items():
        statement = (
            select(func.count()).select_from(queue.table).where(queue.column("due_at").is_not(None))
        )
        depth[stage] = connection.execute(
            statement if queue.where is None else statement.where(queue.where)
        ).scalar_one()
    unsettled = select(func.min(tasks.c.created_at)).where(
        tasks.c.state.not_in([state.value for state in model.TERMINAL])
    )
    return {
        "tasks": {state.value: states.get(state.value, 0) for state in model.State},
        "queue_depth": depth,
        "oldest_unsettled": connection.execute(unsettled).scalar(),
        "oldest_due_delivery": connection.execute(
            select(func.min(deliveries.c.due_at)).where(deliveries.c.state == "pending")
        ).scalar(),
        "first_link_dies": connection.execute(
            select(func.min(images.c.link_dies_at)).where(images.c.state == "pending")
        ).scalar(),
        "dead_letters": connection.execute(
            select(func.count()).select_from(deliveries).where(deliveries.c.state == "dead")
        ).scalar_one(),
        "credits_reserved": connection.execute(select(func.sum(tasks.c.credits_reserved))).scalar()
        or 0,
        "credits_used": connection.execute(select(func.sum(tasks.c.credits_used))).scalar() or 0,
    }


def sinks_behind(
    connection: Connection, wanted: Mapping[str, Sequence[str]]
) -> dict[str, int | None]:
    """Of each sink by name, with the types that it gets: the time of its oldest event that is not
    published; None: it has them all.
    """
    behind: dict[str, int | None] = dict.fromkeys(wanted)
    for row in (
        connection.execute(select(sinks.c.name, sinks.c.position).where(sinks.c.name.in_(wanted)))
        if wanted
        else ()
    ):
        statement = select(events.c.time).where(events.c.sequence > row.position)
        if wanted[row.name]:
            statement = statement.where(type_conditions(wanted[row.name]))
        behind[row.name] = connection.execute(
            statement.order_by(events.c.sequence).limit(1)
        ).scalar()
    return behind
