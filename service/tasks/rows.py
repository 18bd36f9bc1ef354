"""Rows of the tables `tasks` and `images` as typed, mutable records."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from sqlalchemy import Connection, Select, and_, bindparam, select

from service.db.prepared import run
from service.db.tables import images as image_table
from service.db.tables import tasks as task_table
from service.ops.tracing import Origin
from service.strict_json import JSON
from service.tasks.state import TERMINAL, State
from service.upstreams.base import Status


@dataclass(slots=True)
class TaskRow:
    """A row of `tasks`, one attribute per column. `db.tables` says what each column means."""

    id: str
    owner: str
    upstream: str
    model: str
    state: State
    created_at: int
    upstream_id: str | None = None
    upstream_id_from: str | None = None
    upstream_status: Status | None = None
    settled_digest: str | None = None
    submitted_at: int | None = None
    called_back_at: int | None = None
    terminal_at: int | None = None
    prompt: str | None = None
    request: JSON = field(default_factory=dict)
    warnings: list[str] | None = None
    metadata: JSON = field(default_factory=dict)
    callback_url: str | None = None
    idempotency_key: str | None = None
    idempotency_hash: str | None = None
    progress: int = 0
    can_cancel: bool = True
    estimated_time: int | None = None
    billing_rule: str | None = None
    user_group: str | None = None
    credits_reserved: int | None = None
    credits_used: int | None = None
    credits_refunded: int | None = None
    credits_estimated: int | None = None
    images_requested: int | None = None
    error: JSON | None = None
    refusal_status: int | None = None
    submit_outcomes: int = 0
    doubted_at: int | None = None
    resubmit: bool = False
    settle_requests: int = 0
    incomplete_since: int | None = None
    inputs: list[JSON] | None = None
    submit_turn: int = 0
    erased_at: int | None = None
    request_id: str | None = None
    traceparent: str | None = None
    submit_due_at: int | None = None
    submit_attempts: int = 0
    submit_lease_until: int | None = None
    submit_lease_owner: str | None = None
    submit_fence: int = 0
    submit_deaths: int = 0
    submit_faults: int = 0
    settle_due_at: int | None = None
    settle_attempts: int = 0
    settle_lease_until: int | None = None
    settle_lease_owner: str | None = None
    settle_fence: int = 0
    settle_deaths: int = 0
    settle_faults: int = 0
    body: bytes = b""  # of a new row. It may be long, so only the submission reads it

    def __post_init__(self) -> None:
        self.state = State(self.state)
        if self.upstream_status is not None:
            self.upstream_status = Status(self.upstream_status)

    @property
    def origin(self) -> Origin:
        return Origin(self.upstream_id, self.request_id, self.traceparent)

    @property
    def terminal(self) -> bool:
        return self.state in TERMINAL


@dataclass(slots=True)
class ImageRow:
    """A row of `images`, one attribute per column. `db.tables` says what each column means."""

    id: str
    task_id: str
    owner: str
    position: int
    state: str  # pending | stored | lost | erased
    confirmed: bool
    source_url: str
    link_dies_at: int
    blob: str | None = None
    media_type: str | None = None
    bytes: int | None = None
    sha256: str | None = None
    width: int | None = None
    height: int | None = None
    stored_at: int | None = None
    error: str | None = None
    wrong_sha256: str | None = None
    wrong_count: int = 0
    wrong_since: int | None = None
    refused_host: str | None = None
    stale_since: int | None = None
    stale_count: int = 0
    at_risk_at: int | None = None
    due_at: int | None = None
    attempts: int = 0
    lease_until: int | None = None
    lease_owner: str | None = None
    fence: int = 0
    deaths: int = 0
    faults: int = 0


TASK_COLUMNS = [task_table.c[field.name] for field in fields(TaskRow) if field.name != "body"]
IMAGE_COLUMNS = [image_table.c[column.name] for column in fields(ImageRow)]

# An image that only a callback named is not shown until a query confirms it.
counts = and_(image_table.c.state == "stored", image_table.c.confirmed)


def select_tasks(*where: Any) -> Select[Any]:
    return select(*TASK_COLUMNS).where(*where)


def select_images(*where: Any) -> Select[Any]:
    return select(*IMAGE_COLUMNS).where(*where)


def task_rows(
    connection: Connection, statement: Select[Any], given: Mapping[str, Any] | None = None
) -> list[TaskRow]:
    """`given`: the values that a statement binds which is made once."""
    rows = connection.execute(statement) if given is None else run(connection, statement, given)
    return [TaskRow(*row) for row in rows]


def image_rows(
    connection: Connection, statement: Select[Any], given: Mapping[str, Any] | None = None
) -> list[ImageRow]:
    rows = connection.execute(statement) if given is None else run(connection, statement, given)
    return [ImageRow(*row) for row in rows]


_SHOWN = select_images(
    image_table.c.task_id.in_(bindparam("ids", expanding=True)), counts
).order_by(image_table.c.position)


def stored_images(connection: Connection, task_ids: Iterable[str]) -> dict[str, list[ImageRow]]:
    """The images that tasks show, by task, in the upstream's order."""
    images: dict[str, list[ImageRow]] = {}
    for image in image_rows(connection, _SHOWN, {"ids": list(task_ids)}):
        images.setdefault(image.task_id, []).append(image)
    return images
