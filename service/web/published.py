"""Documents that many requests share. They are encoded once.

A route that needs no key costs at most 1 ms of the event loop, because strangers may flood it.
"""

import asyncio
import hashlib
import json
import threading
from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import Response

from service.strict_json import JSON


def has_tag(tags: str, etag: str) -> bool:
    """Whether `If-None-Match` contains this entity tag. A weak one counts too."""
    return tags.strip() == "*" or etag in [
        tag.strip().removeprefix("W/") for tag in tags.split(",")
    ]


class Published:
    """A JSON document as bytes, with an entity tag made from them. The first request has it built,
    in a thread, because that takes up to 80 ms.
    """

    def __init__(self, build: Callable[[], JSON]) -> None:
        self._build, self._building = build, threading.Lock()
        self._body, self._etag = b"", ""

    def _make(self) -> None:
        with self._building:
            if not self._etag:
                document = json.dumps(self._build(), separators=(",", ":"), ensure_ascii=False)
                self._body = document.encode()
                self._etag = f'"{hashlib.sha256(self._body).hexdigest()[:32]}"'

    async def answer(self, request: Request) -> Response:
        if not self._etag:
            await asyncio.to_thread(self._make)
        headers = {"ETag": self._etag, "Cache-Control": "no-cache"}
        if has_tag(request.headers.get("if-none-match", ""), self._etag):
            return Response(status_code=304, headers=headers)
        return Response(self._body, headers=headers, media_type="application/json")
