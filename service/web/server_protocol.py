"""uvicorn's HTTP protocol, with limits on everything before a request's headers are complete."""

import asyncio
import time
from functools import partial
from typing import Any

import httptools
from starlette.responses import JSONResponse
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from service.resources import new_id
from service.web.error_responses import error_body
from service.web.overload import PriorityGate

MAX_HEAD = 64 * 1024  # bytes, plus the rest of one read, at most 256 KiB
# The size of one read. Later bytes are parsed once the requests in it are answered.
SLICE, MAX_BEHIND = 4096, 512 * 1024  # bytes
HEAD_S = 10.0
# At a stop, the time for the first request of a connection, and for a further one in transit.
FIRST_S, NEXT_S = 1.0, 0.05
CALLBACK = b"POST /callbacks/"


class RequestParser(httptools.HttpRequestParser):
    """Reads a request that offers to upgrade the connection as one without the offer (RFC 9110,
    7.8). Java's HttpClient offers h2c with every plain request.

    httptools treats what follows the head of such a request as another protocol and drops the body.
    So the parser gets the head again without `Upgrade`, and then what follows.
    """

    def __init__(self, protocol: "BoundedProtocol") -> None:
        super().__init__(protocol)
        self._protocol = protocol

    def feed_data(self, data: bytes | memoryview) -> None:  # type: ignore[override] # of uvicorn
        rest = memoryview(data)
        while True:
            try:
                super().feed_data(rest)
            except httptools.HttpParserUpgrade as offer:
                if self.get_method() == b"CONNECT":
                    raise httptools.HttpParserError("a tunnel is no request") from None
                super().feed_data(self._protocol.head_without_offer())
                rest = rest[offer.args[0] :]
            else:
                return


class BoundedProtocol(HttpToolsProtocol):
    """Limits a request's head in bytes (400) and in seconds (the connection ends).

    A connection without a first byte lasts as long as an idle one. At a stop, a connection still
    gets the answer to the request that it was opened for.
    """

    def __init__(
        self, config: Config, state: ServerState, app_state: dict[str, Any], gate: PriorityGate
    ) -> None:
        super().__init__(config, state, app_state)
        self.parser = RequestParser(self)
        # A request behind one with `Connection: close` is no error, as in uvicorn.
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._gate = gate
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None  # set while a head is incomplete
        self._stopping = False
        self._queued = b""  # the beginning of a request that waits at the gate
        self._admitted = False  # the gate has let in the request that is being read
        self._behind = b""  # what follows requests that are not answered
        self._answered: Any = None  # the request that is being answered, or was answered last

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # `pause_writing` at the first byte that waits
        self._start_idle_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)
        # uvicorn tells only the last one of several requests that were sent at once.
        if self._answered is not None and not self._answered.response_complete:
            self._answered.disconnected = True
            self._answered.message_event.set()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answered = cycle
        begin = partial(self._start_admitted, cycle, app)
        admitted, self._admitted = self._admitted, False
        scope = cycle.scope
        callback = scope["method"] == "POST" and scope["path"].startswith("/callbacks/")
        if admitted or self._gate.admit(begin, callback=callback):
            super()._start_asgi_task(cycle, app)

    def _start_admitted(self, cycle: RequestResponseCycle, app: Any) -> None:
        if not cycle.disconnected:
            super()._start_asgi_task(cycle, app)

    def data_received(self, data: bytes) -> None:
        if self._queued:
            self._queued += data
        elif self._behind:
            self._behind += data
            if len(self._behind) > MAX_BEHIND:
                self.transport.abort()
        elif self._head_timer or not self._idle:
            self._read(data)
        elif self._gate.admit(self._begin, callback=data.startswith(CALLBACK)):
            self._admitted = True
            self._read(data)
        else:
            self._queued = data
            self._unset_keepalive_if_required()
            self.transport.pause_reading()

    def _begin(self) -> None:
        data, self._queued = self._queued, b""
        if not self.transport.is_closing():
            self.transport.resume_reading()
            self._admitted = True
            self._read(data)

    @property
    def _idle(self) -> bool:
        cycle: Any = self.cycle
        return cycle is None or cycle.response_complete

    def _read(self, data: bytes) -> None:
        timer = self._head_timer
        for start in range(0, len(data), SLICE):
            if self.pipeline or self.transport.is_closing():
                self._behind = data[start:]
                break
            super().data_received(data[start : start + SLICE])
        if self._head_timer is not None and self._head_timer is timer:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD:
                self._end_head()
                self.send_400_response("The request's line and headers are too long.")
        # The bytes may have begun no request: an empty line, or an unread body.
        if self._idle and self._head_timer is None and self.timeout_keep_alive_task is None:
            self._start_idle_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if self._behind and not self.pipeline:
            data, self._behind = self._behind, b""
            self._read(data)

    def _start_idle_timer(self) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._end_head()  # of the same request with its offer to upgrade
        self._head_bytes, self._head_timer = 0, self.loop.call_later(HEAD_S, self._close_if_idle)

    def send_400_response(self, msg: str) -> None:
        """An error like any other, to a request that the application never sees."""
        id = new_id("request", time.time_ns() // 1_000_000)
        body = error_body(400, "invalid_request", msg, id)
        answer = JSONResponse(body, headers={"x-request-id": id, "connection": "close"})
        headers = [*self.server_state.default_headers, *answer.raw_headers]
        lines = [name + b": " + value for name, value in headers]
        head = b"\r\n".join([b"HTTP/1.1 400 Bad Request", *lines, b"", b""])
        self.transport.write(head + bytes(answer.body))
        self.transport.close()

    def _should_upgrade(self) -> bool:
        """uvicorn asks only if a request offers it, and then leaves the request to the parser."""
        return True

    def head_without_offer(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [self.parser.get_method() + b" " + self.url + b" HTTP/" + version]
        lines += [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._end_head()
        super().on_headers_complete()
        if self._stopping:
            self.cycle.keep_alive = False

    def shutdown(self) -> None:
        """Ends an idle connection after a short time. Closing it at once would lose a request in
        transit, and with it one of a callback's few tries.
        """
        self._stopping = True
        cycle: Any = self.cycle  # None before the first request
        if self._idle:
            first = cycle is None or self._head_timer is not None
            self.loop.call_later(FIRST_S if first else NEXT_S, self._close_if_idle)
        else:
            super().shutdown()

    def _end_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _close_if_idle(self) -> None:
        """Without an answer in progress and without a request at the gate."""
        if self._idle and not self._queued:
            self.transport.close()
