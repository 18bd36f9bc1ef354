"""Reads responses for aiohttp, in place of its parser, which refuses what browsers and curl read.

The caller gets the status and the fields as soon as the head is complete. A body that breaks ends
there and leaves its reason in `ResponseEnd`, so that a caller may use the part that arrived.
"""

import re
from asyncio import get_running_loop
from collections.abc import Sequence
from dataclasses import dataclass

from aiohttp import HttpVersion11, StreamReader
from aiohttp.client_proto import ResponseHandler
from aiohttp.helpers import BaseTimerContext
from aiohttp.http import RawResponseMessage
from aiohttp.http_exceptions import BadHttpMessage
from aiohttp.streams import EMPTY_PAYLOAD
from multidict import CIMultiDict, CIMultiDictProxy

from service.net.response_head import MAX_HEAD, MAX_LINES, ResponseHead, read_head, status_of

Parsed = tuple[Sequence[tuple[RawResponseMessage, StreamReader]], bool, bytes]
NOTHING: Parsed = ((), False, b"")
BEGIN, EMPTY_LINE = b"HTTP/1.", re.compile(rb"\n\r?\n")
MAX_LINE = 1 << 16  # bytes of a chunk's size with its extensions
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;.*)?\r?")
# The guard reads the raw fields alone. So aiohttp parses no cookies.
NO_FIELDS: CIMultiDictProxy[str] = CIMultiDictProxy(CIMultiDict())


@dataclass(slots=True)
class ResponseEnd:
    """How a response ended. `problem`: why its body is not whole, None while it may still be."""

    problem: str | None = None


