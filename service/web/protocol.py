"""uvicorn's protocol with an end to what a stranger may make it wait for and collect before there is a request."""

import asyncio
from collections import deque
from typing import Any
from weakref import WeakKeyDictionary

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 64 * 1024  # and what one read brings beyond it, at most 256 KiB
HEAD_S = 10.0
LAST_S, IDLE_S = 1.0, 0.05  # at a stop: for the first request of a connection, and for another one that is on its way already
BEGUN = 100  # new connections that are listened to in one turn of the loop: as many as callbacks go into a commit


class Line:
    """New connections of a loop, in the order in which they came.

    The loop reads from everybody who has sent something before anything else goes on: of thousands at once none would be answered before
    all are begun, and then for all it is too late.
    """

    _of: "WeakKeyDictionary[asyncio.AbstractEventLoop, Line]" = WeakKeyDictionary()

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Transport] = deque()

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> "Line":
        return cls._of.setdefault(loop, cls())

    def join(self, transport: asyncio.Transport) -> None:
        transport.pause_reading()
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._next)
        self._waiting.append(transport)

    def _next(self) -> None:
        for _ in range(min(BEGUN, len(self._waiting))):
            transport = self._waiting.popleft()
            if not transport.is_closing():
                transport.resume_reading()
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._next)


class BoundedHeads(HttpToolsProtocol):
    """A request's line and headers have a limit in bytes (400) and in seconds (the connection ends); without a first byte a connection
    lasts as long as an idle one. At a stop it gets an answer to the request that it was opened for.
    """

    _size = 0
    _late: asyncio.TimerHandle | None = None  # set while a head is being read
    _stopping = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
        Line.of(self.loop).join(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        reading = self._late
        super().data_received(data)
        if self._late is not None and self._late is reading:
            self._size += len(data)
            if self._size > MAX_HEAD:
                self._end_head()
                self.send_400_response("The request's line and headers are too long.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._size, self._late = 0, self.loop.call_later(HEAD_S, self._give_up)

    def on_headers_complete(self) -> None:
        self._end_head()
        super().on_headers_complete()
        if self._stopping:
            self.cycle.keep_alive = False

    def shutdown(self) -> None:
        """Ends what is idle, but not at once: with a request that is on its way a callback would lose one of its few tries."""
        self._stopping = True
        cycle: Any = self.cycle
        if cycle is None or cycle.response_complete:
            self.loop.call_later(LAST_S if cycle is None or self._late else IDLE_S, self._give_up)
        else:
            super().shutdown()

    def _end_head(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _give_up(self) -> None:
        cycle: Any = self.cycle
        if cycle is None or cycle.response_complete:  # else an answer to the request before it is on its way
            self.transport.close()
