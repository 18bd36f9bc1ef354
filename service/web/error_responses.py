"""Exceptions as error responses (docs/api.md)."""

from collections.abc import Mapping

import structlog
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.errors import ApiError, BlobUnavailable, EgressError, StoreUnavailable, type_of
from service.strict_json import JSON
from service.web.context import context_of

log = structlog.get_logger()

CODES = {404: "not_found", 405: "method_not_allowed"}


def error_body(
    status: int, code: str | None, message: str | None, request_id: str | None, **more: object
) -> JSON:
    """The one form of an error. `more` are values for `type`, `param` and `task_id`."""
    fields: JSON = {"code": code, "message": message, "type": type_of(status), "param": None}
    return {"error": {**fields, "request_id": request_id, "task_id": None, **more}}


def error_response(
    request: Request,
    status: int,
    code: str,
    message: str,
    headers: Mapping[str, str] | None = None,
    **more: object,
) -> Response:
    body = error_body(status, code, message, request.scope["request_id"], **more)
    return JSONResponse(body, status, headers)


async def api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {}
    if error.status in (429, 503):
        headers["Retry-After"] = str(error.retry_after or 1)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    more = {"param": error.param, "task_id": error.task_id, "type": error.type}
    return error_response(request, error.status, error.code, error.message, headers, **more)


async def http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = CODES.get(error.status_code, "invalid_request")
    return error_response(request, error.status_code, code, error.detail, error.headers)


async def store_unavailable(request: Request, error: Exception) -> Response:
    context_of(request).resources.metrics.store_failures.inc()
    log.error("store.failed", message=str(error), exception=cause_of(error))
    return unavailable(request, "unavailable", str(error), 1)


async def blob_unavailable(request: Request, error: Exception) -> Response:
    log.error("blobs.failed", message=str(error), exception=cause_of(error))
    return unavailable(request, "unavailable", f"the image store failed: {error}", 5)


async def upstream_unavailable(request: Request, error: Exception) -> Response:
    message = f"the upstream gave no answer: {error}"
    return unavailable(request, "upstream_unavailable", message, 5)


def unavailable(request: Request, code: str, message: str, retry_after: int) -> Response:
    return error_response(request, 503, code, message, {"Retry-After": str(retry_after)})


def cause_of(error: Exception) -> str | None:
    """The driver's message, without the statement, which contains clients' values."""
    cause = error.__cause__
    return repr(getattr(cause, "orig", cause)) if cause else None


HANDLERS = {
    ApiError: api_error,
    HTTPException: http_error,
    StoreUnavailable: store_unavailable,
    BlobUnavailable: blob_unavailable,
    EgressError: upstream_unavailable,
}
