"""uvicorn's HTTP protocol, with limits on everything before a request's headers are complete."""

import asyncio
import fcntl
import termios
import time
from array import array
from contextlib import suppress
from functools import partial
from typing import Any

import httptools
from starlette.responses import JSONResponse
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from service.resources import new_id
from service.web.error_responses import error_body
from service.web.key_shares import SLOW_S, UnsentBytes, address_of
from service.web.overload import PriorityGate
from service.web.request_parser import RequestParser

MAX_HEAD = 64 * 1024  # bytes, plus the rest of one read, at most 256 KiB
MAX_HEADERS = 100
# The size of one read. Later bytes are parsed once the requests in it are answered.
SLICE = 4096  # bytes
HEAD_S = 10.0
# A reader that takes nothing for so long is gone. The server looks a few times in between.
WRITE_S, LOOKS = 30.0, 6
# At a stop, the time for the first request of a connection, and for a further one in transit.
FIRST_S, NEXT_S = 1.0, 0.05
CALLBACK = b"POST /callbacks/"


def unsent(transport: asyncio.Transport) -> int:
    """The bytes that the reader's machine has not taken yet, with the bytes in the kernel. The
    kernel asks for more only after megabytes, so a slow reader would seem to take nothing.
    """
    in_kernel = array("i", [0])
    with suppress(OSError):
        fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, in_kernel)
    return transport.get_write_buffer_size() + in_kernel[0]


class PipelineFlow(FlowControl):
    """Reads nothing while requests of the connection wait. A client may send thousands at once."""

    def __init__(self, protocol: "BoundedProtocol") -> None:
        super().__init__(protocol.transport)
        self._protocol = protocol

    def resume_reading(self) -> None:
        if not self._protocol.pipelined:
            super().resume_reading()


class BoundedProtocol(HttpToolsProtocol):
    """Limits a request's head in bytes and headers (400) and in seconds (the connection ends), and
    the seconds in which a reader of a response takes nothing.

    A connection without a first byte lasts as long as an idle one. At a stop, a connection still
    gets the answer to the request that it was opened for.
    """

    def __init__(
        self,
        config: Config,
        state: ServerState,
        app_state: dict[str, Any],
        gate: PriorityGate,
        unsent_bytes: UnsentBytes,
    ) -> None:
        super().__init__(config, state, app_state)
        self.parser = RequestParser(self)
        # A request behind one with `Connection: close` is no error, as in uvicorn.
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._gate, self._unsent = gate, unsent_bytes
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None  # set while a head is incomplete
        self._stopping = False
        self._queued = b""  # the beginning of a request that waits at the gate
        self._admitted = False  # the gate has let in the request that is being read
        self._behind = b""  # what follows requests that are not answered
        self._problem: str | None = None  # of the request's head
        self._answered: Any = None  # the request that is being answered, or was answered last
        self._write_timer: asyncio.TimerHandle | None = None  # set while the reader is behind
        self._since = self.loop.time()  # the last request, or the beginning of the next one

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's
        super().connection_made(transport)
        self.flow = PipelineFlow(self)
        transport.set_write_buffer_limits(high=0)  # `pause_writing` at the first byte that waits
        self.address = address_of(self.client)
        self._start_idle_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        self._end_write()
        self._unsent.release(self)
        self._unset_keepalive_if_required()
        super().connection_lost(exc)
        # uvicorn tells only the last one of several requests that were sent at once.
        if self._answered is not None and not self._answered.response_complete:
            self._answered.disconnected = True
            self._answered.message_event.set()

    @property
    def pipelined(self) -> bool:
        return bool(self.pipeline or self._behind)

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

    def abort(self) -> None:
        self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._end_write()
        self._look_at_writing(unsent(self.transport), LOOKS)
        self._unsent.hold(self, self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        self._end_write()
        self._unsent.release(self)
        super().resume_writing()

    def _look_at_writing(self, before: int, looks: int) -> None:
        """Ends the connection if as much is unsent as it was `LOOKS` looks before."""
        self._write_timer = None
        now = unsent(self.transport)
        looks = looks - 1 if now == before else LOOKS - 1
        if looks < 0:
            self.transport.abort()
        elif now:
            self._write_timer = self.loop.call_later(
                WRITE_S / LOOKS, self._look_at_writing, now, looks
            )

    def _end_write(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    @property
    def slow_since(self) -> float | None:
        """When it became idle or began a head that is not complete, if that is a while ago."""
        slow = self._idle and not self._queued and self.loop.time() - self._since >= SLOW_S
        return self._since if slow else None

    def data_received(self, data: bytes) -> None:
        if self._queued:
            self._queued += data
        elif self._behind:
            self._behind += data
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
        self._since = self.loop.time()
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if self._behind and not self.pipeline:
            data, self._behind = self._behind, b""
            self._read(data)
        self.flow.resume_reading()

    def _start_idle_timer(self) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._since = self.loop.time()
        self._end_head()  # of the same request with its offer to upgrade
        self._head_bytes, self._head_timer = 0, self.loop.call_later(HEAD_S, self._close_if_idle)

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self.headers) >= MAX_HEADERS:
            self._problem = f"The request has more than {MAX_HEADERS} headers."
            raise httptools.HttpParserError(self._problem)
        super().on_header(name, value)

    def send_400_response(self, msg: str) -> None:
        """An error like any other, to a request that the application never sees."""
        id = new_id("request", time.time_ns() // 1_000_000)
        body = error_body(400, "invalid_request", self._problem or msg, id)
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
