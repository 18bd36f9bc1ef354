"""Exceptions as error responses (docs/api.md)."""

from collections.abc import Mapping

import structlog
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.errors import (
    ApiError,
    BlobUnavailable,
    EgressError,
    StoreUnavailable,
    cause_of,
    type_of,
)
from service.strict_json import JSON
from service.web.context import context_of
from service.web.field_schemas import Shape
from service.web.money_schemas import RefusingBudget

log = structlog.get_logger()

CODES = {404: "not_found", 405: "method_not_allowed"}


class ErrorDetail(Shape):
    code: str
    message: str
    type: str
    param: str | None
    request_id: str | None
    task_id: str | None
    budget: RefusingBudget | None = Field(None, description="only of `budget_exceeded`")


class Error(Shape):
    error: ErrorDetail


def error_body(
    status: int, code: str | None, message: str | None, request_id: str | None, **more: object
) -> JSON:
    """The form of every error. `more` are values for `type`, `param` and `task_id`."""
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


async def respond(request: Request, error: Exception) -> Response:
    """The response to an exception. No log line has the statement, with clients' values."""
    match error:
        case ApiError():
            headers = {}
            if error.status in (429, 503):
                headers["Retry-After"] = str(error.retry_after or 1)
            if error.status == 401:
                headers["WWW-Authenticate"] = "Bearer"
            if error.status == 415 and error.param == "Content-Encoding":
                headers["Accept-Encoding"] = "identity"  # RFC 9110, 15.5.16
            more = {"param": error.param, "task_id": error.task_id, **error.figures}
            return error_response(request, error.status, error.code, error.message, headers, **more)
        case HTTPException():
            code = CODES.get(error.status_code, "invalid_request")
            return error_response(request, error.status_code, code, error.detail, error.headers)
        case StoreUnavailable():
            context_of(request).resources.metrics.store_failures.inc()
            log.error("store.failed", message=str(error), exception=cause_of(error))
            code, message, retry_after = "unavailable", str(error), 1
        case BlobUnavailable():
            log.error("blobs.failed", message=str(error), exception=cause_of(error))
            code, message, retry_after = "unavailable", f"the image store failed: {error}", 5
        case _:
            code, message = "upstream_unavailable", f"the upstream gave no answer: {error}"
            retry_after = 5
    return error_response(request, 503, code, message, {"Retry-After": str(retry_after)})


HANDLERS = dict.fromkeys(
    (ApiError, HTTPException, StoreUnavailable, BlobUnavailable, EgressError), respond
)
