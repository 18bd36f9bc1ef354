"""The image APIs behind the service: what each must be able to do, and what can come of it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from service.net import Response
from service.strict_json import JSON


class Status(StrEnum):
    """A task's status in the upstream's words, normalised: `canceled` and `failed` with
    `request_cancelled` are `cancelled`.
    """

    PENDING = "pending"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


FINAL = frozenset({Status.COMPLETED, Status.FAILED, Status.CANCELLED})


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


@dataclass(frozen=True, slots=True)
class Accepted:
    """The upstream has the task under `report.upstream_id`, which is never None here; `report` may
    be final already.
    """

    report: Report


@dataclass(frozen=True, slots=True)
class NotCreated:
    """Proof that nothing was created: it may be sent again. `retry_after` in seconds.

    `account`: our key or account is the cause; `throttled`: that there were too many calls is.
    """

    reason: str
    retry_after: float | None = None
    account: bool = False
    throttled: bool = False


@dataclass(frozen=True, slots=True)
class Refused:
    """The request itself was refused for good; `error` has `code`, `message`, `type`, all text, and
    `param`, text or None.
    """

    status: int
    error: JSON


@dataclass(frozen=True, slots=True)
class Uncertain:
    """Nothing is proved: the task may exist and may have been charged."""

    reason: str


@dataclass(frozen=True, slots=True)
class Found:
    """The upstream's word on the task."""

    report: Report


@dataclass(frozen=True, slots=True)
class NotFound:
    """The upstream does not know the id, now."""


@dataclass(frozen=True, slots=True)
class NoAnswer:
    """Nothing was learned; `retry_after` in seconds; `throttled`: because there were too many
    calls.
    """

    reason: str
    retry_after: float | None = None
    throttled: bool = False


SubmitOutcome = Accepted | NotCreated | Refused | Uncertain
QueryOutcome = Found | NotFound | NoAnswer


def throttled(answer: SubmitOutcome | QueryOutcome | Response) -> bool | None:
    """Whether the upstream found these too many calls. None: it did not say."""
    match answer:
        case NotCreated() | NoAnswer():
            return answer.throttled or None
        case Response():
            return answer.status == 429 or (None if answer.status >= 500 else False)
        case Uncertain():
            return None
    return False


@dataclass(frozen=True, slots=True)
class Call:
    """One request to an upstream, for log and metrics: `status` None if no answer came; `duration`
    in seconds.
    """

    kind: str
    status: int | None
    outcome: str
    duration: float
    request_id: str | None = None


class Upstream(Protocol):
    """Safe for many calls at once. `submit` and `query` raise nothing that a network can cause: it
    is in their outcome.
    """

    name: str
    answering: (
        bool  # False: the last call brought no answer, a 5xx or the word that our key is not taken
    )

    async def submit(self, body: bytes, idempotency_key: str) -> SubmitOutcome:
        """Sends the body byte for byte, once."""

    async def query(self, upstream_id: str) -> QueryOutcome:
        """What the upstream says of the task now."""

    async def passthrough(self, method: str, path: str) -> Response:
        """The upstream's own answer to a path that begins with `/`. EgressError: there was none."""

    def read_callback(self, body: bytes) -> Report | None:
        """What a callback says; None: unreadable. Never raises."""
