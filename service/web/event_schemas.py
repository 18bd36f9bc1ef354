"""The schemas of events: their types, the task in them, and the data of operators' events."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, WithJsonSchema

from service.tasks.state import State
from service.web.field_schemas import Shape


class TaskInfo(Shape):
    can_cancel: bool
    estimated_time: int | None


class Usage(Shape):
    billing_rule: str | None
    credits_reserved: float | None
    credits_used: float | None
    user_group: str | None


class TaskImage(Shape):
    id: str
    index: int
    url: str
    media_type: str
    bytes: int
    sha256: str
    width: int
    height: int


class TaskInput(Shape):
    """An input image. Only the URL of a public link is known."""

    id: str | None
    url: str | None
    sha256: str | None
    width: int | None
    height: int | None


class TaskError(Shape):
    model_config = ConfigDict(extra="allow")

    code: str
    message: str
    type: str | None


class EventTask(Shape):
    """A task in an event, without its prompt."""

    id: str
    owner: str
    object: Literal["image.generation.task"]
    created: int
    ended_at: str | None
    erased_at: str | None
    model: str
    type: Literal["image"]
    status: Literal["pending", "processing", "completed", "failed", "cancelled"] = Field(
        description="a cancelled task is `failed`; only events of older versions have `cancelled`"
    )
    progress: int
    task_info: TaskInfo
    usage: Usage
    results: list[str]
    error: TaskError | None
    state: str = Field(json_schema_extra={"enum": [state.value for state in State]})
    upstream: str
    upstream_id: str | None
    metadata: dict[str, str]
    request: dict[str, Any]
    warnings: list[str] = Field(
        description="names fields that the model does not have in the catalogue; they are passed on"
    )
    inputs: list[TaskInput] = Field(
        description="in the order of `image_urls`, and last that of `mask_url`"
    )
    images: list[TaskImage]


class Event(Shape):
    specversion: Literal["1.0"]
    id: str
    source: str
    type: str
    subject: str = Field(
        description="the task's id, else the endpoint, the row, the upstream or `submission`"
    )
    time: str
    datacontenttype: Literal["application/json"]
    sequence: str
    data: dict[str, Any] = Field(description="for `image.task.*`: the task at that time")


class EventPage(Shape):
    data: list[Event]
    next_after: str
    resync: bool


class Conflict(Shape):
    """A callback or a query's response that contradicts the task's earlier data."""

    task_id: str
    callback_id: str | None
    upstream_id: str | None
    reason: str


class LateResult(Shape):
    """The upstream's proof about a task that the service had ended. State and event stand, credits
    and images are recorded.
    """

    task_id: str
    owner: str
    state: str
    upstream_id: str | None
    credits_used: float | None
    status: str
    stored: int
    lost: int


class Parked(Shape):
    """A row that crashed its worker too often. No worker tries it again. `advice`: what an operator
    does about it.
    """

    task_id: str | None
    stage: str
    key: str
    cause: str
    advice: str


class AtRisk(Shape):
    """An image that is not downloaded yet and may be lost: the address guard refuses its host, it
    was no image so far, or its link expires soon.
    """

    task_id: str
    owner: str
    image_id: str
    index: int
    reason: str | None
    link_dies_at: str
    host: str | None = Field(description="the host that is refused for now")
    setting: str | None = Field(description="the setting that does not list it")


class EndpointDisabled(Shape):
    endpoint_id: str
    reason: str
    disabled_at: str


class EndpointRecovered(Shape):
    """An attempt succeeded after every attempt had failed."""

    endpoint_id: str
    failing_since: str
    recovered_at: str
    seconds: float


class EndpointTest(Shape):
    """Requested by the endpoint's owner. No list of events contains it."""

    endpoint_id: str


class DeliveryExhausted(Shape):
    """A delivery that failed its last retry. The service keeps it for a replay."""

    delivery_id: str
    endpoint_id: str | None
    event_id: str
    task_id: str | None


class AccountRefused(Shape):
    """The upstream refuses the service's key or account. Submissions wait until it takes them."""

    upstream: str
    reason: str


class AccountRestored(Shape):
    """The upstream takes the service's key and account again."""

    upstream: str


class BudgetExhausted(Shape):
    """A submission was refused because of its owner's budget, for the first time in the period."""

    owner: str
    period: Literal["day", "month", "total"]
    limit: float
    spent: float
    reserved: float
    left: float


class SubmissionPaused(Shape):
    """An operator paused submission. Tasks wait. Callbacks, downloads and deliveries go on."""

    reason: str
    key_id: str


class SubmissionResumed(Shape):
    """An operator resumed submission."""

    reason: str | None
    key_id: str
    paused_at: str
    seconds: float


TASK_STATES = ("submitted", "completed", "failed", "cancelled", "expired")
EVENT_TYPES: dict[str, type[Shape]] = {
    **{f"image.task.{state}": EventTask for state in TASK_STATES},
    "callback.conflict": Conflict,
    "task.late_result": LateResult,
    "task.parked": Parked,
    "image.at_risk": AtRisk,
    "endpoint.disabled": EndpointDisabled,
    "endpoint.recovered": EndpointRecovered,
    "delivery.exhausted": DeliveryExhausted,
    "account.refused": AccountRefused,
    "account.restored": AccountRestored,
    "budget.exhausted": BudgetExhausted,
    "submission.paused": SubmissionPaused,
    "submission.resumed": SubmissionResumed,
}
TEST_TYPE = "endpoint.test"


def beginnings(type: str) -> list[str]:
    """`image.*` and `image.task.*` of `image.task.failed`."""
    parts = type.split(".")
    return [".".join(parts[:count]) + ".*" for count in range(1, len(parts))]


TYPE_PATTERNS = ("*", *dict.fromkeys(each for type in EVENT_TYPES for each in beginnings(type)))
TYPE_PATTERNS = (*TYPE_PATTERNS, *EVENT_TYPES)


def known_pattern(value: str) -> str:
    if value in TYPE_PATTERNS:
        return value
    raise ValueError(
        f"must be *, an event type, or the beginning of some and .*: {', '.join(EVENT_TYPES)}"
    )


Pattern = Annotated[
    str,
    AfterValidator(known_pattern),
    WithJsonSchema({"type": "string", "enum": list(TYPE_PATTERNS)}),
]
Patterns = Annotated[list[Pattern], Field(min_length=1, max_length=32)]
