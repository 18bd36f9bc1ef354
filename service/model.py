"""The words of the product as types: tasks, their states and moves, reports, images, ids, times and
credits.

Pure: no clock, no I/O. Times are integers, milliseconds since 1970 UTC; credits are integers,
millionths of a credit.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import ROUND_HALF_EVEN, Decimal, InvalidOperation
from enum import StrEnum
from typing import Any

JSON = dict[str, Any]


class State(StrEnum):
    """Where a task is (contract section 3)."""

    QUEUED = "queued"
    SUBMITTING = "submitting"
    UNCERTAIN = "uncertain"
    SUBMITTED = "submitted"
    STORING = "storing"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class Status(StrEnum):
    """A task's status in the upstream's words, normalised: `canceled` and `failed` with
    `request_cancelled` are `cancelled`.
    """

    PENDING = "pending"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


TERMINAL = frozenset({State.COMPLETED, State.FAILED, State.CANCELLED, State.EXPIRED})

FINAL = frozenset({Status.COMPLETED, Status.FAILED, Status.CANCELLED})

MOVES: Mapping[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.SUBMITTING, State.FAILED, State.CANCELLED}),
    State.SUBMITTING: frozenset(
        {State.SUBMITTED, State.QUEUED, State.UNCERTAIN, State.FAILED, State.CANCELLED}
    ),
    State.UNCERTAIN: frozenset({State.SUBMITTED, State.FAILED, State.CANCELLED, State.SUBMITTING}),
    State.SUBMITTED: frozenset({State.STORING, State.FAILED, State.CANCELLED, State.EXPIRED}),
    State.STORING: frozenset({State.COMPLETED, State.FAILED, State.CANCELLED}),
    State.COMPLETED: frozenset(),
    State.FAILED: frozenset(),
    State.CANCELLED: frozenset(),
    State.EXPIRED: frozenset(),
}


def may_become(before: State, after: State) -> bool:
    """Whether the contract's table of states allows the move."""
    return after in MOVES[before]


def status_of(state: State, upstream_status: Status | None) -> Status:
    """What the upstream's own clients are shown for a state of ours."""
    if state is State.SUBMITTED:
        return Status.PROCESSING if upstream_status is Status.PROCESSING else Status.PENDING
    return {
        State.QUEUED: Status.PENDING,
        State.SUBMITTING: Status.PENDING,
        State.UNCERTAIN: Status.PENDING,
        State.STORING: Status.PROCESSING,
        State.COMPLETED: Status.COMPLETED,
        State.FAILED: Status.FAILED,
        State.CANCELLED: Status.CANCELLED,
        State.EXPIRED: Status.FAILED,
    }[state]


# --- ids and times
# --------------------------------------------------------------------------------------------------

PREFIXES = {
    "task": "task_",
    "image": "img_",
    "event": "evt_",
    "callback": "cb_",
    "endpoint": "ep_",
    "delivery": "dlv_",
    "replay": "rpl_",
    "attempt": "att_",
    "key": "key_",
    "request": "req_",
}


def make_id(kind: str, now: int, random: bytes) -> str:
    """An id: prefix and 26 lower-case base32 characters of 48 bits of `now` and 80 random bits.

    The time in front keeps neighbours in time neighbours in an index. `random` must be 10 bytes.
    """
    if len(random) != 10:
        raise ValueError("an id wants 10 random bytes")
    raw = (now % 2**48).to_bytes(6, "big") + random
    return PREFIXES[kind] + base64.b32encode(raw).decode("ascii").rstrip("=").lower()


