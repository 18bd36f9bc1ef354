"""Around every request: an id, one log line, and the response to a defect of the service."""

import re
import time

import structlog
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bind_contextvars, clear_contextvars

from service.fair_slots import HOLDER
from service.ops import tracing
from service.resources import new_id
from service.web.error_responses import error_body
from service.web.key_shares import address_of

log = structlog.get_logger()

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
CLOSE = (b"connection", b"close")
# The server discards an unread body up to here. Behind a longer one, the connection ends.
MAX_DISCARDED = 1 << 20
# Logged at debug level: asked for every few seconds, or with a log line of their own.
QUIET = ("/healthz", "/readyz", "/metrics", "/callbacks/", "/assets/")


class Requests:
    """Gives each request its `X-Request-Id`, the client's own if it is plain, and logs it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await Exchange(scope, receive, send).run(self.app)
        else:
            await self.app(scope, receive, send)


class Exchange:
    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._headers = dict(scope["headers"])
        given = self._headers.get(b"x-request-id", b"").decode("latin-1")
        valid = REQUEST_ID.fullmatch(given)
        scope["request_id"] = given if valid else new_id("request", time.time_ns() // 1_000_000)
        self._started, self._status, self._sent, self._unread = time.perf_counter(), 0, 0, True

    async def run(self, app: ASGIApp) -> None:
        scope = self._scope
        clear_contextvars()  # a pipelined request runs in the context of the one before it
        bind_contextvars(request_id=scope["request_id"])
        HOLDER.set(f"from {address_of(scope.get('client'))}")  # until its key is verified
        tracing.enter(self._traceparent())
        if scope["path"].startswith(QUIET):  # a callback's span belongs to the trace of its task
            await self._answered(app)
        else:
            with tracing.span(scope["method"], "server") as span:
                await self._answered(app)
                route, method = route_of(scope), scope["method"]
                span.rename(f"{method} {route}" if route else method)
                # The path and the query may contain tokens, so they are in no span.
                span.set(
                    **{
                        "http.request.method": method,
                        "http.route": route,
                        "http.response.status_code": self._status,
                        "url.scheme": scope["scheme"],
                    }
                )
                if self._status >= 500:
                    span.fail(str(self._status))
        level = log.debug if scope["path"].startswith(QUIET) else log.info
        level(
            "http.request",
            method=scope["method"],
            route=route_of(scope),
            status=self._status,
            duration_ms=round((time.perf_counter() - self._started) * 1000, 1),
            bytes=self._sent,
        )

    async def _answered(self, app: ASGIApp) -> None:
        try:
            await app(self._scope, self._read, self._answer)
        except Exception as error:
            where = {"method": self._scope["method"], "route": route_of(self._scope)}
            log.exception("http.failed", **where, exception=repr(error))
            if not self._status:
                await self._internal_error()

    def _traceparent(self) -> str | None:
        """The client's. A request with two of them has none."""
        given = [value for name, value in self._scope["headers"] if name == b"traceparent"]
        return tracing.valid_traceparent(given[0].decode("latin-1")) if len(given) == 1 else None

    async def _read(self) -> Message:
        message = await self._receive()
        self._unread = message.get("more_body", False)
        return message

    async def _answer(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = list(message.get("headers", ()))
            headers.append((b"x-request-id", self._scope["request_id"].encode()))
            unread = self._unread and self._has_endless_body()
            if (self._status == 408 or unread) and CLOSE not in headers:
                headers.append(CLOSE)
            message["headers"] = headers
        self._sent += len(message.get("body", b""))
        await self._send(message)

    def _has_endless_body(self) -> bool:
        length = int(self._headers.get(b"content-length", 0))
        return b"transfer-encoding" in self._headers or length > MAX_DISCARDED

    async def _internal_error(self) -> None:
        message = "a defect of the service; it was logged"
        error = error_body(500, "internal_error", message, self._scope["request_id"])
        await JSONResponse(error, 500)(self._scope, self._receive, self._answer)


def route_of(scope: Scope) -> str | None:
    """The pattern that matched. Paths contain tokens."""
    return getattr(scope.get("route"), "path", None)
