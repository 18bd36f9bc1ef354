"""Events as server-sent events (WHATWG HTML, 9.2)."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress

from starlette.requests import Request
from starlette.responses import Response

from service.errors import ApiError, StoreUnavailable
from service.events.feed import Entry
from service.events.tail import Gone, StreamFilter, Tail
from service.ids import sequence_text
from service.web.auth import caller_of
from service.web.context import context_of
from service.web.key_shares import HoldingResponse

CHECK_S, COMMENT_S = 1.5, 15.0  # CHECK_S: interval of the checks that the key is still valid
RETRY_MS = 1000  # before a reader reconnects
MEDIA_TYPE = "text/event-stream"
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


def stream(
    request: Request,
    tail: Tail,
    after: int,
    wanted: StreamFilter,
    check_key: Callable[[], Awaitable[object]],
) -> Response:
    """`check_key` raises ApiError once the key is invalid. Too many streams raise 429 or 503."""
    if request.method == "HEAD":
        return Response(headers=HEADERS, media_type=MEDIA_TYPE)
    caller = caller_of(request)
    share = context_of(request).shedder.streams.take(caller.owner, caller.key)
    content = frames(tail, after, wanted, check_key)
    return HoldingResponse(share, content, headers=HEADERS, media_type=MEDIA_TYPE)


async def frames(
    tail: Tail, after: int, wanted: StreamFilter, check_key: Callable[[], Awaitable[object]]
) -> AsyncIterator[str | bytes]:
    clock = asyncio.get_running_loop().time
    # Only events end with a blank line. Many readers dispatch an empty event at any other.
    # On an error the stream ends. The reader reconnects, and gets the error as a response.
    with tail.open(), suppress(ApiError, StoreUnavailable):
        yield f"retry: {RETRY_MS}\n"
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
                yield ": nothing new\n"
            sent = clock()


def frame(entry: Entry) -> bytes:
    head = f"id: {sequence_text(entry.sequence)}\nevent: {entry.type}\ndata: "
    return head.encode() + entry.document + b"\n\n"
