"""The upstream of a chaos run, a process of its own.

It is the sandbox, and some of its answers are untidy. It lists every submission that it read at
`GET /chaos/posts`: `[[prompt, idempotency key, status or null], …]`. That list and the sandbox's
tasks show what was paid.
"""

import asyncio
import json
import sys
from decimal import Decimal
from ipaddress import ip_network
from operator import attrgetter
from pathlib import Path
from random import Random
from typing import Any, NoReturn

import uvloop
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.ops import logging
from service.upstreams.sandbox import SandboxOptions, create_sandbox
from service.upstreams.sandbox.answers import hang_up
from service.web.server import Server, bind, listening, stopping
from tests.api import SUBMIT
from tests.environment import START_S, clean_environment
from tests.launcher import Launcher
from tests.processes import LOOPBACK, UPSTREAM_KEY
from tests.untidy import CODINGS, FRAMING, LIMITS
from tests.waiting import wait_until

POSTS = "/chaos/posts"
DELAY_S = 0.5
UNTIDY = 0.1  # the share of answers


class Again:
    """Replays the body of a request that was read already. `transport` belongs to uvicorn. The
    sandbox closes it to lose an answer.
    """

    def __init__(self, receive: Receive, body: bytes) -> None:
        self.transport: asyncio.Transport = attrgetter("__self__.transport")(receive)
        self._receive, self._unread = receive, [body]

    async def receive(self) -> Message:
        body = self._unread.pop() if self._unread else None
        return await self._receive() if body is None else {"type": "http.request", "body": body}


class Noting:
    """Records each submission before the sandbox gets it, and the status of the answer if there is
    one.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.posts: list[list[Any]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("path") == POSTS:
            await JSONResponse(self.posts)(scope, receive, send)
            return
        if scope.get("path") != SUBMIT:
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            body = await request.body()
        except ClientDisconnect:
            return  # the request is incomplete and orders nothing
        post = [json.loads(body)["prompt"], request.headers["idempotency-key"], None]
        self.posts.append(post)

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                post[2] = message["status"]
            await send(message)

        await self.app(scope, Again(receive, body).receive, noted)


class Untidy:
    """Sends a tenth of the whole answers to the service in other bytes: with large headers, odd
    framing or a coding. The connection ends behind them.
    """

    def __init__(self, app: ASGIApp, chance: Random) -> None:
        self.app = app
        self.chance = chance
        self.shapes = [*LIMITS.values(), *CODINGS.values(), *FRAMING.values()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        agent = dict(scope.get("headers", ())).get(b"user-agent", b"")
        if not agent.startswith(b"Darkroom/") or self.chance.random() >= UNTIDY:
            await self.app(scope, receive, send)
            return
        held: list[Message] = []

        async def rewritten(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 200:
                held.append(message)
            elif held and not message.get("more_body"):
                shape = self.chance.choice(self.shapes)
                await hang_up(receive, shape.write(bytes(message["body"])))
            else:
                for each in (*held, message):
                    await send(each)
                held.clear()

        await self.app(scope, receive, rewritten)


async def serve(seed: int) -> None:
    options = SandboxOptions(
        api_key=UPSTREAM_KEY,
        networks=(ip_network(LOOPBACK),),
        delay_s=DELAY_S,
        credits=Decimal(1_000_000),
        seed=seed,
    )  # callbacks as documented: a timeout of 10 s and retries after 1, 2 and 4 s
    logging.configure("json", "warning", sys.stderr)
    bound = bind("127.0.0.1", 0)
    with stopping() as stop:
        app = Untidy(Noting(create_sandbox(options)), Random(f"{seed}/untidy"))
        async with listening(Server(app, bound, stop_s=1), stop):
            sys.stdout.write(f"{bound.getsockname()[1]}\n")
            sys.stdout.flush()
            await stop.wait()


async def upstream(launcher: Launcher, seed: int, folder: Path) -> tuple[int, int]:
    """Starts the upstream and returns its pid and port. Its output goes to `upstream.log`."""
    told = folder / "upstream.port"
    command = f"from tests.crash.chaos import upstream; upstream.run({seed})"
    pid = launcher.start(
        [], folder, clean_environment({}), str(told), str(folder / "upstream.log"), command
    )
    port = await wait_until(lambda: told.exists() and told.read_text().strip(), START_S)
    return pid, int(port)


def run(seed: int) -> NoReturn:
    uvloop.run(serve(seed))
    raise SystemExit
