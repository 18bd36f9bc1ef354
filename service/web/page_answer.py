"""The answer that has a page of a list."""

import json
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import Response

from service.web.auth import caller_of
from service.web.context import context_of
from service.web.key_shares import HoldingResponse

PIECE = 64 << 10  # bytes


def page_answer(request: Request, documents: list[bytes], **rest: object) -> Response:
    """`{"data": [documents], …rest}`. A long one is sent in pieces, each of which is freed once it
    is on its way: a slow reader holds the rest of the page, and no second copy of it.

    Raises ApiError 429 or 503 while too many long ones are on their way.
    """
    begin, end = b'{"data":[', f"],{json.dumps(rest, separators=(',', ':'))[1:]}".encode()
    length = len(begin) + sum(map(len, documents)) + max(0, len(documents) - 1) + len(end)
    if length <= PIECE:
        body = begin + b",".join(documents) + end
        return Response(body, media_type="application/json")

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
