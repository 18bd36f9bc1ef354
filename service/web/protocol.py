"""uvicorn's protocol with an end to what a stranger may make it wait for and collect before there
is a request.
"""

import asyncio
from collections import deque
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 64 * 1024  # and what one read brings beyond it, at most 256 KiB
HEAD_S = 10.0
LAST_S, IDLE_S = (
    1.0,
    0.05,
    # at a stop: for the first request of a connection, and for another one that is on its way
    # already
)
CALLBACK = b"POST /callbacks/"  # so a request begins that goes before clients'
BEGUN = (
    100  # requests that are begun in one turn of the loop: as many as callbacks go into a commit
)


class Line:
    """Requests of a loop in the order in which they came.

    The loop reads from everybody who has sent something before anything else goes on: of thousands
    at once none would be answered before all are begun, and then for all it is too late.
    """

    _of: ClassVar["WeakKeyDictionary[asyncio.AbstractEventLoop, Line]"] = WeakKeyDictionary()

    def __init__(self) -> None:
        self.callbacks = 0  # of those that wait
        self._begun = 0
        self._waiting: deque[tuple[BoundedHeads, bool]] = deque()

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> "Line":
        return cls._of.setdefault(loop, cls())

    def passes(self, protocol: "BoundedHeads", *, callback: bool) -> bool:
        """Whether it may begin now; else `begin` is called when it is its turn."""
        if not self._begun and not self._waiting:
            asyncio.get_running_loop().call_soon(self._next)
        if self._waiting or self._begun >= BEGUN:
            self._waiting.append((protocol, callback))
            self.callbacks += callback
            return False
        self._begun += 1
        return True

    def _next(self) -> None:
        self._begun = min(BEGUN, len(self._waiting))
        if self._begun:  # before they begin: if one broke off, all others would wait for ever
            asyncio.get_running_loop().call_soon(self._next)
        for _ in range(self._begun):
            protocol, callback = self._waiting.popleft()
            self.callbacks -= callback
            protocol.begin()


class BoundedHeads(HttpToolsProtocol):
    """A request's line and headers have a limit in bytes (400) and in seconds (the connection
    ends); without a first byte a connection lasts as long as an idle one. At a stop it gets an
    answer to the request that it was opened for.
    """

    _size = 0
    _late: asyncio.TimerHandle | None = None  # set while a head is being read
    _stopping = False
    _held = b""  # the beginning of a request that waits in the line

    # # as uvicorn's own
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._line = Line.of(self.loop)
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._held:
            self._held += data
        elif (
            self._late
            or not self._idle
            or self._line.passes(self, callback=data.startswith(CALLBACK))
        ):
            self._read(data)
        else:
            self._held = data
            self._unset_keepalive_if_required()
            self.transport.pause_reading()

    def begin(self) -> None:
        """Reads what was held back."""
        data, self._held = self._held, b""
        if not self.transport.is_closing():
            self.transport.resume_reading()
            self._read(data)

    @property
    def _idle(self) -> bool:
        cycle: Any = self.cycle
        return cycle is None or cycle.response_complete

    def _read(self, data: bytes) -> None:
        reading = self._late
        super().data_received(data)
        if self._late is not None and self._late is reading:
            self._size += len(data)
            if self._size > MAX_HEAD:
                self._end_head()
                self.send_400_response("The request's line and headers are too long.")
        if (
            self._idle and self._late is None and self.timeout_keep_alive_task is None
        ):  # what came began no request
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._size, self._late = 0, self.loop.call_later(HEAD_S, self._give_up)

    def on_headers_complete(self) -> None:
        self._end_head()
        super().on_headers_complete()
        if self._stopping:
            self.cycle.keep_alive = False

    def shutdown(self) -> None:
        """Ends what is idle, but not at once: with a request that is on its way a callback would
        lose one of its few tries.
        """
        self._stopping = True
        cycle: Any = self.cycle
        if self._idle:
            self.loop.call_later(LAST_S if cycle is None or self._late else IDLE_S, self._give_up)
        else:
            super().shutdown()

    def _end_head(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _give_up(self) -> None:
        if self._idle and not self._held:  # else an answer to the request before it is on its way
            self.transport.close()
