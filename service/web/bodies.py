"""What clients send: bodies, lists' parameters, cursors; bad ones are refused with the field and
the limit.
"""

import asyncio
import base64
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from service.db.paging import Row
from service.errors import ApiError
from service.strict_json import JSON, check_text, read_object

Model = TypeVar("Model", bound=BaseModel)
Item = TypeVar("Item")
Place = tuple[int, str]  # time and id of the last one seen

MAX_BODY = 1 << 20
BODY_S = 30.0
LIMIT, MAX_LIMIT = 100, 1000


async def read_json(request: Request, *, empty: bool = False) -> JSON:
    """The body as a JSON object; `empty`: none is {}.

    ApiError 415 for another media type, 413 over 1 MiB, 408 when it does not come, 400 for all
    else.
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
        raise ApiError(400, "invalid_request", f"the body must be a JSON object: {error}") from None


def validated(kind: type[Model], body: JSON) -> Model:
    """The body as a pydantic model; ApiError 400 that names the first bad field."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        param = (
            ".".join(str(part) for part in first["loc"]) or None
        )  # a rule about several fields names them itself
        message = first["msg"].removeprefix("Value error, ")
        raise ApiError(
            400, "invalid_request", f"{param}: {message}" if param else message, param=param
        ) from None


def query_text(request: Request, name: str, allowed: Iterable[str] | None = None) -> str | None:
    """A query parameter; ApiError 400 for a value that is not allowed or no text."""
    value = request.query_params.get(name)
    if value is None:
        return None
    if allowed is not None and value not in allowed:
        raise ApiError(
            400, "invalid_request", f"{name} must be one of {', '.join(allowed)}", param=name
        )
    try:
        check_text(value)
    except ValueError as error:
        raise ApiError(400, "invalid_request", f"{name}: {error}", param=name) from None
    return value


def query_seconds(request: Request, name: str, most: float) -> float:
    """A number of seconds, 0 without the parameter; ApiError 400 outside of 0 to `most`."""
    try:
        seconds = float(request.query_params.get(name, "0"))
    except ValueError:
        seconds = float("nan")
    if not 0 <= seconds <= most:
        raise ApiError(
            400, "invalid_request", f"{name} must be a number from 0 to {most:g}", param=name
        )
    return seconds


# --- lists
# --------------------------------------------------------------------------------------------------


def query_limit(request: Request) -> int:
    text = request.query_params.get("limit", str(LIMIT))
    if not re.fullmatch("[0-9]{1,9}", text) or not 1 <= int(text) <= MAX_LIMIT:
        raise ApiError(
            400,
            "invalid_request",
            f"limit must be a whole number from 1 to {MAX_LIMIT}",
            param="limit",
        )
    return int(text)


def read_cursor(request: Request) -> Place | None:
    """Where the list goes on: opaque to clients."""
    text = request.query_params.get("cursor")
    if text is None:
        return None
    try:
        time, id = json.loads(base64.b64decode(text, b"-_", validate=True))
        check_text(id)
    except (ValueError, TypeError, RecursionError):
        time, id = None, None
    if type(time) is not int or not abs(time) < 2**62:
        raise ApiError(
            400, "invalid_request", "cursor must be one that an answer gave", param="cursor"
        )
    return time, id


def page(
    found: Sequence[Item], limit: int, place: Callable[[Item], Place], shown: Callable[[Item], JSON]
) -> Response:
    """The answer with at most `limit` of what was found; one more says that the list goes on."""
    more = None
    if len(found) > limit:
        more = base64.urlsafe_b64encode(json.dumps(place(found[limit - 1])).encode()).decode()
    return JSONResponse({"data": [shown(item) for item in found[:limit]], "next_cursor": more})


def place_of(row: Row) -> Place:
    return row["created_at"], row["id"]
