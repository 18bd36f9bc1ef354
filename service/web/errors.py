"""Errors as clients get them (contract section 3), whoever raised them."""

import structlog
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.errors import ApiError, EgressError, StoreUnavailable, type_of
from service.model import JSON

log = structlog.get_logger()

CODES = {404: "not_found", 405: "method_not_allowed"}


def error_body(status: int, code: str, message: str, request_id: str | None, **more: object) -> JSON:
    return {
        "error": {
            "code": code,
            "message": message,
            "type": type_of(status),
            "param": None,
            "request_id": request_id,
            "task_id": None,
            **more,
        }
    }


def request_id_of(request: Request) -> str | None:
    value: str | None = request.scope.get("request_id")
    return value


async def api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    more = {"param": error.param, "task_id": error.task_id, "type": error.type}
    body = error_body(error.status, error.code, error.message, request_id_of(request), **more)
    return JSONResponse(body, error.status, headers={"Retry-After": str(error.retry_after or 1)} if error.status in (429, 503) else None)


async def http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = CODES.get(error.status_code, "invalid_request")
    return JSONResponse(error_body(error.status_code, code, error.detail, request_id_of(request)), error.status_code, headers=error.headers)


async def unavailable(request: Request, error: Exception) -> Response:
    log.error("store.failed", message=str(error), exception=repr(error.__cause__))
    body = error_body(503, "unavailable", str(error), request_id_of(request))
    return JSONResponse(body, 503, headers={"Retry-After": "1"})


async def upstream_silent(request: Request, error: Exception) -> Response:
    body = error_body(503, "upstream_unavailable", f"the upstream gave no answer: {error}", request_id_of(request))
    return JSONResponse(body, 503, headers={"Retry-After": "5"})


HANDLERS = {ApiError: api_error, HTTPException: http_error, StoreUnavailable: unavailable, EgressError: upstream_silent}
