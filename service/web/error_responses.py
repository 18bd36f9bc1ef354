"""Errors as clients get them (contract section 3), whoever raised them."""

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
    """The one form of an error; `more` are values for `type`, `param` and `task_id`."""
    fields = {
        "code": code,
        "message": message,
        "type": type_of(status),
        "param": None,
        "request_id": request_id,
        "task_id": None,
    }
    return {"error": fields | more}


def request_id_of(request: Request) -> str:
    value: str = request.scope["request_id"]
    return value


def answer(
    request: Request,
    status: int,
    code: str,
    message: str,
    headers: Mapping[str, str] | None = None,
    **more: object,
) -> Response:
    return JSONResponse(
        error_body(status, code, message, request_id_of(request), **more), status, headers
    )


async def api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {}
    if error.status in (429, 503):
        headers["Retry-After"] = str(error.retry_after or 1)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    more = {"param": error.param, "task_id": error.task_id, "type": error.type}
    return answer(request, error.status, error.code, error.message, headers, **more)


async def http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = CODES.get(error.status_code, "invalid_request")
    return answer(request, error.status_code, code, error.detail, error.headers)


async def store_unavailable(request: Request, error: Exception) -> Response:
    context_of(request).resources.metrics.store_failures.inc()
    log.error("store.failed", message=str(error), exception=cause_of(error))
    return answer(request, 503, "unavailable", str(error), {"Retry-After": "1"})


async def blob_unavailable(request: Request, error: Exception) -> Response:
    log.error("blobs.failed", message=str(error), exception=cause_of(error))
    return answer(
        request, 503, "unavailable", f"the image store failed: {error}", {"Retry-After": "5"}
    )


async def upstream_silent(request: Request, error: Exception) -> Response:
    return answer(
        request,
        503,
        "upstream_unavailable",
        f"the upstream gave no answer: {error}",
        {"Retry-After": "5"},
    )


def cause_of(error: Exception) -> str | None:
    """What the driver said: never the statement, whose values are clients' own."""
    cause = error.__cause__
    return repr(getattr(cause, "orig", cause)) if cause else None


HANDLERS = {
    ApiError: api_error,
    HTTPException: http_error,
    StoreUnavailable: store_unavailable,
    BlobUnavailable: blob_unavailable,
    EgressError: upstream_silent,
}
