"""The surroundings of every crash case: an upstream and a subscriber that outlive the service, a
launcher of processes, and databases.
"""

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_network
from pathlib import Path

import httpx
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from service.upstreams.sandbox import SandboxOptions, create_sandbox
from tests.api import SUBMIT
from tests.crash.chaos.upstream import Again
from tests.environment import START_S
from tests.launcher import Launched, Launcher, borrowed
from tests.processes import ADMIN_KEY, LOOPBACK, UPSTREAM_KEY
from tests.servers import postgres_database
from tests.upstream import error
from tests.waiting import wait_until
from tests.world import Subscriber, answering, subscriber

UPLOAD = "/api/v1/files/upload/stream"
SANDBOX = SandboxOptions(
    api_key=UPSTREAM_KEY,
    networks=(ip_network(LOOPBACK),),
    delay_s=0.3,
    callback_timeout_s=8,
    callback_delays_s=(1.0,) * 100,
)


@dataclass(slots=True)
class Upstream:
    """A sandbox that records every submission. `refusals` counts the submissions of a prompt that
    it refuses with 401 without recording them. `full` has the ids of files whose uploads find no
    room.
    """

    app: ASGIApp
    refusals: dict[str, int] = field(default_factory=dict)
    posts: defaultdict[str, list[str]] = field(
        default_factory=lambda: defaultdict(list)
    )  # idempotency keys by prompt
    full: set[bytes] = field(default_factory=set)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("path") not in (SUBMIT, *([UPLOAD] if self.full else [])):
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        body = await request.body()
        again = Again(receive, body).receive
        if scope["path"] == UPLOAD:
            if any(file in body for file in self.full):
                await JSONResponse({"success": False, "code": 40003}, 403)(scope, again, send)
            else:
                await self.app(scope, again, send)
            return
        prompt = json.loads(body)["prompt"]
        if self.refusals.get(prompt, 0):
            self.refusals[prompt] -= 1
            await error(401, "unauthorized")(scope, receive, send)
            return
        self.posts[prompt].append(request.headers["idempotency-key"])
        await self.app(scope, again, send)


@dataclass(slots=True)
class Bench:
    """What all cases share: the upstream, the subscriber and the machine's two cores."""

    folder: Path
    server: str
    template: str  # what the databases are copies of
    upstream: Upstream
    upstream_url: str
    subscriber: Subscriber
    launcher: Launcher
    starting: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(3))
    _creating: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def start(
        self, stack: AsyncExitStack, folder: Path, environment: Mapping[str, str], *arguments: str
    ) -> tuple[Launched, httpx.AsyncClient]:
        """A process that has started on the port of its environment, and a client of it."""
        process = Launched(self.launcher, folder, environment, *arguments)
        await wait_until(
            lambda: "service.started" in process.printed or process.code is not None, START_S
        )
        assert "service.started" in process.printed, process.printed
        client = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{environment['DARKROOM_PORT']}",
            headers={"authorization": f"Bearer {ADMIN_KEY}"},
            trust_env=False,
            timeout=100,
        )
        return process, await stack.enter_async_context(client)

    @asynccontextmanager
    async def database(self) -> AsyncIterator[str]:
        # it runs event loops of its own
        manager = postgres_database(self.server, self.template)
        async with self._creating:
            url = await asyncio.to_thread(manager.__enter__)
        try:
            yield url
        finally:
            await asyncio.to_thread(manager.__exit__, None, None, None)


@asynccontextmanager
async def benches(folder: Path, server: str, template: str = "template1") -> AsyncIterator[Bench]:
    upstream = Upstream(create_sandbox(SANDBOX))
    with borrowed() as launcher:
        async with answering(upstream) as url, subscriber() as listening:
            yield Bench(folder, server, template, upstream, url, listening, launcher)
