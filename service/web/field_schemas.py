"""The base of the schemas of bodies and documents, and the types of fields that they share."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, create_model

from service.links import trimmed

# No text has a NUL character. A pattern of JSON Schema says so.
TEXT: dict[str, Any] = {"type": "string", "pattern": r"^[^\x00]*$"}
Text = Annotated[str, Field(pattern=TEXT["pattern"])]
OWNER = r"^[a-z0-9][a-z0-9._-]{0,63}$"
NOT_BLANK = r"^[^\x00]*[^\x00-\x20][^\x00]*$"
FORMS = {  # what a refusal says in place of a pattern
    OWNER: "must be 1 to 64 characters of a-z, 0-9, '.', '_', '-', the first of a-z, 0-9",
    NOT_BLANK: "must be text that is not blank",
}
Owner = Annotated[str, Field(pattern=OWNER)]
Scope = Literal["submit", "read", "subscribe", "admin"]
Period = Literal["day", "month", "total"]
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
TrimmedUrl = Annotated[str, AfterValidator(trimmed), WithJsonSchema(PUBLIC_URL)]


def whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Shape(BaseModel, defer_build=True):
    """Builds its validator at its first use, because most shapes stand in the documents alone."""


class Body(Shape):
    """A body without unknown fields, whose values are not converted from another type."""

    model_config = ConfigDict(extra="forbid", strict=True)


class OptionalBody(Body):
    """A request may leave the body out."""


def list_of(item: Any) -> type[Shape]:
    fields: Any = {"data": (list[item], ...), "next_cursor": (str | None, ...)}
    return create_model(f"{item.__name__}List", __base__=Shape, **fields)
