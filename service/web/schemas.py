"""The schemas of the clients' API. They check bodies, and the OpenAPI document shows them."""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    create_model,
    model_validator,
)

from service.ids import UPSTREAM_ID
from service.links import trimmed
from service.web.event_schemas import EVENT_TYPES, EventTask


def known_pattern(value: str) -> str:
    prefix = value.removesuffix("*")
    wildcard = value == "*" or value.endswith(".*")
    if value in EVENT_TYPES or (wildcard and any(name.startswith(prefix) for name in EVENT_TYPES)):
        return value
    raise ValueError(
        f"must be *, an event type, or the beginning of some and .*: {', '.join(EVENT_TYPES)}"
    )


Pattern = Annotated[str, AfterValidator(known_pattern)]
Patterns = Annotated[list[Pattern], Field(min_length=1, max_length=32)]
OWNER = r"^[a-z0-9][a-z0-9._-]{0,63}$"
Owner = Annotated[str, Field(pattern=OWNER)]
Scope = Literal["submit", "read", "subscribe", "admin"]
TrimmedUrl = Annotated[str, AfterValidator(trimmed)]
EndpointStatus = Literal["enabled", "paused", "disabled"]


def list_of(item: Any) -> type[BaseModel]:
    fields: Any = {"data": (list[item], ...), "next_cursor": (str | None, ...)}
    return create_model(f"{item.__name__}List", **fields)


class Body(BaseModel):
    """A body without unknown fields."""

    model_config = ConfigDict(extra="forbid")


class Submission(BaseModel):
    """The upstream's fields, and unknown ones, which the service passes on. `callback_url` and
    `metadata` stay in the service.
    """

    model_config = ConfigDict(extra="allow")

    model: str
    prompt: str | None = None
    size: str | None = None
    n: int | None = None
    negative_prompt: str | None = None
    prompt_extend: bool | None = None
    image_urls: list[str] | None = None
    callback_url: str | None = Field(
        None, description="receives the terminal task, signed; https and public"
    )
    metadata: dict[str, str] | None = Field(
        None, description="up to 16 pairs, 2 KiB; comes back in the task and its events"
    )


class Resolution(Body):
    """The outcome of an uncertain submission: the upstream's id, or a decision without one."""

    upstream_id: Annotated[str, Field(pattern=f"^{UPSTREAM_ID}$")] | None = None
    decision: Literal["failed", "resubmit"] | None = Field(None, alias="as")

    @model_validator(mode="after")
    def one_of_both(self) -> "Resolution":
        if (self.upstream_id is None) == (self.decision is None):
            raise ValueError("give either upstream_id or as")
        return self


class QuarantinedBody(BaseModel):
    """The last body of a result that was no image. The blob store keeps it."""

    index: int
    blob: str
    bytes: int
    sha256: str
    reason: str | None


class ImageData(BaseModel):
    url: str


class Task(EventTask):
    prompt: str | None
    data: list[ImageData] | None = Field(
        description="the results of a task that has ended, as OpenAI's libraries read them"
    )
    quarantine: list[QuarantinedBody] | None = Field(
        description="admin, in `GET /v1/tasks/{id}`: bodies of results that were no image, if any"
    )


class CancelledTask(Task):
    cancel: Literal["upstream", "local"]


class Step(BaseModel):
    model_config = ConfigDict(extra="allow")

    time: str
    step: str


class Timeline(BaseModel):
    data: list[Step]


class NewEndpoint(Body):
    url: TrimmedUrl
    types: Patterns = ["image.task.*"]
    description: str = Field("", max_length=500)
    owner: Owner | None = Field(
        None, description="admin: an owner's name, or null for the events of all owners"
    )


class EndpointPatch(Body):
    url: TrimmedUrl | None = None
    types: Patterns | None = None
    description: str | None = Field(None, max_length=500)
    status: EndpointStatus | None = None


class Rotation(Body):
    overlap_s: float = Field(
        86_400, ge=0, le=30 * 86_400, description="for how long the old secret signs too"
    )


class NewReplay(Body):
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


class Counted(BaseModel):
    id: str | None = Field(description="of the replay; null after a dry run")
    count: int


class Replay(BaseModel):
    id: str
    endpoint: str
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


class Missed(BaseModel):
    """The events that a disabled endpoint missed. `POST …/replay` with this `since` sends them."""

    since: str
    count: int


class Endpoint(BaseModel):
    id: str
    owner: str | None
    url: str
    types: list[str]
    description: str
    status: EndpointStatus
    created_at: str
    disabled_at: str | None
    disabled_reason: str | None
    replay: Missed | None = Field(
        description="in the response that enables a disabled endpoint, else null"
    )


class EndpointWithSecret(Endpoint):
    secret: str


class Attempt(BaseModel):
    id: str
    time: str
    status: int | None
    duration_ms: int
    error: str | None
    answer: str | None = Field(description="admin: the first 2 KiB of the subscriber's response")


class Delivery(BaseModel):
    id: str
    endpoint: str | None
    event: str
    task: str | None
    state: Literal["pending", "delivered", "dead"]
    created_at: str
    next_attempt_at: str | None
    attempts: list[Attempt]


class Key(BaseModel):
    id: str
    owner: str
    hint: str
    scopes: list[str]
    created_at: str
    revoked_at: str | None


class CreatedKey(Key):
    key: str = Field(description="shown here only")
    callback_secret: str | None = Field(
        description="with the owner's first key: signs deliveries to its tasks' callback_urls"
    )


class SecretRotation(Rotation):
    owner: Owner | None = Field(None, description="admin: an owner; by default the caller's own")


class CallbackSecret(BaseModel):
    owner: str
    callback_secret: str = Field(description="shown here only")


class Health(BaseModel):
    status: Literal["ok"]


class Readiness(BaseModel):
    status: Literal["ok", "degraded", "unavailable"]
    causes: list[str] = Field(
        [],
        description="with a key: `store`, `stopping`, `blobs`, `workers`, `no_worker`, `upstream`,"
        " `account`, `result_hosts`, `brokers`",
    )


class ErrorDetail(BaseModel):
    code: str
    message: str
    type: str
    param: str | None
    request_id: str | None
    task_id: str | None


class Error(BaseModel):
    error: ErrorDetail


TaskList, EndpointList = list_of(Task), list_of(Endpoint)
DeliveryList, KeyList = list_of(Delivery), list_of(Key)
