"""Events as server-sent events (WHATWG HTML, 9.2), until the reader leaves, its key is revoked or
the process stops.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Send

from service.errors import ApiError, StoreUnavailable
from service.events.feed import Entry
from service.events.tail import Gone, StreamFilter, Tail
from service.ids import sequence_text

STREAMS = 2000  # of one process
CHECK_S, COMMENT_S = 1.5, 15.0  # CHECK_S: interval of the checks that the key is still valid
STALL_S = 60.0  # a reader that reads nothing for so long is gone
RETRY_MS = 1000  # before a reader reconnects
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


class Stream(StreamingResponse):
    media_type = "text/event-stream"

    async def stream_response(self, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(STALL_S):
                await send(message)

        with suppress(TimeoutError):
            await super().stream_response(send_in_time)


def stream(
    request: Request,
    tail: Tail,
    after: int | None,
    wanted: StreamFilter,
    check_key: Callable[[], Awaitable[object]],
) -> Response:
    """`check_key` raises ApiError once the reader's key is invalid. Raises ApiError 503 if there
    are too many streams.
    """
    if tail.streams >= STREAMS:
        message = f"this process has {STREAMS} streams already"
        raise ApiError(503, "overloaded", message, retry_after=1)
    if request.method == "HEAD":
        return Response(headers=HEADERS, media_type=Stream.media_type)
    return Stream(frames(tail, after, wanted, check_key), headers=HEADERS)


async def frames(
    tail: Tail, after: int | None, wanted: StreamFilter, check_key: Callable[[], Awaitable[object]]
) -> AsyncIterator[str | bytes]:
    clock = asyncio.get_running_loop().time
    # On an error the stream ends. The reader reconnects, and gets the error as a response.
    with tail.open(), suppress(ApiError, StoreUnavailable):
        yield f"retry: {RETRY_MS}\n\n"
        sent = checked = clock()
        async for entries in tail.follow(after, wanted, CHECK_S):
            if clock() - checked >= CHECK_S:
                await check_key()
                checked = clock()
            if isinstance(entries, Gone):
                yield f'event: resync\ndata: {{"sequence":"{sequence_text(entries.oldest)}"}}\n\n'
            elif entries:
                yield b"".join(map(frame, entries))
            elif clock() - sent < COMMENT_S - CHECK_S / 2:
                continue
            else:
                yield ": nothing new\n\n"
            sent = clock()


def frame(entry: Entry) -> bytes:
    head = f"id: {sequence_text(entry.sequence)}\nevent: {entry.type}\ndata: "
    return head.encode() + entry.document + b"\n\n"
