"""Documents that many requests share. They are encoded once.

A route that needs no key costs at most 1 ms of the event loop, because strangers may flood it.
"""

import asyncio
import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from functools import cache

from starlette.requests import Request
from starlette.responses import Response

from service.strict_json import JSON


def has_tag(tags: str, etag: str) -> bool:
    """Whether `If-None-Match` contains this entity tag. A weak one counts too."""
    return tags.strip() == "*" or etag in [
        tag.strip().removeprefix("W/") for tag in tags.split(",")
    ]


@cache
def tag_of(body: bytes) -> str:
    return f'"{hashlib.sha256(body).hexdigest()[:32]}"'


def tagged(request: Request, body: bytes, media_type: str, headers: Mapping[str, str]) -> Response:
    """The body with its entity tag, or 304 for a client that has it."""
    headers = {**headers, "ETag": tag_of(body)}
    if has_tag(request.headers.get("if-none-match", ""), headers["ETag"]):
        return Response(status_code=304, headers=headers)
    return Response(body, headers=headers, media_type=media_type)


class Published:
    """A JSON document. The first request has it built, in a thread: that takes up to 80 ms.
    Requests that come meanwhile wait for it.
    """

    def __init__(self, build: Callable[[], JSON]) -> None:
        self._build, self._body, self._building = build, b"", threading.Lock()

    def _encode(self) -> bytes:
        with self._building:
            if not self._body:
                text = json.dumps(self._build(), separators=(",", ":"), ensure_ascii=False)
                self._body = text.encode()
        return self._body

    async def answer(self, request: Request) -> Response:
        body = self._body or await asyncio.to_thread(self._encode)
        return tagged(request, body, "application/json", {"Cache-Control": "no-cache"})
