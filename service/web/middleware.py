"""Around every request: an id, one log line, and the answer when a defect of ours comes through."""

import json
import re
import time

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bind_contextvars, clear_contextvars

from service.resources import new_id
from service.web.error_responses import error_body

log = structlog.get_logger()

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
CLOSE = (b"connection", b"close")
SWALLOWED = (
    1 << 20
    # so much of a body that nobody wants is thrown away by the server; behind a longer one the
    # connection ends
)
SILENT = (
    "/healthz",
    "/readyz",
    "/metrics",
    "/callbacks/",
)  # asked every few seconds, or with a line of their own; at debug level


class Requests:
    """Gives each request its `X-Request-Id` (the caller's own if it is plain) and logs it by its
    route, never by its path.

    Whatever an endpoint binds, as its caller's `owner` or a `task_id`, stands in that line too.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = (
            given if REQUEST_ID.fullmatch(given) else new_id("request", time.time_ns() // 1_000_000)
        )
        scope["request_id"] = request_id
        started, status, sent, unread = time.perf_counter(), 0, 0, True

        async def read() -> Message:
            nonlocal unread
            message = await receive()
            unread = message.get("more_body", False)
            return message

        async def answer(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                ]
                if (status == 408 or (unread and endless(scope))) and CLOSE not in message[
                    "headers"
                ]:
                    message["headers"].append(CLOSE)
            sent += len(message.get("body", b""))
            await send(message)

        clear_contextvars()  # a pipelined request begins where the one before it ended
        bind_contextvars(request_id=request_id)
        try:
            await self.app(scope, read, answer)
        except Exception as error:
            log.exception(
                "http.failed", method=scope["method"], route=route_of(scope), exception=repr(error)
            )
            if not status:
                await _failed(scope, answer)
        level = log.debug if scope["path"].startswith(SILENT) else log.info
        level(
            "http.request",
            method=scope["method"],
            route=route_of(scope),
            status=status,
            duration_ms=round((time.perf_counter() - started) * 1000, 1),
            bytes=sent,
        )


def endless(scope: Scope) -> bool:
    """Whether a body is announced that is not worth throwing away."""
    headers = dict(scope["headers"])
    return b"transfer-encoding" in headers or int(headers.get(b"content-length", 0)) > SWALLOWED


def route_of(scope: Scope) -> str | None:
    """The pattern that matched, never the path: paths hold tokens."""
    route = scope.get("route")
    return getattr(route, "path", None)


async def _failed(scope: Scope, send: Send) -> None:
    body = json.dumps(
        error_body(
            500, "internal_error", "a defect of the service; it was logged", scope["request_id"]
        )
    ).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 500, "headers": headers})
    await send({"type": "http.response.body", "body": body})
