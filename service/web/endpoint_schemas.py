"""The schemas of endpoints: bodies, what the API shows of them, and their health."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, WithJsonSchema

from service.web.event_schemas import EVENT_TYPES, TEST_TYPE, Patterns
from service.web.field_schemas import (
    TEXT,
    Body,
    OptionalBody,
    Owner,
    Shape,
    Text,
    TrimmedUrl,
    list_of,
)

TYPES = ["image.task.*"]
MAX_HEADERS, KEY_CHARS, PAIRS = 10, 512, 16
# The service, HTTP or a proxy sets these. A name that ends in a dash stands for all that begin so.
RESERVED = (
    *("accept-encoding", "connection", "content-encoding", "content-length", "content-type"),
    *("date", "expect", "forwarded", "host", "http2-settings", "keep-alive", "proxy-", "te"),
    *("trailer", "transfer-encoding", "traceparent", "tracestate", "upgrade", "user-agent"),
    *("via", "webhook-", "ce-", "x-forwarded-"),
)


def in_any_case(name: str) -> str:
    """A pattern of the name. JSON Schema has no flag for it."""
    letters = "".join(f"[{x.upper()}{x}]" if x.isalpha() else x for x in name)
    return letters if name.endswith("-") else f"{letters}$"


_NOT = "|".join(in_any_case(name) for name in RESERVED)
NAME = rf"^(?!{_NOT})[A-Za-z0-9!#$%&'*+.^_`|~-]{{1,100}}$"
VALUE = r"^([!-~]([ \t!-~]{0,998}[!-~])?)?$"


def allowed_headers(headers: dict[str, str]) -> dict[str, str]:
    """Raises ValueError for the first problem, with at most one character of a secret value."""
    if len(headers) > MAX_HEADERS:
        raise ValueError(f"has at most {MAX_HEADERS} headers, not {len(headers)}")
    names = [name.lower() for name in headers]
    for name, value in headers.items():
        if names.count(name.lower()) > 1:
            raise ValueError(f"{name[:100]!r} is there twice: names differ not only in case")
        if not re.fullmatch(NAME, name):
            raise ValueError(f"{name[:100]!r} is reserved or no name of a header")
        if not re.fullmatch(VALUE, value):
            match = re.search(r"[^\t -~]|^[ \t]|[ \t]$", value)
            limit = "has at most 1000 visible ASCII characters, with spaces only between them"
            wrong = repr(match[0]) if match else len(value)
            raise ValueError(f"{name}: a value {limit}, not {wrong}")
    return headers


StaticHeaders = Annotated[
    dict[str, str],
    AfterValidator(allowed_headers),
    WithJsonSchema(
        {
            "type": "object",
            "maxProperties": MAX_HEADERS,
            "propertyNames": {"type": "string", "pattern": NAME},
            "additionalProperties": {"type": "string", "pattern": VALUE},
            "description": "sent with every request; names that the service, HTTP or proxies set"
            " are refused, such as `webhook-…`, `content-type` and `host`",
        }
    ),
]
# A quote or a backslash cannot be part of a path of SQLite.
KEY_PATTERN = r'^[^\x00"\\]*$'
FilterKey = Annotated[str, Field(min_length=1, max_length=KEY_CHARS, pattern=KEY_PATTERN)]
MetadataFilter = Annotated[
    dict[FilterKey, Text],
    Field(max_length=PAIRS),
    WithJsonSchema(
        {
            "type": "object",
            "maxProperties": PAIRS,
            "propertyNames": {"minLength": 1, "maxLength": KEY_CHARS, "pattern": KEY_PATTERN},
            "additionalProperties": TEXT,
        }
    ),
]
OrderedBy = Annotated[Text, Field(min_length=1, max_length=KEY_CHARS)]
Rate = Annotated[float, Field(ge=0.01, le=1000)]
ORDERED = "one delivery at a time for each task; a failure holds back only its own task"
ORDERED_BY = "with `ordered`: a key of the metadata, whose value takes the place of the task"
METADATA = "only events whose task has all of these pairs in its metadata"
RATE = "the highest number of requests in a second; null: no cap"
EndpointStatus = Literal["enabled", "paused", "disabled"]


class NewEndpoint(Body):
    url: TrimmedUrl
    types: Patterns = Field(TYPES)
    description: Text = Field("", max_length=500)
    owner: Owner | None = Field(
        None, description="admin: an owner's name, or null for the events of all owners"
    )
    ordered: bool = Field(False, description=ORDERED)
    ordered_by: OrderedBy | None = Field(None, description=ORDERED_BY)
    metadata: MetadataFilter = Field({}, description=METADATA)
    headers: StaticHeaders = Field({})
    rate_per_s: Rate | None = Field(None, description=RATE)


class EndpointPatch(Body):
    """Null is the default of a field, and leaves `url` and `status` as they are."""

    url: TrimmedUrl | None = None
    types: Annotated[Patterns | None, AfterValidator(lambda given: given or TYPES)] = None
    description: Annotated[Text | None, AfterValidator(lambda given: given or "")] = Field(
        None, max_length=500
    )
    status: EndpointStatus | None = None
    ordered: bool | None = Field(None, description=ORDERED)
    ordered_by: OrderedBy | None = Field(None, description=ORDERED_BY)
    metadata: MetadataFilter | None = Field(None, description=METADATA)
    headers: StaticHeaders | None = None
    rate_per_s: Rate | None = Field(None, description=RATE)


class Rotation(OptionalBody):
    overlap_s: float = Field(
        86_400, ge=0, le=30 * 86_400, description="for how long the old secret signs too"
    )


class EndpointSample(OptionalBody):
    """An event to send as a test."""

    type: Literal[(TEST_TYPE, *EVENT_TYPES)] = TEST_TYPE  # type: ignore[valid-type]
    data: dict[str, Any] | None = None


class Missed(Shape):
    """The events that a disabled endpoint missed. `POST …/replay` with this `since` sends them."""

    since: str
    count: int


class Endpoint(Shape):
    id: str
    owner: str | None
    url: str
    types: list[str]
    description: str
    status: EndpointStatus
    ordered: bool = Field(description=ORDERED)
    ordered_by: str | None = Field(description=ORDERED_BY)
    metadata: dict[str, str] = Field(description=METADATA)
    headers: dict[str, str] | None = Field(
        description="sent with every request; null: no key of DARKROOM_SECRET_KEY decrypts them"
    )
    rate_per_s: float | None = Field(description=RATE)
    created_at: str
    disabled_at: str | None
    disabled_reason: str | None
    status_since: str | None = Field(description="null: since before the service noted it")
    failing_since: str | None = Field(description="every attempt has failed since; else null")
    success_rate: float | None = Field(
        description="0 to 1, of the attempts of the last 24 hours, at most the latest 500"
    )
    replay: Missed | None = Field(
        description="in the response that enables a disabled endpoint, else null"
    )


class EndpointWithSecret(Endpoint):
    secret: str


EndpointList = list_of(Endpoint)


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
