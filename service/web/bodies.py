"""Bodies and query parameters of clients. An error names the field and its limit."""

import asyncio
import codecs
import re
from collections.abc import Iterable
from datetime import datetime
from functools import partial
from typing import TypeVar

from pydantic import AwareDatetime, BaseModel, TypeAdapter, ValidationError
from starlette.requests import ClientDisconnect, Request

from service.errors import ApiError, invalid_request
from service.strict_json import JSON, LARGE, check_text, compact_json, off_loop, read_object
from service.upstreams.field_values import shown
from service.web.auth import caller_of
from service.web.context import context_of
from service.web.field_schemas import FORMS, OWNER, OptionalBody
from service.web.key_shares import address_of
from service.web.parameters import UNIX

Model = TypeVar("Model", bound=BaseModel)

MAX_BODY = 1 << 20
BODY_S = 30.0
SECRET_FIELDS = {"headers"}  # no message shows their values
LAST_MS = 253_402_300_799_999  # of the year 9999
TIME: TypeAdapter[datetime] = TypeAdapter(AwareDatetime)


def check_coding(request: Request) -> None:
    """Raises ApiError 415 for any content coding, such as gzip (RFC 9110, 8.4)."""
    codings = ",".join(request.headers.getlist("content-encoding"))
    if {coding.strip().lower() for coding in codings.split(",")} - {"", "identity"}:
        message = f"Content-Encoding must be identity, not {codings[:100]}: send the body as it is"
        raise ApiError(415, "unsupported_media_type", message, param="Content-Encoding")


async def read_json(request: Request, *, empty: bool = False) -> JSON:
    """The body as a JSON object. With `empty`, no body is {}. Raises ApiError."""
    body = await read_body(request)
    return await parsed(body) if body or not empty else {}


async def read_body(request: Request, most: int = MAX_BODY) -> bytes:
    """The whole body, without a byte order mark (RFC 8259, 8.1).

    Raises ApiError 415 for another media type, 413 over `most` bytes, 408 for an incomplete body,
    429 or 503 for too many of them.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, "unsupported_media_type", "the body must be application/json")
    shedder, body, entry = context_of(request).shedder, bytearray(), request.state.body
    try:
        async with asyncio.timeout(BODY_S) as timer:
            with shedder.idle(), shedder.bodies.arriving(entry, *reader_of(request), timer):
                async for chunk in request.stream():
                    shedder.bodies.grow(entry, len(chunk))
                    body += chunk
                    if len(body) > most:
                        raise ApiError(413, "body_too_large", f"the body has at most {most} bytes")
    except (TimeoutError, ClientDisconnect):
        message = f"the body was not complete after {BODY_S:g} s, or too slow among many"
        raise ApiError(408, "timeout", message) from None
    return bytes(body.removeprefix(codecs.BOM_UTF8))


def reader_of(request: Request) -> tuple[str, str]:
    """The key and the address that a body's share belongs to."""
    return caller_of(request).key, address_of(request.scope.get("client"))


async def parsed(body: bytes) -> JSON:
    """The body as a JSON object. Raises ApiError 400."""
    try:
        return await off_loop(len(body) > LARGE, partial(read_object, body, finite=True))
    except ValueError as error:
        raise invalid_request(f"the body must be a JSON object: {error}") from None


async def read_model(request: Request, kind: type[Model]) -> Model:
    """A missing body is {} if the model is optional."""
    return validated(kind, await read_json(request, empty=issubclass(kind, OptionalBody)))


def validated(kind: type[Model], body: JSON) -> Model:
    """The body as a model. Raises ApiError 400 for its first bad field, with limit and value."""
    try:
        return kind.model_validate_json(compact_json(body))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        # A rule about several fields has no location, and its message names them.
        param = ".".join(str(part) for part in first["loc"]) or None
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "string_pattern_mismatch":
            message = FORMS.get(first["ctx"]["pattern"], message)
        if param is None and (named := message.partition(": "))[0] in kind.model_fields:
            param, _, message = named
        elif param and first["type"] == "missing":
            message = "is required"
        elif param and first["type"] == "extra_forbidden":
            message = "the body has no such field"
            if param in body:
                fields = (field.alias or name for name, field in kind.model_fields.items())
                message += f": it has {', '.join(fields)}"
        elif param and first["loc"][0] not in SECRET_FIELDS and ", not " not in message:
            message += f", not {shown(within(body, first['loc']))}"
        raise invalid_request(f"{param}: {message}" if param else message, param) from None


