"""The schemas of deliveries, their failures and replays."""

from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BeforeValidator, Field

from service.web.event_schemas import Pattern, Patterns
from service.web.field_schemas import Body, OptionalBody, Shape, Text, list_of, whole

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
    type: Pattern | None = None
    since: AwareDatetime | None = Field(None, description="created at or after")
    until: AwareDatetime | None = Field(None, description="created before")


class NewDeliveryReplay(OptionalBody):
    filter: DeliveryChoice = DeliveryChoice()
    dry_run: bool = Field(False, description="only count")


class NewReplay(OptionalBody):
    since: AwareDatetime | None = Field(None, description="by default the oldest event")
    until: AwareDatetime | None = Field(None, description="by default now")
    types: Patterns | None = Field(
        None, description="a subset of the endpoint's types; by default all of them"
    )
    only: Literal["undelivered", "dead", "all"] = Field(
        "undelivered",
        description="undelivered: events without a delivery that succeeded; pending ones are sent "
        "now. dead: events without a delivery that succeeded or is pending",
    )
    dry_run: bool = Field(False, description="only count")


class Counted(Shape):
    id: str | None = Field(description="of the replay; null after a dry run")
    count: int


class Replay(Shape):
    id: str
    endpoint: str | None
    filter: dict[str, Any] | None = Field(description="of `POST /v1/replays`, else null")
    state: Literal["running", "done", "cancelled"]
    since: str
    until: str
    types: list[str]
    only: Literal["undelivered", "dead", "all"]
    count: int
    made: int = Field(
        description="deliveries made or brought forward so far, of which the next three are parts"
    )
    pending: int
    delivered: int
    dead: int
    created_at: str
    finished_at: str | None


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


class Attempt(Shape):
    id: str
    time: str
    status: int | None
    duration_ms: int
    error: str | None
    answer: str | None = Field(description="admin: the first 2 KiB of the subscriber's response")


class Delivery(Shape):
    id: str
    endpoint: str | None
    event: str
    type: str | None = Field(description="of the event; null if it is no longer kept")
    task: str | None
    state: DeliveryState
    cause: str | None = Field(description="why it failed last, until it is delivered")
    created_at: str
    next_attempt_at: str | None
    attempts: list[Attempt]


DeliveryList = list_of(Delivery)
