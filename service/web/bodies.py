"""What clients send: bodies, lists' parameters, cursors; bad ones are refused with the field and the limit."""

import base64
import json
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from service.errors import ApiError
from service.model import JSON

Model = TypeVar("Model", bound=BaseModel)

MAX_BODY = 1 << 20
LIMIT, MAX_LIMIT = 100, 1000


async def read_json(request: Request) -> JSON:
    """The body as a JSON object; ApiError 413 over 1 MiB, 415 for another media type, 400 for all else."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, "unsupported_media_type", "the body must be application/json")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise ApiError(413, "body_too_large", f"the body has at most {MAX_BODY} bytes")
    try:
        value = json.loads(body, object_pairs_hook=_pairs, parse_constant=_no_constant)
        check_text(value)
    except RecursionError:
        raise ApiError(400, "invalid_request", "the body is nested too deeply") from None
    except ValueError as error:
        raise ApiError(400, "invalid_request", f"the body must be JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(400, "invalid_request", "the body must be a JSON object")
    return value


def _pairs(pairs: list[tuple[str, Any]]) -> JSON:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("an object names a field twice")
    return made


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def check_text(value: object) -> None:
    """ValueError for NUL or a lone surrogate anywhere in a JSON value: neither store nor upstream takes them."""
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError("text must not hold NUL")
        if any("\ud800" <= char <= "\udfff" for char in value):
            raise ValueError("text must not hold a lone surrogate")
    elif isinstance(value, Mapping):
        for name, item in value.items():
            check_text(name)
            check_text(item)
    elif isinstance(value, list):
        for item in value:
            check_text(item)


def validated(kind: type[Model], body: JSON) -> Model:
    """The body as a pydantic model; ApiError 400 that names the first bad field."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        param = ".".join(str(part) for part in first["loc"])
        raise ApiError(400, "invalid_request", f"{param}: {first['msg']}", param=param or None) from None


def query_text(request: Request, name: str, allowed: Iterable[str] | None = None) -> str | None:
    """A query parameter; ApiError 400 for a value that is not allowed or no text."""
    value = request.query_params.get(name)
    if value is None:
        return None
    if allowed is not None and value not in allowed:
        raise ApiError(400, "invalid_request", f"{name} must be one of {', '.join(allowed)}", param=name)
    try:
        check_text(value)
    except ValueError as error:
        raise ApiError(400, "invalid_request", f"{name}: {error}", param=name) from None
    return value


def query_number(request: Request, name: str, default: float, least: float, most: float) -> float:
    value = request.query_params.get(name)
    try:
        number = default if value is None else float(value)
    except ValueError:
        number = float("nan")
    if not least <= number <= most:
        raise ApiError(400, "invalid_request", f"{name} must be a number from {least:g} to {most:g}", param=name)
    return number


def query_limit(request: Request) -> int:
    return int(query_number(request, "limit", LIMIT, 1, MAX_LIMIT))


def read_cursor(request: Request) -> tuple[int, str] | None:
    """Where the list goes on: opaque to clients."""
    text = request.query_params.get("cursor")
    if text is None:
        return None
    try:
        time, id = json.loads(base64.urlsafe_b64decode(text.encode("ascii")))
        if not isinstance(time, int) or not abs(time) < 2**62 or not isinstance(id, str):
            raise ValueError
        check_text(id)
    except (ValueError, TypeError):
        raise ApiError(400, "invalid_request", "cursor must be one that an answer gave", param="cursor") from None
    return time, id


def make_cursor(time: int, id: str) -> str:
    return base64.urlsafe_b64encode(json.dumps([time, id]).encode()).decode()
