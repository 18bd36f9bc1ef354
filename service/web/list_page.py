"""A page of a list: its limit and cursor in the query, and its answer."""

import json
import re
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import TypeVar

from sqlalchemy import Connection, Table
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.db.counters import numbered_page
from service.db.paging import PAGE_BYTES, Row, Selection, courtesy, in_batches, that_fit
from service.errors import ApiError, invalid_request
from service.strict_json import JSON, compact_json
from service.upstreams.field_values import shown
from service.web.auth import caller_of
from service.web.bodies import query_owner, query_text, query_time
from service.web.context import context_of, resources_of
from service.web.key_shares import HoldingResponse
from service.web.parameters import CURSOR, LIMIT, MAX_LIMIT

Item = TypeVar("Item")
Position = tuple[int, str]  # time and id of the last item

PIECE = 64 << 10  # bytes
position_of: Callable[[Row], Position] = itemgetter("created_at", "id")


def query_limit(
    request: Request, name: str = "limit", default: int = LIMIT, most: int = MAX_LIMIT
) -> int:
    text = request.query_params.get(name, str(default))
    if not re.fullmatch("[0-9]{1,9}", text) or not 1 <= int(text) <= most:
        message = f"{name} must be a whole number from 1 to {most}, not {shown(text)}"
        raise invalid_request(message, name)
    return int(text)


def read_cursor(request: Request) -> Position | None:
    """The position after which the list continues. Clients treat it as opaque."""
    text = query_text(request, "cursor", pattern=CURSOR, such_as="one that an answer gave")
    if text is None:
        return None
    time, _, id = text.partition(".")
    return int(time), id


async def page(
    request: Request,
    rows: Callable[[Connection, Selection], Sequence[Item]],
    position: Callable[[Item], Position],
    shown: Callable[[Item], JSON],
) -> Response:
    """One page of a list: at most `limit` items and 4 MiB. One item more shows that it goes on."""
    limit, owner, cursor = query_limit(request), query_owner(request), None
    since, until = query_time(request, "since"), query_time(request, "until")
    first = Selection(owner, None, read_cursor(request), since, until)

    def size(item: tuple[Position, bytes]) -> int:
        return len(item[1]) + 1  # with a comma

    def read(connection: Connection) -> tuple[list[tuple[Position, bytes]], bool]:
        def some(after: Position | None, count: int) -> list[tuple[Position, bytes]]:
            items = rows(connection, replace(first, after=after, limit=count))
            return [(position(item), compact_json(shown(item)).encode()) for item in items]

        polite = courtesy(connection)
        entries = in_batches(some, lambda item: item[0], size, first.after, limit + 1, polite)
        return that_fit(entries, size, PAGE_BYTES)

    items, more = await resources_of(request).store.read(read)
    if more or len(items) > limit:
        items = items[:limit]
        cursor = "{}.{}".format(*items[-1][0])
    return page_answer(request, [document for _, document in items], next_cursor=cursor)


async def numbered_list(
    request: Request, table: Table, ids: str, shown: Callable[[Row], JSON], **where: str | None
) -> Response:
    """Rows of a sequence, oldest first, after the row that the query names in `after`."""
    limit = query_limit(request)
    after = query_text(request, "after", pattern=ids, such_as="the id of an entry")
    store = resources_of(request).store
    sees = caller_of(request).sees
    rows = await store.read(numbered_page, table, after, limit + 1, sees, **where)
    if rows is None:
        raise ApiError(
            404, "entry_not_found", "after: no entry that you see has that id", param="after"
        )
    cursor = rows[limit - 1]["id"] if len(rows) > limit else None
    return JSONResponse({"data": [shown(row) for row in rows[:limit]], "next_cursor": cursor})


def page_answer(request: Request, documents: list[bytes], **rest: object) -> Response:
    """`{"data": [documents], …rest}`. A long one is sent in pieces, each of which is freed once it
    is on its way: a slow reader holds the rest of the page, and no second copy of it.

    Raises ApiError 429 or 503 while too many long ones are on their way.
    """
    begin, end = b'{"data":[', f"],{json.dumps(rest, separators=(',', ':'))[1:]}".encode()
    length = len(begin) + sum(map(len, documents)) + max(0, len(documents) - 1) + len(end)
    if length <= PIECE:
        return Response(begin + b",".join(documents) + end, media_type="application/json")

    async def pieces() -> AsyncIterator[bytes]:
        documents.reverse()
        piece = bytearray(begin)
        while documents:
            piece += documents.pop() + b"," * bool(documents)
            if len(piece) >= PIECE:
                yield bytes(piece)
                piece.clear()
        yield bytes(piece + end)

    share = context_of(request).shedder.pages.take(caller_of(request).owner)
    headers = {"content-length": str(length)}
    return HoldingResponse(share, pieces(), headers=headers, media_type="application/json")
