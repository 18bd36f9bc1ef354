"""What the sandbox sends: JSON, the documented errors, a gateway's pages, and answers that come
late or not whole.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus

from service.errors import type_of

HTTP_ERRORS: Mapping[int, str] = {
    400: "invalid_parameter",
    401: "unauthorized",
    402: "insufficient_quota",
    403: "permission_denied",
    404: "not_found",
    405: "method_not_allowed",
    409: "idempotency_conflict",
    413: "request_too_large",
    429: "rate_limit_exceeded",
    500: "internal_error",
    502: "upstream_error",
    503: "service_unavailable",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What goes over the wire.

    `wait`: seconds before it; `lost`: the connection ends instead; `cut`: it ends after so many
    bytes of the body; `stall`: seconds in the middle of the body; `excess`: bytes that
    Content-Length claims over what the body has, or under it.
    """

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    wait: float = 0
    lost: bool = False
    cut: int | None = None
    stall: float = 0
    excess: int = 0


def json_answer(status: int, document: object, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(
        status, encoded(document), {"content-type": "application/json", **(headers or {})}
    )


def error_answer(
    status: int,
    code: str,
    message: str,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """The upstream's documented error."""
    error = {"code": code, "message": message, "type": type_of(status)} | (
        {} if param is None else {"param": param}
    )
    return json_answer(status, {"error": error}, headers)


def encoded(document: object) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def html_page(status: int) -> bytes:
    """A gateway's page of several kilobytes, as seen from a content delivery network."""
    try:
        title = f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        title = f"{status} A timeout occurred"  # 524 and its like have no registered phrase
    filler = "<p>The web server reported an error. Please try again in a few minutes.</p>\n" * 50
    head = f"<!DOCTYPE html>\n<html><head><title>{title}</title></head>"
    return f"{head}<body><h1>{title}</h1>\n{filler}</body></html>\n".encode()


@dataclass(frozen=True, slots=True)
class Page:
    """An error instead of an answer, the first `times` times; `retry_after` in seconds, `code`
    instead of the status's usual one.
    """

    status: int
    code: str | None = None
    html: bool = False
    retry_after: int | None = None
    times: int | None = None

    def shown(self, before: int) -> Answer | None:
        if self.times is not None and before >= self.times:
            return None
        extra = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        if self.html:
            return Answer(
                self.status,
                html_page(self.status),
                {"content-type": "text/html; charset=utf-8", **extra},
            )
        code = self.code or HTTP_ERRORS.get(self.status, "unknown_error")
        return error_answer(self.status, code, "asked for by a fault", headers=extra)