def within(body: JSON, path: tuple[int | str, ...]) -> object:
    """The value at a path of the body, or the innermost value on the way to it."""
    value: object = body
    for part in path:
        try:
            value = value[part]  # type: ignore[index] # else there is none
        except (KeyError, IndexError, TypeError):
            break
    return value


def query_text(
    request: Request,
    name: str,
    allowed: Iterable[str] | None = None,
    pattern: str | None = None,
    such_as: str = "",
) -> str | None:
    """A query parameter. Raises ApiError 400 for a value that is not allowed or not valid text."""
    value = request.query_params.get(name)
    if value is None:
        return None
    if allowed is not None and value not in allowed:
        message = f"{name} must be one of {', '.join(allowed)}, not {shown(value)}"
        raise invalid_request(message, name)
    if pattern is not None and not re.fullmatch(pattern, value):
        raise invalid_request(f"{name} must be {such_as or pattern}, not {shown(value)}", name)
    try:
        check_text(value)
    except ValueError as error:
        raise invalid_request(f"{name}: {error}", name) from None
    return value


def asks_for(request: Request, media_type: str) -> bool:
    """`Accept` names the media type, and not with the weight 0 (RFC 9110, 12.5.1)."""
    pattern = re.escape(media_type) + r"\s*(;(?!.*\bq=0(\.0*)?\s*(;|$)).*)?"
    kinds = ",".join(request.headers.getlist("accept")).split(",")
    return any(re.fullmatch(r"\s*" + pattern, kind, re.IGNORECASE) for kind in kinds)


def query_seconds(request: Request, name: str, most: float) -> float:
    """A number of seconds, by default 0. Raises ApiError 400 outside 0 to `most`."""
    try:
        seconds = float(request.query_params.get(name, "0"))
    except ValueError:
        seconds = float("nan")
    if not 0 <= seconds <= most:
        value = shown(request.query_params[name])
        raise invalid_request(f"{name} must be a number from 0 to {most:g}, not {value}", name)
    return seconds


def milliseconds(time: datetime | None) -> int | None:
    """Within the years that `rfc3339` can write."""
    return None if time is None else min(max(round(time.timestamp() * 1000), 0), LAST_MS)


def filter_of(choice: BaseModel) -> JSON:
    """The fields of a filter, with its times in milliseconds."""
    return {n: milliseconds(each) if isinstance(each, datetime) else each for n, each in choice}


def query_time(request: Request, name: str) -> int | None:
    """A time with its offset, in milliseconds. Raises ApiError 400."""
    such_as = "an RFC 3339 time, such as 2026-02-01T09:00:00Z"
    text = query_text(request, name, pattern=f"{UNIX}|.*:.*", such_as=such_as)
    if text is None:
        return None
    try:  # a client that does not escape the plus of an offset sends a blank
        return milliseconds(TIME.validate_python(re.sub(" (?=[0-9:]+$)", "+", text)))
    except ValidationError:
        raise invalid_request(f"{name} must be {such_as}, not {shown(text)}", name) from None


def query_owner(request: Request) -> str | None:
    """The owner that a list is about, by default the caller. None: every one. Raises ApiError."""
    caller = caller_of(request)
    owner = query_text(request, "owner", pattern=OWNER, such_as=f"an owner's name ({OWNER})")
    if owner is None:
        return caller.sees
    if caller.sees not in (None, owner):
        message = "owner: only the scope admin may list others' data"
        raise ApiError(403, "permission_denied", message, param="owner")
    return owner
