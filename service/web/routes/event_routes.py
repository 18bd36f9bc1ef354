"""Events after a sequence, as pages or as a stream."""

import asyncio
import re
from contextlib import ExitStack

import structlog
from starlette.requests import Request
from starlette.responses import Response

from service.db.list_indexes import COMMON
from service.errors import invalid_request
from service.events.documents import type_matches
from service.events.feed import outbox_end, read_events
from service.events.tail import StreamFilter
from service.ids import sequence_text
from service.upstreams.field_values import shown
from service.web.auth import caller_of
from service.web.bodies import asks_for, query_seconds, query_text
from service.web.context import context_of
from service.web.event_schemas import EVENT_TYPES, known_pattern
from service.web.event_stream import stream
from service.web.list_page import page_answer, query_limit
from service.web.parameters import MAX_TYPES, MAX_WAIT_S, SEQUENCE

log = structlog.get_logger()

STOPPING_S = 1.0


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
        message = f"type names at most {MAX_TYPES} types, not {len(types)}"
        raise invalid_request(message, "type")
    found = []
    for pattern in types:
        try:
            found += types_of(known_pattern(pattern))
        except ValueError as error:
            raise invalid_request(f"type {error}, not {shown(pattern)}", "type") from None
    return found


def types_of(pattern: str) -> list[str]:
    """The types that the pattern means, or itself if common ones, which have an index, are so."""
    found = [type for type in EVENT_TYPES if type_matches(pattern, type)]
    return [pattern] if set(found) & set(COMMON) else found


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
        place = after if last is None else last
        if place is None:  # a client that has the headers misses no event of later
            place = await store.read(outbox_end)
        wanted = StreamFilter(owner, types, task_id)
        return stream(request, context.tail, place, wanted, check_key)
    stopping, wait_s = store.signals.stopping, query_seconds(request, "wait", MAX_WAIT_S)
    limit, gone = query_limit(request), request.is_disconnected
    with ExitStack() as waiting:
        if wait_s:
            waiting.enter_context(context.shedder.polls.take(caller.owner, caller.key))
            waiting.enter_context(context.shedder.idle())
        found, last, resync = await read_events(
            store, links, owner, after, limit, types, task_id, wait_s, gone
        )
        # During a stop no response is held. An immediate one would make the client ask in a loop.
        if stopping and not found:
            await asyncio.sleep(min(wait_s, STOPPING_S))
    if wait_s:
        await check_key()  # the key may have been revoked meanwhile
    documents = [entry.document for entry in found]
    return page_answer(request, documents, next_after=sequence_text(last), resync=resync)
