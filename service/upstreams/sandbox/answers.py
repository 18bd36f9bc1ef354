"""The sandbox's responses: JSON, the documented errors, a gateway's pages. They may break the rules
of HTTP.
"""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from operator import attrgetter

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.errors import type_of

LINGER_S = 60.0  # how long a slow client may read before the connection ends

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
    """A response, and how its connection misbehaves.

    `wait`: seconds before it. `lost`: the connection ends without it. `cut`: the connection ends
    after this many bytes of the body. `stall`: seconds in the middle of the body. `excess`: bytes
    that Content-Length announces beyond the body, or below it.
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
    headers = {"content-type": "application/json", **(headers or {})}
    return Answer(status, encoded(document), headers)


def error_answer(
    status: int,
    code: str,
    message: str,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """The upstream's documented error."""
    error = {"code": code, "message": message, "type": type_of(status)}
    if param is not None:
        error["param"] = param
    return json_answer(status, {"error": error}, headers)


def encoded(document: object) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def html_page(status: int) -> bytes:
    """A gateway's error page of several kilobytes."""
    try:
        title = f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        title = f"{status} A timeout occurred"  # 524 and its like have no registered phrase
    filler = "<p>The web server reported an error. Please try again in a few minutes.</p>\n" * 50
    head = f"<!DOCTYPE html>\n<html><head><title>{title}</title></head>"
    return f"{head}<body><h1>{title}</h1>\n{filler}</body></html>\n".encode()


@dataclass(frozen=True, slots=True)
class ErrorPage:
    """An error in place of the first `times` responses, or of all. `retry_after` is in seconds."""

    status: int
    code: str | None = None
    html: bool = False
    retry_after: int | None = None
    times: int | None = None

    def answer(self, before: int) -> Answer | None:
        """The error after so many requests, if it is still due."""
        if self.times is not None and before >= self.times:
            return None
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        if self.html:
            headers["content-type"] = "text/html; charset=utf-8"
            return Answer(self.status, html_page(self.status), headers)
        code = self.code or HTTP_ERRORS.get(self.status, "unknown_error")
        return error_answer(self.status, code, "asked for by a fault", headers=headers)


class AnswerResponse(Response):
    """An `Answer` as a response of Starlette."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._announced = max(0, len(answer.body) + answer.excess)
        headers = {**answer.headers, "content-length": str(self._announced)}
        super().__init__(answer.body, answer.status, headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer, announced = self._answer, self._announced
        if answer.wait and await disconnected(receive, answer.wait):
            return
        if answer.lost:
            await hang_up(receive)
            return
        body = answer.body[: answer.cut]
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        if answer.stall:
            first = body[: min(len(body) // 2, announced)]
            await send({"type": "http.response.body", "body": first, "more_body": True})
            if await disconnected(receive, answer.stall):
                return
            body, announced = body[len(first) :], announced - len(first)
        honest = len(body) == announced or scope["method"] == "HEAD"
        await send(
            {"type": "http.response.body", "body": body[:announced], "more_body": not honest}
        )
        if not honest:
            await hang_up(receive, body[announced:])


async def disconnected(receive: Receive, seconds: float) -> bool:
    """Waits, and returns True as soon as the client disconnects, so that a stop need not wait."""
    try:
        async with asyncio.timeout(seconds):
            while (await receive())["type"] != "http.disconnect":
                pass
    except TimeoutError:
        return False
    return True


async def hang_up(receive: Receive, last: bytes = b"") -> None:
    """Writes `last` and ends the connection on uvicorn's transport. ASGI cannot do that."""
    transport: asyncio.Transport = attrgetter("__self__.transport")(receive)
    if not transport.is_closing():
        transport.write(last)
        transport.close()
    await disconnected(receive, LINGER_S)
