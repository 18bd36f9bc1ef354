"""The shapes of the clients' API: what bodies are checked by, and what the OpenAPI document
shows.
"""

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from service.ids import UPSTREAM_ID
from service.web.event_schemas import EVENT_TYPES, EventTask


def known_pattern(value: str) -> str:
    known = (
        value == "*"
        or value in EVENT_TYPES
        or (value.endswith(".*") and any(name.startswith(value[:-1]) for name in EVENT_TYPES))
    )
    if not known:
        raise ValueError(
            f"must be *, an event type, or the beginning of some and .*: {', '.join(EVENT_TYPES)}"
        )
    return value


Pattern = Annotated[str, AfterValidator(known_pattern)]
Owner = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]


class Body(BaseModel):
    """A body that knows its fields: others are refused."""

    model_config = ConfigDict(extra="forbid")


class Submission(BaseModel):
    """The upstream's fields, and any others it may know; `callback_url` and `metadata` stay
    here.
    """

    model_config = ConfigDict(extra="allow")

    model: str
    prompt: str | None = None
    size: str | None = None
    n: int | None = None
    prompt_extend: bool | None = None
    image_urls: list[str] | None = None
    callback_url: str | None = Field(
        None, description="gets the terminal task, signed; https and public"
    )
    metadata: dict[str, str] | None = Field(
        None, description="up to 16 pairs, 2 KiB; comes back in the task and its events"
    )


class Resolution(Body):
    """What became of an uncertain submission: the upstream's id of it, or what to do without
    one.
    """

    upstream_id: Annotated[str, Field(pattern=f"^{UPSTREAM_ID}$")] | None = None
    decision: Literal["failed", "resubmit"] | None = Field(None, alias="as")

    @model_validator(mode="after")
    def one_of_both(self) -> "Resolution":
        if (self.upstream_id is None) == (self.decision is None):
            raise ValueError("give either upstream_id or as")
        return self


class Task(EventTask):
    prompt: str | None


class CancelledTask(Task):
    cancel: Literal["upstream", "local"]


class TaskList(BaseModel):
    data: list[Task]
    next_cursor: str | None


class Step(BaseModel):
    model_config = ConfigDict(extra="allow")

    time: str
    step: str


class Timeline(BaseModel):
    data: list[Step]


class NewEndpoint(Body):
    url: str
    types: list[Pattern] = Field(default=["image.task.*"], min_length=1, max_length=32)
    description: str = Field("", max_length=500)
    owner: Owner | None = Field(
        None, description="admin: null for every owner's events, else that owner's"
    )


class EndpointPatch(Body):
    url: str | None = None
    types: list[Pattern] | None = Field(None, min_length=1, max_length=32)
    description: str | None = Field(None, max_length=500)
    status: Literal["enabled", "paused", "disabled"] | None = None


class Rotation(Body):
    overlap_s: float = Field(
        86_400, ge=0, le=30 * 86_400, description="for how long the secret before it signs too"
    )


class NewReplay(Body):
    since: AwareDatetime | None = Field(None, description="from the oldest event that is kept")
    until: AwareDatetime | None = Field(None, description="now")
    types: list[Pattern] | None = Field(
        None, min_length=1, max_length=32, description="of those of the endpoint; all of them"
    )
    only: Literal["dead", "all"] = Field(
        "dead", description="dead: what it never took, and is not on its way to it"
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
    only: Literal["dead", "all"]
    count: int
    made: int = Field(description="so many of these have deliveries, which are")
    pending: int
    delivered: int
    dead: int
    created_at: str
    finished_at: str | None


class Missed(BaseModel):
    """What an endpoint missed while it was disabled: `POST …/replay` with this `since` sends it."""

    since: str
    count: int


class Endpoint(BaseModel):
    id: str
    owner: str | None
    url: str
    types: list[str]
    description: str
    status: Literal["enabled", "paused", "disabled"]
    created_at: str
    disabled_at: str | None
    disabled_reason: str | None
    replay: Missed | None = Field(
        description="in the answer that enables one which was disabled, else null"
    )


class EndpointWithSecret(Endpoint):
    secret: str


class EndpointList(BaseModel):
    data: list[Endpoint]
    next_cursor: str | None


class Attempt(BaseModel):
    id: str
    time: str
    status: int | None
    duration_ms: int
    error: str | None
    answer: str | None = Field(description="admin: the first 2 KiB of what the subscriber said")


class Delivery(BaseModel):
    id: str
    endpoint: str | None
    event: str
    task: str | None
    state: Literal["pending", "delivered", "dead"]
    created_at: str
    next_attempt_at: str | None
    attempts: list[Attempt]


class DeliveryList(BaseModel):
    data: list[Delivery]
    next_cursor: str | None


class NewKey(Body):
    owner: Owner
    scopes: list[Literal["submit", "read", "subscribe", "admin"]] = Field(min_length=1)

    @field_validator("scopes")
    @classmethod
    def _operators(cls, value: list[str], info: ValidationInfo) -> list[str]:
        if info.data.get("owner") == "admin" and "admin" not in value:
            raise ValueError(
                "the owner admin, who has the operators' events, is for keys with the scope admin"
            )
        return value


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
        description="with the owner's first key: signs what its tasks' callback_urls get"
    )


class SecretRotation(Rotation):
    owner: Owner | None = Field(None, description="admin: whose; else the caller's own")


class CallbackSecret(BaseModel):
    owner: str
    callback_secret: str = Field(description="shown here only")


class KeyList(BaseModel):
    data: list[Key]
    next_cursor: str | None


class Health(BaseModel):
    status: Literal["ok"]


class Readiness(BaseModel):
    status: Literal["ok", "degraded", "unavailable"]
    causes: list[str] = Field(
        [], description="with a key: `store`, `blobs`, `workers`, `upstream`, `brokers`, `stopping`"
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
