"""The schemas of operators: acts in bulk, the pause, the audit, and how the service is."""

from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, ConfigDict, Field, JsonValue, model_validator

from service.tasks.state import State
from service.web.field_schemas import NOT_BLANK, Body, OptionalBody, Owner, Shape, Text, list_of

REASON_CHARS = 500
Reason = Annotated[Text, Field(min_length=1, max_length=REASON_CHARS, pattern=NOT_BLANK)]


RESUMED_OR_REASON: list[JsonValue] = [
    {"properties": {"paused": {"const": False}}},
    {"required": ["reason"], "properties": {"reason": {"type": "string"}}},
]


class SubmissionChange(Body):
    """Pauses or resumes submission in every process. A pause needs a reason."""

    model_config = ConfigDict(json_schema_extra={"anyOf": RESUMED_OR_REASON})

    paused: bool
    reason: Reason | None = None

    @model_validator(mode="after")
    def with_reason(self) -> "SubmissionChange":
        if self.paused and self.reason is None:
            raise ValueError("reason: a pause needs a reason, which held tasks show")
        return self


class SubmissionState(Shape):
    paused: bool
    reason: str | None
    since: str | None
    key_id: str | None = Field(description="the key that paused it")
    waiting: int = Field(description="tasks that are not submitted yet")


class TaskChoice(Body):
    """Tasks that match all given fields."""

    owner: Owner | None = None
    state: Literal[tuple(state.value for state in State)] | None = None  # type: ignore[valid-type]
    model: Text | None = Field(None, max_length=200)
    error: Text | None = Field(None, max_length=200, description="the code of the task's error")
    since: AwareDatetime | None = Field(None, description="created at or after")
    until: AwareDatetime | None = Field(None, description="created before")


class BulkBody(Body):
    filter: TaskChoice = TaskChoice()
    dry_run: bool = Field(False, description="only count")
    reason: Reason | None = None


class BulkAct(BulkBody, OptionalBody):
    """An act on the tasks that match the filter."""


class BulkResolution(BulkBody):
    """The outcome of the uncertain submissions that match the filter."""

    decision: Literal["failed", "resubmit"] = Field(alias="as")


class BulkDone(Shape):
    count: int = Field(description="tasks that match")
    done: int | None = Field(description="tasks that the act changed; null after a dry run")


class CheckResult(Shape):
    name: str
    state: Literal["ok", "warning", "fault", "skipped"]
    finding: str
    mend: str | None = Field(description="what to do about a warning or a fault")


class Examination(Shape):
    status: Literal["ok", "warning", "fault"] = Field(description="the worst state of a check")
    checks: list[CheckResult]


class RecordedAct(Shape):
    """An act of an operator or owner. It is never changed."""

    id: str
    time: str
    owner: str = Field(description="of the key")
    key_id: str | None = Field(description="null: a command in the store itself")
    action: str
    target: str | None
    reason: str | None
    outcome: str = Field(description="`done`, or why the act changed nothing")
    detail: dict[str, Any] | None
    request_id: str | None


RecordedActList = list_of(RecordedAct)


class Health(Shape):
    status: Literal["ok"]


class Readiness(Shape):
    status: Literal["ok", "degraded", "unavailable"]
    causes: list[str] = Field(
        [],
        description="with a key: `store`, `stopping`, `blobs`, `workers`, `no_worker`, `upstream`,"
        " `account`, `result_hosts`, `brokers`",
    )
