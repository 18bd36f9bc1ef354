"""An upstream that answers as a test says, also in ways that the sandbox cannot, and records its
requests.
"""

import asyncio
import io
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from tests.world import Received, World

JSON = dict[str, Any]


def document(status: str, *results: str, id: str | None = None, **more: Any) -> JSONResponse:
    """A task as a query or the answer to a submission shows it."""
    return JSONResponse(
        {"status": status, "results": list(results), **({} if id is None else {"id": id}), **more}
    )


def failed(code: str, **more: Any) -> JSONResponse:
    return document(
        "failed", error={"code": code, "message": "it did not work", "type": "task_error"}, **more
    )


def error(status: int, code: str, **headers: str) -> JSONResponse:
    """The upstream's documented error."""
    body = {
        "error": {"code": code, "message": f"said {code}", "type": "some_error", "param": "size"}
    }
    return JSONResponse(
        body, status, {name.replace("_", "-"): value for name, value in headers.items()}
    )


def page(status: int) -> Response:
    """A gateway's page."""
    return Response(f"<html><h1>{status}</h1></html>", status, media_type="text/html")


def picture(format: str = "PNG", size: tuple[int, int] = (64, 48), shade: int = 90) -> bytes:
    made = io.BytesIO()
    Image.new("RGB", size, (shade, 20, 200)).save(made, format)
    return made.getvalue()


class Cut(Response):
    """Announces a body, sends `body` and ends the connection early."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [
            (name, str(len(self.body) + 1000).encode() if name == b"content-length" else value)
            for name, value in self.raw_headers
        ]
        await send({"type": "http.response.start", "status": self.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": self.body})


class After(Response):
    """An answer that is sent after `ready` returns, or not at all if the client
    disconnects first.
    """

    def __init__(self, ready: Callable[[], Awaitable[object]], answer: Response) -> None:
        super().__init__()
        self._ready = ready
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ready, left = (
            asyncio.ensure_future(self._ready()),
            asyncio.create_task(disconnected(receive)),
        )
        try:
            await asyncio.wait({ready, left}, return_when=asyncio.FIRST_COMPLETED)
            if ready.done():
                ready.result()
                await self._answer(scope, receive, send)
        finally:
            ready.cancel()
            left.cancel()


async def disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass  # ignores the rest of the request


@dataclass(slots=True)
class Upstream:
    """Answers from lists: `submits` by prompt, `queries` by upstream id, `files` by name. Each
    request gets the next answer of its list, and the last answer repeats.

    Without a list a submission is accepted, a task is processing and a file is 404. `received` has
    the submissions by prompt. `asked` counts the queries and downloads.
    """

    submits: dict[str, list[Response]] = field(default_factory=dict)
    queries: dict[str, list[Response]] = field(default_factory=dict)
    files: dict[str, list[Response]] = field(default_factory=dict)
    received: defaultdict[str, list[Received]] = field(default_factory=lambda: defaultdict(list))
    asked: Counter[str] = field(default_factory=Counter)
    _numbers: Iterator[int] = field(default_factory=lambda: count(1))

    @property
    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/images/generations", self._submit, methods=["POST"]),
                Route("/v1/tasks/{key}", self._query),
                Route("/files/{key}", self._file),
                Route("/v1/credits", self._credits),
            ]
        )

    async def _submit(self, request: Request) -> Response:
        body = await request.json()
        known = self.received[body["prompt"]]
        known.append(Received(request.url.path, dict(request.headers), await request.body()))
        accepted = document(
            "pending", id=f"task-unified-{next(self._numbers)}", usage={"credits_reserved": 2}
        )
        return nth(self.submits.get(body["prompt"]), len(known) - 1) or accepted

    async def _query(self, request: Request) -> Response:
        return self._next(self.queries, request) or document("processing")

    async def _credits(self, _: Request) -> Response:
        return JSONResponse({"success": True, "data": {"token": {"remaining_credits": 100}}})

    async def _file(self, request: Request) -> Response:
        return self._next(self.files, request) or error(404, "not_found")

    def _next(self, answers: Mapping[str, list[Response]], request: Request) -> Response | None:
        key = request.path_params["key"]
        self.asked[key] += 1
        return nth(answers.get(key), self.asked[key] - 1)


def nth(answers: list[Response] | None, number: int) -> Response | None:
    return answers[min(number, len(answers) - 1)] if answers else None


@dataclass(frozen=True)
class Watched:
    """A world whose upstream records what reaches it."""

    world: World
    upstream: Upstream