class ResponseParser:
    """The parser of one response, with the methods that `ResponseHandler` calls.

    A connection is kept for another request only if the head is `reusable` and the body ends
    exactly where its framing says. Bytes behind the response close it, also while it is idle.
    """

    def __init__(
        self,
        protocol: ResponseHandler,
        end: ResponseEnd,
        timer: BaseTimerContext | None,
        buffer_size: int,
        *,
        without_body: bool,
    ) -> None:
        self._protocol = protocol
        self._end = end
        self._timer = timer
        self._buffer_size = buffer_size
        self._without_body = without_body
        self._buffer = bytearray()  # of the head
        self._searched = 0  # bytes of the buffer
        self._lines = 0  # of all heads
        self._left = MAX_HEAD  # bytes that the heads may still have
        self._head: ResponseHead | None = None  # the final one
        self._body = EMPTY_PAYLOAD
        self._missing = 0  # bytes of the body, or of its current chunk
        self._line = b""  # the beginning of a chunk's size
        self._behind_chunk = False
        self._done = False

    def feed_data(self, data: bytes) -> Parsed:
        """Raises BadHttpMessage if there is no response."""
        if self._done:
            if data:
                self._protocol.force_close()
                if self._protocol.transport is not None:
                    self._protocol.transport.close()
            return NOTHING
        if self._head is not None:
            self._feed_body(data)
            return NOTHING
        self._buffer += data
        head = self._next_head()
        while head is not None and head.status < 200:  # interim
            head = self._next_head()
        if head is None:
            return NOTHING
        message, rest = self._start(head), bytes(self._buffer)
        self._buffer.clear()
        self._feed_body(rest)
        return ((message, self._body),), False, b""

    def feed_eof(self) -> None:
        """The connection has ended. If it ended in the head, the status still counts."""
        if self._head is None:
            head = self._broken_head("the response ended in its head")
            if head is not None:
                self._protocol.feed_data((self._start(head), self._body))
            return
        if not self._done:
            whole = self._head.length is None and not self._head.chunked
            self._finish(None if whole else "the response was cut")

    def pause_reading(self) -> None:
        """The body's buffer is full. All received bytes are in it, so nothing is held back here."""

    def _next_head(self) -> ResponseHead | None:
        """The next head in the buffer. None: it is not complete."""
        buffer = self._buffer
        if buffer[:1].isspace():
            del buffer[: len(buffer) - len(buffer.lstrip(b"\r\n"))]
        if buffer[: len(BEGIN)].upper() != BEGIN[: len(buffer)]:
            raise BadHttpMessage("it is no response of HTTP/1.1")
        match = EMPTY_LINE.search(buffer, max(0, self._searched - 2))
        size = match.end() if match else len(buffer)
        self._lines += buffer.count(b"\n", self._searched, size)
        self._searched = size
        if size > self._left or self._lines > MAX_LINES:
            head = self._broken_head("the head of the response is too long")
            if head is None:
                raise BadHttpMessage("the head of the response is too long")
            return head
        if match is None:
            return None
        text = bytes(buffer[:size])
        del buffer[:size]
        self._searched = 0
        self._left -= size
        try:
            return read_head(text, without_body=self._without_body)
        except ValueError as error:
            raise BadHttpMessage(str(error)) from error

    def _broken_head(self, problem: str) -> ResponseHead | None:
        """A head of which only the status counts. None: it does not even have one."""
        line, complete, _ = self._buffer.partition(b"\n")
        self._buffer.clear()
        try:
            status = status_of(bytes(line)) if complete else 0
        except ValueError:
            status = 0
        return ResponseHead(status, problem=problem) if status >= 200 else None

    def _start(self, head: ResponseHead) -> RawResponseMessage:
        self._head, self._missing = head, head.length or 0
        if head.problem or head.length == 0:
            self._finish(head.problem)
        else:
            self._body = StreamReader(
                self._protocol, self._buffer_size, timer=self._timer, loop=get_running_loop()
            )
        return RawResponseMessage(
            version=HttpVersion11,
            code=head.status,
            reason="",
            headers=NO_FIELDS,
            raw_headers=head.fields,
            should_close=not head.reusable,
            compression=None,
            upgrade=False,
            chunked=head.chunked,
        )

    def _feed_body(self, data: bytes) -> None:
        assert self._head is not None
        if self._done:
            if data:
                self._protocol.force_close()
        elif self._head.chunked:
            self._feed_chunks(data)
        elif self._head.length is None:
            self._body.feed_data(data)
        else:
            self._body.feed_data(data[: self._missing])
            surplus = len(data) > self._missing
            self._missing -= len(data)
            if self._missing <= 0:
                self._finish(reusable=not surplus)

    def _feed_chunks(self, data: bytes) -> None:
        data, at, body = self._line + data, 0, bytearray()
        reusable, end, problem = True, False, None
        self._line = b""
        while at < len(data) and not end:
            if self._missing:
                piece = data[at : at + self._missing]
                body += piece
                at += len(piece)
                self._missing -= len(piece)
                self._behind_chunk = True
                continue
            stop = data.find(b"\n", at)
            if stop < 0:
                self._line = data[at:]
                break
            line, at = data[at:stop], stop + 1
            reusable = reusable and line[-1:] == b"\r"
            if self._behind_chunk and line in (b"", b"\r"):
                self._behind_chunk = False
                continue
            size = None if self._behind_chunk else CHUNK_SIZE.fullmatch(line)
            self._missing = int(size[1], 16) if size else 0
            problem = None if size else "a chunk of the response is malformed"
            end = not self._missing
        if len(self._line) > MAX_LINE:
            end, problem = True, "a chunk of the response is malformed"
        if not reusable:
            self._protocol.force_close()
        if body:
            self._body.feed_data(bytes(body))
        if end:  # trailers have no reader, so the parser does not wait for them
            self._finish(problem, reusable=data[at:] == b"\r\n")

    def _finish(self, problem: str | None = None, *, reusable: bool = True) -> None:
        self._done, self._end.problem = True, problem
        if problem or not reusable:
            self._protocol.force_close()
        self._body.feed_eof()