def rfc3339(ms: int) -> str:
    """`2026-01-31T23:59:59.123Z`."""
    return (
        datetime.fromtimestamp(ms // 1000, UTC).strftime("%Y-%m-%dT%H:%M:%S") + f".{ms % 1000:03d}Z"
    )


def sequence_text(sequence: int) -> str:
    """A place in the outbox as readers see it: 20 digits, so that text order is number order."""
    return f"{sequence:020d}"


# --- credits
# --------------------------------------------------------------------------------------------------

MAX_CREDITS = 10**12  # whole credits; in millionths that fits a 64-bit integer


def millionths(value: object) -> int | None:
    """The upstream's decimal credits as an integer; None for what is no sensible number (absent,
    negative, text, NaN).
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        return None
    try:
        number = Decimal(str(value))
    except InvalidOperation:
        return None
    if not number.is_finite() or number < 0 or number > MAX_CREDITS:
        return None
    return int((number * 1_000_000).to_integral_value(ROUND_HALF_EVEN))


def credits_number(value: int | None) -> int | float | None:
    """Millionths as the JSON number the upstream would write: 1, 8.7, 0.05."""
    if value is None:
        return None
    return value // 1_000_000 if value % 1_000_000 == 0 else value / 1_000_000


# --- what the upstream says
# ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Report:
    """A task as the upstream describes it in a submit answer, a query or a callback, normalised.

    `status` None: a status nobody documented (not terminal). `error` has `code`, `message`, `type`,
    all text.
    """

    upstream_id: str | None = None
    status: Status | None = None
    results: tuple[str, ...] = ()
    error: JSON | None = None
    progress: int | None = None
    model: str | None = None
    created: int | None = None
    can_cancel: bool | None = None
    estimated_time: int | None = None
    billing_rule: str | None = None
    user_group: str | None = None
    credits_reserved: int | None = None
    credits_used: int | None = None

    @property
    def final(self) -> bool:
        return self.status in FINAL


def outcome_digest(
    status: Status | None, results: Sequence[str], upstream_id: str | None = None
) -> str:
    """What makes two callbacks say the same: status and results, for one that names a foreign
    upstream id that id too.
    """
    return hashlib.sha256(json.dumps([status, list(results), upstream_id]).encode()).hexdigest()


# --- a task as it is kept and shown
# ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Image:
    """One stored result."""

    id: str
    index: int
    blob: str
    media_type: str
    bytes: int
    sha256: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Task:
    """What is shown of a task to its owner and in events."""

    id: str
    owner: str
    created_at: int
    model: str
    state: State
    upstream: str
    upstream_id: str | None = None
    upstream_status: Status | None = None
    progress: int = 0
    can_cancel: bool = True
    estimated_time: int | None = None
    billing_rule: str | None = None
    user_group: str | None = None
    credits_reserved: int | None = None
    credits_used: int | None = None
    error: JSON | None = None
    metadata: JSON = field(default_factory=dict)
    request: JSON = field(default_factory=dict)
    prompt: str | None = None
    images: tuple[Image, ...] = ()

    @property
    def terminal(self) -> bool:
        return self.state in TERMINAL


EXTENSIONS = {
    "image/png": "png",
    "image/jpeg": "jpg",
    "image/webp": "webp",
    "image/gif": "gif",
    "image/avif": "avif",
}

# asked for by URL: visible ASCII, no dot in front, at most 200 characters
UPSTREAM_ID = r"[!-\-/-~][!-~]{0,199}"

BLOB = re.compile(r"task_[a-z2-7]{26}/[0-9]{1,9}-[0-9a-f]{64}\.[a-z]{1,8}", re.ASCII)


def blob_name(task_id: str, index: int, sha256: str, media_type: str) -> str:
    """What an image is kept as: the same after a crash, and nothing is shared between tasks."""
    return f"{task_id}/{index}-{sha256}.{EXTENSIONS[media_type]}"


@dataclass(frozen=True, slots=True)
class Links:
    """What links begin with: the service's address, and for images that of what serves the blob
    store under the same names.
    """

    base_url: str
    image_base_url: str | None = None

    def image(self, task_id: str, image: JSON) -> str:
        if self.image_base_url is None:
            return f"{self.base_url}/images/{image['id']}"
        blob = blob_name(task_id, image["index"], image["sha256"], image["media_type"])
        return f"{self.image_base_url}/{blob}"


def task_document(task: Task) -> JSON:
    """The task of contract section 3 without its prompt and without links: `results` is empty,
    images have no `url`.

    This is what an event keeps; `with_links` completes it for a reader, so that links follow the
    settings.
    """
    return {
        "id": task.id,
        "object": "image.generation.task",
        "created": task.created_at // 1000,
        "model": task.model,
        "type": "image",
        "status": status_of(task.state, task.upstream_status).value,
        "progress": 100 if task.state is State.COMPLETED else task.progress,
        "task_info": {
            "can_cancel": task.can_cancel and not task.terminal,
            "estimated_time": task.estimated_time,
        },
        "usage": {
            "billing_rule": task.billing_rule,
            "credits_reserved": credits_number(task.credits_reserved),
            "credits_used": credits_number(task.credits_used),
            "user_group": task.user_group,
        },
        "results": [],
        "error": task.error,
        "state": task.state.value,
        "upstream": task.upstream,
        "upstream_id": task.upstream_id,
        "metadata": task.metadata,
        "request": task.request,
        "images": [
            {
                "id": image.id,
                "index": image.index,
                "url": None,
                "media_type": image.media_type,
                "bytes": image.bytes,
                "sha256": image.sha256,
                "width": image.width,
                "height": image.height,
            }
            for image in task.images
        ],
    }


def with_links(document: JSON, links: Links) -> JSON:
    """A task's document with the links of its images, and with `results` when it is completed."""
    images = [{**image, "url": links.image(document["id"], image)} for image in document["images"]]
    results = [image["url"] for image in images] if document["state"] == State.COMPLETED else []
    return {**document, "images": images, "results": results}


def event_document(
    *,
    event_id: str,
    sequence: int,
    type: str,
    subject: str | None,
    time: int,
    data: JSON,
    links: Links,
) -> JSON:
    """An event of contract section 3, a structured CloudEvent 1.0; `data` as the outbox keeps it.

    One of no task is about the endpoint or the row that it names: CloudEvents' libraries refuse a
    subject that is null.
    """
    return {
        "specversion": "1.0",
        "id": event_id,
        "source": links.base_url,
        "type": type,
        "subject": subject or data.get("endpoint_id") or data["key"],
        "time": rfc3339(time),
        "datacontenttype": "application/json",
        "sequence": sequence_text(sequence),
        "data": with_links(data, links) if "images" in data else data,
    }


def type_matches(pattern: str, type: str) -> bool:
    """Whether an endpoint's pattern (`*`, `image.task.*`, or a type itself) takes an event type."""
    if pattern in ("*", type):
        return True
    return pattern.endswith(".*") and type.startswith(pattern[:-1])
