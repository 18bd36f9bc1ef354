"""The schemas of the clients' API. They check bodies, and the OpenAPI document shows them."""

from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, ConfigDict, Field, model_validator

from service.ids import UPSTREAM_ID
from service.web.catalogue_schemas import BudgetFigures, Credits
from service.web.event_schemas import EventTask
from service.web.field_schemas import Body, OptionalBody, Owner, Patterns, list_of
from service.web.shapes import Shape

ONE_OF_BOTH: dict[str, Any] = {
    "oneOf": [
        {"required": [one], "properties": {one: {"type": "string"}, other: {"type": "null"}}}
        for one, other in (("upstream_id", "as"), ("as", "upstream_id"))
    ]
}


class Resolution(Body):
    """The outcome of an uncertain submission: the upstream's id, or a decision without one."""

    model_config = ConfigDict(json_schema_extra=ONE_OF_BOTH)

    upstream_id: Annotated[str, Field(pattern=f"^{UPSTREAM_ID}$")] | None = None
    decision: Literal["failed", "resubmit"] | None = Field(None, alias="as")

    @model_validator(mode="after")
    def one_of_both(self) -> "Resolution":
        if (self.upstream_id is None) == (self.decision is None):
            raise ValueError("give either upstream_id or as")
        return self


class QuarantinedBody(Shape):
    """The last body of a result that was no image. The blob store keeps it."""

    index: int
    blob: str
    bytes: int
    sha256: str
    reason: str | None


class ImageData(Shape):
    url: str


class Task(EventTask):
    prompt: str | None
    held: str | None = Field(description="why a queued task is not submitted for now")
    data: list[ImageData] | None = Field(
        description="the results of a task that has ended, as OpenAI's libraries read them"
    )
    quarantine: list[QuarantinedBody] | None = Field(
        description="admin, in `GET /v1/tasks/{id}`: bodies of results that were no image, if any"
    )


class CancelledTask(Task):
    cancel: Literal["upstream", "local"]


class Step(Shape):
    model_config = ConfigDict(extra="allow")

    time: str
    step: str


class Timeline(Shape):
    data: list[Step]


class Rotation(OptionalBody):
    overlap_s: float = Field(
        86_400, ge=0, le=30 * 86_400, description="for how long the old secret signs too"
    )


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
    state: Literal["pending", "delivered", "dead"]
    cause: str | None = Field(description="why it failed last, until it is delivered")
    created_at: str
    next_attempt_at: str | None
    attempts: list[Attempt]


class Key(Shape):
    id: str
    owner: str
    hint: str
    scopes: list[str]
    created_at: str
    revoked_at: str | None


class KeyBudget(Shape):
    period: str
    credits: float


class CreatedKey(Key):
    key: str = Field(description="shown here only")
    callback_secret: str | None = Field(
        description="with the owner's first key: signs deliveries to its tasks' callback_urls"
    )
    budget: KeyBudget | None = Field(description="the owner's budget, if this request set it")


class SecretRotation(Rotation):
    owner: Owner | None = Field(None, description="admin: an owner; by default the caller's own")


class CallbackSecret(Shape):
    owner: str
    callback_secret: str = Field(description="shown here only")


class Health(Shape):
    status: Literal["ok"]


class Readiness(Shape):
    status: Literal["ok", "degraded", "unavailable"]
    causes: list[str] = Field(
        [],
        description="with a key: `store`, `stopping`, `blobs`, `workers`, `no_worker`, `upstream`,"
        " `account`, `result_hosts`, `brokers`",
    )


class RefusingBudget(BudgetFigures):
    """A budget that is too small for a submission."""

    owner: str
    period: Literal["day", "month", "total"]
    estimate: Credits | None = Field(description="of the refused task; null without a price")


class ErrorDetail(Shape):
    code: str
    message: str
    type: str
    param: str | None
    request_id: str | None
    task_id: str | None
    budget: RefusingBudget | None = Field(None, description="only of `budget_exceeded`")


class Error(Shape):
    error: ErrorDetail


TaskList = list_of(Task)
DeliveryList, KeyList = list_of(Delivery), list_of(Key)
