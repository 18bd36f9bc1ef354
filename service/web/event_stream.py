"""Events as server-sent events (WHATWG HTML, 9.2): for as long as the reader stays, its key counts
and the process runs.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Send

from service.errors import ApiError, StoreUnavailable
from service.events.tail import Gone, StreamFilter, Tail
from service.ids import sequence_text

STREAMS = 2000  # of one process
CHECK_S, COMMENT_S = 1.5, 15.0  # the first: how often a stream asks whether its key still counts
STALL_S = 60.0  # a reader that takes nothing for so long is gone
RETRY_MS = 1000  # before a reader comes back
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


class Stream(StreamingResponse):
    media_type = "text/event-stream"

    async def stream_response(self, send: Send) -> None:
        async def in_time(message: object) -> None:
            async with asyncio.timeout(STALL_S):
                await send(message)  # type: ignore[arg-type]

        with suppress(TimeoutError):
            await super().stream_response(in_time)


def stream(
    request: Request,
    tail: Tail,
    after: int | None,
    wanted: StreamFilter,
    allowed: Callable[[], Awaitable[object]],
) -> Response:
    """`allowed` raises ApiError once the reader's key does not count any more. ApiError 503: there
    are too many streams already.
    """
    if tail.streams >= STREAMS:
        raise ApiError(
            503, "overloaded", f"this process has {STREAMS} streams already", retry_after=1
        )
    if request.method == "HEAD":
        return Response(headers=HEADERS, media_type=Stream.media_type)
    return Stream(frames(tail, after, wanted, allowed), headers=HEADERS)


async def frames(
    tail: Tail, after: int | None, wanted: StreamFilter, allowed: Callable[[], Awaitable[object]]
) -> AsyncIterator[str]:
    clock = asyncio.get_running_loop().time
    with (
        tail.open(),
        suppress(ApiError, StoreUnavailable),
    ):  # the reader comes back, and is told then
        yield f"retry: {RETRY_MS}\n\n"
        said = checked = clock()
        async for found in tail.follow(after, wanted, CHECK_S):
            if clock() - checked >= CHECK_S:
                await allowed()
                checked = clock()
            if isinstance(found, Gone):
                yield f'event: resync\ndata: {{"sequence":"{sequence_text(found.oldest)}"}}\n\n'
            elif found:
                yield "".join(
                    f"id: {sequence_text(each.sequence)}\nevent: {each.type}\ndata:"
                    f" {each.document}\n\n"
                    for each in found
                )
            elif clock() - said < COMMENT_S - CHECK_S / 2:
                continue
            else:
                yield ": nothing new\n\n"
            said = clock()
