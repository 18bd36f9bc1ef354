"""The types of fields that bodies, parameters and the documents share, and submissions."""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    create_model,
)

from service.links import trimmed
from service.tasks.accept import MODEL_CHARS
from service.tasks.metadata import METADATA_PAIRS
from service.upstreams.catalogue_entry import MAX_N
from service.web.event_schemas import EVENT_TYPES
from service.web.shapes import Shape


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


def whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


# No text has a NUL character. A pattern of JSON Schema says so.
TEXT: dict[str, Any] = {"type": "string", "pattern": r"^[^\x00]*$"}
Pattern = Annotated[
    str,
    AfterValidator(known_pattern),
    WithJsonSchema({"type": "string", "enum": list(TYPE_PATTERNS)}),
]
Patterns = Annotated[list[Pattern], Field(min_length=1, max_length=32)]
OWNER = r"^[a-z0-9][a-z0-9._-]{0,63}$"
Owner = Annotated[str, Field(pattern=OWNER)]
Scope = Literal["submit", "read", "subscribe", "admin"]
# The form that every service accepts. One whose settings list private networks also accepts http
# and addresses in these networks.
LABEL = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
PUBLIC_URL: dict[str, Any] = {
    "type": "string",
    "maxLength": 2048,
    "pattern": rf"^https://({LABEL}\.)+[A-Za-z]{{2,63}}(:[1-9][0-9]{{0,3}})?([/?][!-~]*)?$",
    "description": "https to a public host. In the networks that the service's settings list, http"
    " and private addresses too",
}
IMAGE_LINK = r"^\s*([Hh][Tt][Tt][Pp][Ss]?://[^/\s\x00]|[Dd][Aa][Tt][Aa]:|file_|img_)[^\x00]*$"
Text = Annotated[str, Field(pattern=TEXT["pattern"])]
ImageLink = Annotated[str, Field(min_length=1, pattern=IMAGE_LINK)]
# JSON has one kind of number, so that 2.0 is whole.
Whole = Annotated[int, BeforeValidator(whole)]
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
TrimmedUrl = Annotated[str, AfterValidator(trimmed), WithJsonSchema(PUBLIC_URL)]
EndpointStatus = Literal["enabled", "paused", "disabled"]


def list_of(item: Any) -> type[Shape]:
    fields: Any = {"data": (list[item], ...), "next_cursor": (str | None, ...)}
    return create_model(f"{item.__name__}List", __base__=Shape, **fields)


class Body(Shape):
    """A body without unknown fields. Values have the types of the document, and none is converted
    from another type.
    """

    model_config = ConfigDict(extra="forbid", strict=True)


class OptionalBody(Body):
    """A request may leave the body out."""


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
