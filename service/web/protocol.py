"""uvicorn's protocol with an end to what a stranger may make it wait for and collect before there is a request."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 64 * 1024  # and what one read brings beyond it, at most 256 KiB
HEAD_S = 10.0


class BoundedHeads(HttpToolsProtocol):
    """A request's line and headers have a limit in bytes (400) and in seconds (the connection ends); without a first byte a connection
    lasts as long as an idle one.
    """

    _size = 0
    _late: asyncio.TimerHandle | None = None  # set while a head is being read

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

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

    def _end_head(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _give_up(self) -> None:
        cycle: Any = self.cycle
        if cycle is None or cycle.response_complete:  # else an answer to the request before it is on its way
            self.transport.close()
