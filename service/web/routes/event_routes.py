"""Events after a sequence, as pages or as a stream of server-sent events (WHATWG HTML, 9.2)."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, suppress

import structlog
from starlette.requests import Request
from starlette.responses import Response

from service.db.list_indexes import COMMON
from service.errors import ApiError, StoreUnavailable, invalid_request
from service.events.documents import type_matches
from service.events.feed import Entry, outbox_end, read_events
from service.events.tail import Gone, StreamFilter, Tail
from service.ids import sequence_text
from service.upstreams.field_values import shown
from service.web.auth import caller_of
from service.web.bodies import asks_for, query_seconds, query_text
from service.web.context import context_of
from service.web.event_schemas import EVENT_TYPES, known_pattern
from service.web.key_shares import HoldingResponse
from service.web.list_page import page_answer, query_limit
from service.web.parameters import MAX_TYPES, MAX_WAIT_S, SEQUENCE

log = structlog.get_logger()

STOPPING_S = 1.0
CHECK_S, COMMENT_S = 1.5, 15.0  # CHECK_S: interval of the checks that the key is still valid
RETRY_MS = 1000  # before a reader reconnects
MEDIA_TYPE = "text/event-stream"
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


def sequence(text: str | None, param: str) -> int | None:
    if text is None:
        return None
    if not re.fullmatch(SEQUENCE, text):
        message = (
            f"{param} must be a sequence that an answer gave: up to 20 digits, not {text[:40]!r}"
        )
        raise invalid_request(message, param)
    return int(text)


def event_types(request: Request) -> list[str]:
    types = [type for type in ",".join(request.query_params.getlist("type")).split(",") if type]
    if len(types) > MAX_TYPES:
        raise invalid_request(f"type names at most {MAX_TYPES} types, not {len(types)}", "type")
    names = []
    for pattern in types:
        try:
            names += types_of(known_pattern(pattern))
        except ValueError as error:
            raise invalid_request(f"type {error}, not {shown(pattern)}", "type") from None
    return names


def types_of(pattern: str) -> list[str]:
    """The types that the pattern means. A pattern of common types stays, as those have an index."""
    types = [type for type in EVENT_TYPES if type_matches(pattern, type)]
    return [pattern] if set(types) & set(COMMON) else types


async def events(request: Request) -> Response:
    """List events after a sequence."""
    context, caller = context_of(request), caller_of(request)
    owner = caller.sees
    after, types = sequence(query_text(request, "after"), "after"), event_types(request)
    task_id = query_text(request, "task")
    store, links = context.resources.store, context.resources.links

    async def check_key() -> None:
        await context.access.caller(request, *request.state.scopes)

    if asks_for(request, "text/event-stream"):
        # A reader that reconnects sends the last id, along with the `after` of its first request.
        last_id = request.headers.get("last-event-id")
        if last_id == "":  # as a reader sends it that has seen no event with an id
            log.info("events.position_empty", after=query_text(request, "after"))
        last = sequence(last_id or None, "Last-Event-ID")
        position = after if last is None else last
        if position is None:  # a client that has the headers misses no event of later
            position = await store.read(outbox_end)
        return stream(request, position, StreamFilter(owner, types, task_id), check_key)
    stopping, wait_s = store.signals.stopping, query_seconds(request, "wait", MAX_WAIT_S)
    limit, gone = query_limit(request), request.is_disconnected
    with ExitStack() as waiting:
        if wait_s:
            waiting.enter_context(context.shedder.polls.take(caller.owner, caller.key))
            waiting.enter_context(context.shedder.idle())
        entries, last, resync = await read_events(
            store, links, owner, after, limit, types, task_id, wait_s, gone
        )
        # During a stop no response is held. An immediate one would make the client ask in a loop.
        if stopping and not entries:
            await asyncio.sleep(min(wait_s, STOPPING_S))
    if wait_s:
        await check_key()  # the key may have been revoked meanwhile
    documents = [entry.document for entry in entries]
    return page_answer(request, documents, next_after=sequence_text(last), resync=resync)


def stream(
    request: Request, after: int, filter: StreamFilter, check_key: Callable[[], Awaitable[object]]
) -> Response:
    """`check_key` raises ApiError once the key is invalid. Too many streams raise 429 or 503."""
    if request.method == "HEAD":
        return Response(headers=HEADERS, media_type=MEDIA_TYPE)
    caller, context = caller_of(request), context_of(request)
    share = context.shedder.streams.take(caller.owner, caller.key)
    content = frames(context.tail, after, filter, check_key)
    return HoldingResponse(share, content, headers=HEADERS, media_type=MEDIA_TYPE)


async def frames(
    tail: Tail, after: int, filter: StreamFilter, check_key: Callable[[], Awaitable[object]]
) -> AsyncIterator[str | bytes]:
    clock = asyncio.get_running_loop().time
    # Only events end with a blank line. Many readers dispatch an empty event at any other.
    # On an error the stream ends. The reader reconnects, and gets the error as a response.
    with tail.open(), suppress(ApiError, StoreUnavailable):
        yield f"retry: {RETRY_MS}\n"
        sent = checked = clock()
        async for entries in tail.follow(after, filter, CHECK_S):
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
