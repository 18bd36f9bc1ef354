"""The schemas of deliveries, their failures and replays, and of endpoints' health."""

from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BeforeValidator, Field

from service.web.event_schemas import EVENT_TYPES, TEST_TYPE
from service.web.field_schemas import Body, OptionalBody, Text, whole
from service.web.shapes import Shape

DeliveryState = Literal["pending", "delivered", "dead"]


class DeliveryChoice(Body):
    """Deliveries that match all given fields."""

    endpoint: Text | None = Field(None, max_length=200)
    state: DeliveryState | None = Field(
        None,
        description="by default those that failed and have not arrived since: dead ones, and "
        "pending ones that wait for a retry",
    )
    error: Text | None = Field(None, max_length=64, description="a cause, as the groups name it")
    status: Annotated[int, Field(ge=100, le=599), BeforeValidator(whole)] | None = Field(
        None, description="of the last response"
    )
    type: Literal[tuple(EVENT_TYPES)] | None = None  # type: ignore[valid-type]
    since: AwareDatetime | None = Field(None, description="created at or after")
    until: AwareDatetime | None = Field(None, description="created before")


class NewDeliveryReplay(OptionalBody):
    filter: DeliveryChoice = DeliveryChoice()
    dry_run: bool = Field(False, description="only count")


class FailureGroup(Shape):
    endpoint: str | None = Field(description="null: tasks' own callback_urls")
    cause: str
    count: int
    first_seen: str
    last_seen: str


class FailureGroups(Shape):
    data: list[FailureGroup]


class DeliveryRequest(Shape):
    """The request of a delivery as an attempt would send it now, signed."""

    method: Literal["POST"]
    url: str
    headers: dict[str, str]
    body: str


class Hour(Shape):
    time: str
    ok: int
    failed: int


class EndpointHealth(Shape):
    """Of the attempts of the last 24 hours, at most the latest 500."""

    attempts: int
    success_rate: float | None
    p50_ms: int | None
    p95_ms: int | None
    hours: list[Hour]


class EndpointSample(OptionalBody):
    """An event to send as a test."""

    type: Literal[(TEST_TYPE, *EVENT_TYPES)] = TEST_TYPE  # type: ignore[valid-type]
    data: dict[str, Any] | None = None


class TaskCallback(Shape):
    id: str
    verdict: str
    status: str | None = Field(description="what it reports; null if it cannot be read")
    count: int = Field(description="how often it came")
    upstream_id: str | None
    received_at: str
    last_seen_at: str
    body: str | None = Field(description="admin: what the upstream sent, while it is kept")


class TaskCallbacks(Shape):
    data: list[TaskCallback]
