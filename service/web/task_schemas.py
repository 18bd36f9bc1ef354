"""The schemas of submissions and tasks."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from service.ids import UPSTREAM_ID
from service.tasks.accept import MODEL_CHARS
from service.tasks.metadata import METADATA_PAIRS
from service.upstreams.catalogue_entry import MAX_N
from service.web.event_schemas import EventTask
from service.web.field_schemas import PUBLIC_URL, TEXT, Body, Shape, Text, list_of, whole

IMAGE_LINK = r"^\s*([Hh][Tt][Tt][Pp][Ss]?://[^/\s\x00]|[Dd][Aa][Tt][Aa]:|file_|img_)[^\x00]*$"
ImageLink = Annotated[str, Field(min_length=1, pattern=IMAGE_LINK)]
BLANK = {"type": "string", "pattern": r"^[\x01-\x20]*$"}
TaskCallbackUrl = Annotated[str, WithJsonSchema({"anyOf": [PUBLIC_URL, BLANK]})]
Metadata = Annotated[
    dict[str, str],
    Field(max_length=METADATA_PAIRS),
    WithJsonSchema(
        {
            "type": "object",
            "maxProperties": METADATA_PAIRS,
            "propertyNames": TEXT,
            "additionalProperties": TEXT,
        }
    ),
]


class Submission(Shape):
    """The upstream's fields, and unknown ones, which the service passes on. `callback_url` and
    `metadata` stay in the service. `GET /v1/catalogue` has the fields and limits of each model. A
    field that a model requires must be there, and a value must be within its limits.
    """

    model_config = ConfigDict(
        extra="allow",
        strict=True,
        json_schema_extra={
            "examples": [{"model": "wan2.5-text-to-image", "prompt": "a lighthouse in the fog"}]
        },
    )

    model: Text = Field(min_length=1, max_length=MODEL_CHARS)
    prompt: Text | None = None
    size: Text | None = Field(
        None, description="such as 1280x1280 or 16:9, as the model's entry in the catalogue says"
    )
    n: Annotated[int, Field(ge=1, le=MAX_N), BeforeValidator(whole)] | None = None
    negative_prompt: Text | None = None
    prompt_extend: bool | None = None
    image_urls: list[ImageLink] | None = Field(
        None, description="public links, `file_…`, `img_…`, our own links, `data:` URLs of images"
    )
    callback_url: TaskCallbackUrl | None = Field(
        None, description="receives the terminal task, signed; empty text counts as absent"
    )
    metadata: Metadata | None = Field(
        None, description="2 KiB in all; comes back in the task and its events"
    )


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


TaskList = list_of(Task)
