"""Bodies, query parameters and cursors of clients. An error names the field and its limit."""

import asyncio
import base64
import json
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from service.db.paging import Row
from service.errors import ApiError, invalid_request
from service.strict_json import JSON, check_text, read_object

Model = TypeVar("Model", bound=BaseModel)
Item = TypeVar("Item")
Position = tuple[int, str]  # time and id of the last item

MAX_BODY = 1 << 20
BODY_S = 30.0
LIMIT, MAX_LIMIT = 100, 1000


async def read_json(request: Request, *, empty: bool = False) -> JSON:
    """The body as a JSON object. With `empty`, no body is {}.

    Raises ApiError 415 for another media type, 413 over 1 MiB, 408 for an incomplete body, else
    400.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, "unsupported_media_type", "the body must be application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY:
                    raise ApiError(413, "body_too_large", f"the body has at most {MAX_BODY} bytes")
    except (TimeoutError, ClientDisconnect):
        raise ApiError(408, "timeout", f"the body was not complete after {BODY_S:g} s") from None
    if empty and not body:
        return {}
    try:
        return read_object(body, finite=True)
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
    rows: Callable[[int, Position | None], Awaitable[Sequence[Item]]],
    position: Callable[[Item], Position],
    shown: Callable[[Item], JSON],
) -> Response:
    """One page of a list. `rows` returns items after a position, at most as many as its limit. One
    item beyond the page shows that the list continues.
    """
    limit, cursor = query_limit(request), None
    items = await rows(limit + 1, read_cursor(request))
    if len(items) > limit:
        last = json.dumps(position(items[limit - 1])).encode()
        cursor = base64.urlsafe_b64encode(last).decode()
    return JSONResponse({"data": [shown(item) for item in items[:limit]], "next_cursor": cursor})
