"""The upstream and the receiver of all contenders: `python -m tests.bench.peers.upstream HELD
ANSWER_S [PICTURE]`. PICTURE is a file, whose content is every result. With `none` every task fails.

An upstream as documented: each submission is a new paid task, also with the idempotency key of
another. The task exists from the moment of its request, and the answer leaves `ANSWER_S` later.
With `called` the callback comes half a second after the answer, and again after 1, 2 and 4 s. With
`held` none is sent: the bench sends them itself.

It notes all that reaches it. `GET /bench/seen` has the orders by prompt (`[[upstream's id, callback
URL, time], …]`), the events in the order of their arrival (`[time, headers, body]`) and the ids
whose callback was answered with 2xx. Times are those of the machine's monotonic clock.
"""

import asyncio
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import uvloop
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from service.net.egress_client import Egress, Rules
from service.upstreams.sandbox.callback_sender import CallbackAttempt, CallbackSender
from tests.bench.servers import answer, picture
from tests.processes import LOOPBACK

MADE_S, RETRIES_S = 0.5, (1, 2, 4)
SIGNED = ("webhook-id", "webhook-timestamp", "webhook-signature")


def document(id: str, base_url: str, pictured: bool) -> dict[str, Any]:
    """A task that has ended, as callbacks and queries show it."""
    if pictured:
        results = [f"{base_url}files/{id}/0.jpeg"]
        return {"id": id, "status": "completed", "progress": 100, "results": results}
    error = {"code": "content_policy_violation", "message": "refused", "type": "task_error"}
    return {"id": id, "status": "failed", "progress": 100, "results": [], "error": error}


class Upstream:
    def __init__(self, called: bool, answer_s: float, picture: bytes | None) -> None:
        self.called = called
        self.answer_s = answer_s
        self.picture = picture
        self.orders: defaultdict[str, list[tuple[str, str, float]]] = defaultdict(list)
        self.events: list[tuple[float, dict[str, str], str]] = []
        self.taken: list[str] = []  # whose callback was answered
        self.made = 0
        self.calls: set[asyncio.Task[None]] = set()
        self.egress = Egress(Rules("bench", networks=(ip_network(LOOPBACK),)))
        self.sender = CallbackSender(self.egress, 10, RETRIES_S, time.time)

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        async with self.egress:
            yield
            for call in self.calls:
                call.cancel()

    def app(self) -> Starlette:
        routes = [
            Route("/v1/images/generations", self.submit, methods=["POST"]),
            Route("/v1/tasks/{id}", self.query),
            Route("/files/{id}/0.jpeg", self.file),
            Route("/receiver", self.receive, methods=["POST"]),
            Route("/bench/counts", self.counts),
            Route("/bench/seen", self.seen),
            Route("/bench/picture", self.file),
        ]
        return Starlette(routes=routes, lifespan=self.lifespan)

    def document_of(self, id: str, request: Request) -> dict[str, Any]:
        return document(id, str(request.base_url), self.picture is not None)

    async def submit(self, request: Request) -> Response:
        body = await request.json()
        self.made += 1
        id, url = f"task-unified-{self.made}", body["callback_url"]
        self.orders[body["prompt"]].append((id, url, time.monotonic()))
        if self.called:
            call = asyncio.create_task(self.call(url, self.document_of(id, request)))
            self.calls.add(call)
            call.add_done_callback(self.calls.discard)
        await asyncio.sleep(self.answer_s)
        usage = {"billing_rule": "per_call", "credits_reserved": 1}
        return JSONResponse({"id": id, "status": "pending", "progress": 0, "usage": usage})

    async def call(self, url: str, document: dict[str, Any]) -> None:
        await asyncio.sleep(self.answer_s + MADE_S)
        body = JSONResponse(document).body

        def record(attempt: CallbackAttempt) -> None:
            if attempt.status is not None and 200 <= attempt.status < 300:
                self.taken.append(document["id"])

        await self.sender.send(url, [[bytes(body)]], record)

    async def query(self, request: Request) -> Response:
        return JSONResponse(self.document_of(request.path_params["id"], request))

    async def file(self, _: Request) -> Response:
        return Response(self.picture, media_type="image/jpeg")

    async def receive(self, request: Request) -> Response:
        body = await request.body()
        headers = {name: request.headers.get(name, "") for name in SIGNED}
        self.events.append((time.monotonic(), headers, body.decode()))
        return Response(status_code=204)

    async def counts(self, _: Request) -> Response:
        return JSONResponse({"orders": len(self.orders), "events": len(self.events)})

    async def seen(self, _: Request) -> Response:
        return JSONResponse({"orders": self.orders, "events": self.events, "taken": self.taken})


if __name__ == "__main__":
    file = sys.argv[3] if len(sys.argv) > 3 else None
    made = picture() if file is None else None if file == "none" else Path(file).read_bytes()
    uvloop.run(answer(Upstream(sys.argv[1] == "called", float(sys.argv[2]), made).app()))
