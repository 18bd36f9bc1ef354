"""The answer that has a page of a list."""

import json
from collections.abc import AsyncIterator

from starlette.responses import Response, StreamingResponse

PIECE = 64 << 10  # bytes


def page_answer(documents: list[bytes], **rest: object) -> Response:
    """`{"data": [documents], …rest}`. A long one is sent in pieces, each of which is freed once it
    is on its way: a slow reader holds the rest of the page, and no second copy of it.
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

    headers = {"content-length": str(length)}
    return StreamingResponse(pieces(), headers=headers, media_type="application/json")
