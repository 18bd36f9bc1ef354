"""An image API behind the service: its operations and their outcomes.

The outcomes are the same for every upstream and are used down to the store. docs/api.md says which
response of an upstream proves which outcome.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Protocol

from service.links import usable
from service.net.responses import Response
from service.strict_json import JSON


class Status(StrEnum):
    """The upstream's status of a task, normalised: `canceled`, and `failed` with
    `request_cancelled`, are `cancelled`.
    """

    PENDING = "pending"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


FINAL = frozenset({Status.COMPLETED, Status.FAILED, Status.CANCELLED})


@dataclass(frozen=True, slots=True)
class Report:
    """A task as the upstream describes it in a response or a callback, normalised.

    `status` None is an undocumented status, which is not final. `error` has the texts `code`,
    `message` and `type`. Credits are millionths.
    """

    upstream_id: str | None = None
    status: Status | None = None
    results: tuple[str, ...] = ()
    error: JSON | None = None
    progress: int | None = None
    can_cancel: bool | None = None
    estimated_time: int | None = None
    billing_rule: str | None = None
    user_group: str | None = None
    credits_reserved: int | None = None
    credits_used: int | None = None
    credits_refunded: int | None = None

    @property
    def final(self) -> bool:
        return self.status in FINAL

    @property
    def names_cost(self) -> bool:
        return self.credits_used is not None or self.credits_refunded is not None

    def without_credits(self) -> "Report":
        return replace(self, credits_reserved=None, credits_used=None, credits_refunded=None)

    def with_credits_of(self, other: "Report") -> "Report":
        """The report with the cost of the other one, if it names none itself and both say the same
        of the task.
        """
        if self.names_cost or (self.status, self.results) != (other.status, other.results):
            return self
        return replace(
            self, credits_used=other.credits_used, credits_refunded=other.credits_refunded
        )

    @property
    def incomplete(self) -> bool:
        """Whether the task is completed, and a result has no link, or no link that can be used."""
        return self.status is Status.COMPLETED and not (
            self.results and all(map(usable, self.results))
        )


def outcome_digest(
    status: Status | None, results: Sequence[str], upstream_id: str | None = None
) -> str:
    """Equal for callbacks that agree in status and results. A callback that names another task's
    upstream id adds that id.
    """
    return hashlib.sha256(json.dumps([status, list(results), upstream_id]).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Accepted:
    """The upstream has the task under `report.upstream_id`, which is never None here. The report
    may be final already.
    """

    report: Report


@dataclass(frozen=True, slots=True)
class Finished:
    """The upstream answered with the results and without an id. `report` is completed."""

    report: Report


@dataclass(frozen=True, slots=True)
class NotCreated:
    """Proof that nothing was created, so the task may be sent again after `retry_after` seconds.

    `account`: the upstream refused the service's key or account. `throttled`: too many calls.
    """

    reason: str
    retry_after: float | None = None
    account: bool = False
    throttled: bool = False


@dataclass(frozen=True, slots=True)
class Refused:
    """The upstream refused the request for good. `error` has the texts `code`, `message` and
    `type`, and `param`, which may be None.
    """

    status: int
    error: JSON


@dataclass(frozen=True, slots=True)
class Uncertain:
    """Unproved: the upstream may have created and charged the task. `raw`: the beginning
    of a response that could not be read.
    """

    reason: str
    raw: bytes = field(default=b"", compare=False)


@dataclass(frozen=True, slots=True)
class Found:
    """The upstream's report on the task that was queried. `source` is `callback` if that was
    believed without a query. `raw`: the beginning of a response without a documented status.
    """

    report: Report
    source: str = "query"
    raw: bytes = field(default=b"", compare=False)


@dataclass(frozen=True, slots=True)
class NotFound:
    """The upstream does not know the id, now."""


@dataclass(frozen=True, slots=True)
class NoAnswer:
    """The query told nothing. `retry_after` is in seconds. `throttled`: too many calls. `raw`: the
    beginning of a response that could not be read.
    """

    reason: str
    retry_after: float | None = None
    throttled: bool = False
    raw: bytes = field(default=b"", compare=False)


SubmitOutcome = Accepted | Finished | NotCreated | Refused | Uncertain
QueryOutcome = Found | NotFound | NoAnswer
OUTCOME_NAMES: Mapping[type[object], str] = {  # as log and metrics name them
    Accepted: "accepted",
    Finished: "finished",
    NotCreated: "not_created",
    Refused: "refused",
    Uncertain: "uncertain",
    Found: "found",
    bytes: "found",
    NotFound: "not_found",
    Response: "answered",
}


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
class UpstreamCall:
    """One request to an upstream, for log and metrics. `status` None means that no response came.
    `duration` is in seconds.
    """

    kind: str
    status: int | None
    outcome: str
    duration: float
    request_id: str | None = None


class Upstream(Protocol):
    """An image API. Its methods may run concurrently. `submit` and `query` raise nothing that a
    network can cause, because their outcomes tell it.
    """

    name: str
    answering: bool  # False after a call without a response of this API
    # Gets the kind of each call that the upstream refuses for our key or account, and the reason.
    on_refused: Callable[[str, str], None]

    async def submit(self, body: bytes, idempotency_key: str) -> SubmitOutcome:
        """Sends the body byte for byte, once. The upstream may honour the key or not."""

    async def query(self, upstream_id: str) -> QueryOutcome:
        """Asks for the task's current state."""

    async def inline_result(self, upstream_id: str, link: str) -> bytes | NoAnswer | None:
        """The content of a result that is no link but part of the answer to a query. `link` is its
        short form in `Report.results`. None: the answer has it no more. ValueError: its content
        cannot be decoded.
        """

    async def passthrough(self, method: str, path: str) -> Response:
        """The upstream's own response to a path that begins with `/`. EgressError: none came."""

    def read_callback(self, body: bytes) -> Report | None:
        """The report in a callback's body, or None if it is unreadable. Never raises."""
