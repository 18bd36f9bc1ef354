"""Bodies, query parameters and cursors of clients. An error names the field and its limit."""

import asyncio
import base64
import codecs
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import TypeVar

from pydantic import AwareDatetime, BaseModel, TypeAdapter, ValidationError
from sqlalchemy import Connection
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from service.db.paging import PAGE_BYTES, Row, Selection, in_batches, that_fit
from service.errors import ApiError, invalid_request
from service.strict_json import JSON, LARGE, check_text, compact_json, off_loop, read_object
from service.web.auth import caller_of
from service.web.context import context_of, resources_of
from service.web.key_shares import address_of, holder_of
from service.web.page_answer import page_answer
from service.web.schemas import OWNER

Model = TypeVar("Model", bound=BaseModel)
Item = TypeVar("Item")
Position = tuple[int, str]  # time and id of the last item

MAX_BODY = 1 << 20
BODY_S = 30.0
LIMIT, MAX_LIMIT = 100, 1000
LAST_MS = 253_402_300_799_999  # of the year 9999
TIME: TypeAdapter[datetime] = TypeAdapter(AwareDatetime)


def check_coding(request: Request) -> None:
    """Raises ApiError 415 for any content coding, such as gzip (RFC 9110, 8.4)."""
    codings = ",".join(request.headers.getlist("content-encoding"))
    if {coding.strip().lower() for coding in codings.split(",")} - {"", "identity"}:
        message = f"Content-Encoding must be identity, not {codings[:100]}: send the body as it is"
        raise ApiError(415, "unsupported_media_type", message, param="Content-Encoding")


async def read_json(request: Request, *, empty: bool = False) -> JSON:
    """The body as a JSON object. With `empty`, no body is {}. Raises ApiError as `read_body` and
    `parsed` do.
    """
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
    shedder, body, held = context_of(request).shedder, bytearray(), request.state.body
    try:
        async with asyncio.timeout(BODY_S) as timer:
            with (
                shedder.idle(holder_of(request)),
                shedder.bodies.arriving(held, *reader_of(request), timer),
            ):
                async for chunk in request.stream():
                    shedder.bodies.grow(held, len(chunk))
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


async def read_model(request: Request, kind: type[Model], *, empty: bool = False) -> Model:
    return validated(kind, await read_json(request, empty=empty))


def validated(kind: type[Model], body: JSON) -> Model:
    """The body as a pydantic model. Raises ApiError 400 for its first bad field."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        # A rule about several fields has no location, and its message names them.
        param = ".".join(str(part) for part in first["loc"]) or None
        message = first["msg"].removeprefix("Value error, ")
        raise invalid_request(f"{param}: {message}" if param else message, param) from None


def query_text(request: Request, name: str, allowed: Iterable[str] | None = None) -> str | None:
    """A query parameter. Raises ApiError 400 for a value that is not allowed or not valid text."""
    value = request.query_params.get(name)
    if value is None:
        return None
    if allowed is not None and value not in allowed:
        raise invalid_request(f"{name} must be one of {', '.join(allowed)}", name)
    try:
        check_text(value)
    except ValueError as error:
        raise invalid_request(f"{name}: {error}", name) from None
    return value


def query_seconds(request: Request, name: str, most: float) -> float:
    """A number of seconds, by default 0. Raises ApiError 400 outside 0 to `most`."""
    try:
        seconds = float(request.query_params.get(name, "0"))
    except ValueError:
        seconds = float("nan")
    if not 0 <= seconds <= most:
        raise invalid_request(f"{name} must be a number from 0 to {most:g}", name)
    return seconds


def milliseconds(time: datetime | None) -> int | None:
    """Within the years that `rfc3339` can write."""
    return None if time is None else min(max(round(time.timestamp() * 1000), 0), LAST_MS)


def query_time(request: Request, name: str) -> int | None:
    """A time with its offset, in milliseconds. Raises ApiError 400."""
    text = query_text(request, name)
    if text is None:
        return None
    try:  # a client that does not escape the plus of an offset sends a blank
        return milliseconds(TIME.validate_python(re.sub(" (?=[0-9:]+$)", "+", text)))
    except ValidationError:
        example = "such as 2026-02-01T09:00:00Z"
        raise invalid_request(f"{name} must be an RFC 3339 time, {example}", name) from None


def query_owner(request: Request) -> str | None:
    """The owner whose rows a list has: the caller, or with `admin` the named one. None: every
    owner. Raises ApiError 400 and 403.
    """
    caller, owner = caller_of(request), query_text(request, "owner")
    if owner is None:
        return caller.sees
    if not re.fullmatch(OWNER, owner):
        raise invalid_request(f"owner must be an owner's name: {OWNER}", "owner")
    if caller.sees not in (None, owner):
        message = "owner: only the scope admin may list others' data"
        raise ApiError(403, "permission_denied", message, param="owner")
    return owner


def query_limit(request: Request) -> int:
    text = request.query_params.get("limit", str(LIMIT))
    if not re.fullmatch("[0-9]{1,9}", text) or not 1 <= int(text) <= MAX_LIMIT:
        raise invalid_request(f"limit must be a whole number from 1 to {MAX_LIMIT}", "limit")
    return int(text)


def read_cursor(request: Request) -> Position | None:
    """The position after which the list continues. Clients treat it as opaque."""
    text = request.query_params.get("cursor")
    if text is None:
        return None
    try:
        time, id = json.loads(base64.b64decode(text, b"-_", validate=True))
        check_text(id)
    except (ValueError, TypeError, RecursionError):
        time, id = None, None
    if type(time) is not int or not abs(time) < 2**62:
        raise invalid_request("cursor must be one that an answer gave", "cursor")
    return time, id


def position_of(row: Row) -> Position:
    return row["created_at"], row["id"]


async def page(
    request: Request,
    rows: Callable[[Connection, Selection], Sequence[Item]],
    position: Callable[[Item], Position],
    shown: Callable[[Item], JSON],
) -> Response:
    """One page of a list: at most `limit` items, and at most 4 MiB. `rows` returns the selected
    items. One item beyond the page shows that the list continues.
    """
    limit, owner, cursor = query_limit(request), query_owner(request), None
    since, until = query_time(request, "since"), query_time(request, "until")
    if since is not None and until is not None and since > until:
        raise invalid_request("since must not be after until", "since")
    first = Selection(owner, None, read_cursor(request), since, until)

    def size(item: tuple[Position, bytes]) -> int:
        return len(item[1]) + 1  # with a comma

    def read(connection: Connection) -> tuple[list[tuple[Position, bytes]], bool]:
        def some(after: Position | None, count: int) -> list[tuple[Position, bytes]]:
            items = rows(connection, replace(first, after=after, limit=count))
            return [(position(item), compact_json(shown(item)).encode()) for item in items]

        found = in_batches(some, lambda item: item[0], size, first.after, limit + 1)
        return that_fit(found, size, PAGE_BYTES)

    items, more = await resources_of(request).store.read(read)
    if more or len(items) > limit:
        items = items[:limit]
        cursor = base64.urlsafe_b64encode(json.dumps(items[-1][0]).encode()).decode()
    return page_answer(request, [document for _, document in items], next_cursor=cursor)
