"""A whole world in one event loop, over real sockets: sandbox upstream, service and subscriber. It
contains no mocks.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from ipaddress import ip_network
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import standardwebhooks
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from service.app import Role, create_app, running
from service.db.integrity import begin
from service.db.sqlite import SqliteStore
from service.settings import Settings, load_settings
from service.upstreams.sandbox import SandboxOptions, create_sandbox
from service.web.context import Context
from service.web.server import Server, bind, listening
from tests.known_secrets import know
from tests.waiting import wait_until

LOOPBACK = "127.0.0.0/8"
ADMIN_KEY = "test-admin-key-0123456789"
LOOK_S = 0.1
TEXT_TO_IMAGE = "wan2.5-text-to-image"
JSON = dict[str, Any]


@asynccontextmanager
async def answering(app: ASGIApp) -> AsyncIterator[str]:
    """The address of a running ASGI application."""
    bound = bind("127.0.0.1", 0)
    async with listening(Server(app, bound, 1), asyncio.Event()):
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


@dataclass(frozen=True, slots=True)
class Received:
    """A request that a subscriber received."""

    path: str
    headers: Mapping[str, str]
    body: bytes

    def signed_by(self, secret: str) -> bool:
        """Whether the Standard Webhooks library accepts the signature."""
        try:
            standardwebhooks.Webhook(secret).verify(self.body, dict(self.headers))
        except standardwebhooks.WebhookVerificationError:
            return False
        return True


@dataclass(slots=True)
class Subscriber:
    """Accepts every request. `answer` makes the answer to the nth request, from 0."""

    url: str = ""
    received: list[Received] = field(default_factory=list)
    answer: Callable[[int, Received], Response] = lambda _n, _request: Response(status_code=204)

    async def take(self, request: Request) -> Response:
        got = Received(request.url.path, dict(request.headers), await request.body())
        self.received.append(got)
        return self.answer(len(self.received) - 1, got)


@asynccontextmanager
async def subscriber() -> AsyncIterator[Subscriber]:
    made = Subscriber()
    app = Starlette(routes=[Route("/{path:path}", made.take, methods=["POST", "GET"])])
    async with answering(app) as url:
        made.url = url
        yield made


@dataclass(slots=True)
class World:
    """A service with its sandbox. `client` has the admin key, `stranger` has none."""

    url: str
    sandbox_url: str
    settings: Settings
    context: Context
    client: httpx.AsyncClient
    stranger: httpx.AsyncClient
    sandbox: httpx.AsyncClient

    def with_key(self, key: str) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self.url, headers={"authorization": f"Bearer {key}"}, timeout=30
        )

    @asynccontextmanager
    async def owner(
        self, *scopes: str, name: str | None = None
    ) -> AsyncIterator[httpx.AsyncClient]:
        """A client with a new key. Without a name it gets an owner of its own."""
        body = {
            "owner": name or f"owner-{uuid.uuid4().hex[:12]}",
            "scopes": scopes or ("submit", "read", "subscribe"),
        }
        made = await self.client.post("/v1/keys", json=body)
        assert made.status_code == 201, made.text
        async with self.with_key(made.json()["key"]) as client:
            yield client

    async def submit(
        self,
        *,
        prompt: str = "a lighthouse",
        headers: Mapping[str, str] | None = None,
        **fields: Any,
    ) -> JSON:
        """Submits a small task and returns it. AssertionError if the service does not accept it."""
        body = {"model": TEXT_TO_IMAGE, "prompt": prompt, "size": "768x768", **fields}
        answer = await self.client.post("/v1/images/generations", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        task: JSON = answer.json()
        return task

    async def task(self, task_id: str) -> JSON:
        answer = await self.client.get(f"/v1/tasks/{task_id}")
        assert answer.status_code == 200, answer.text
        task: JSON = answer.json()
        return task

    async def ended(self, task_id: str, timeout: float = 60) -> JSON:
        """The task as soon as it is terminal. Each commit that concerns it is a reason to look."""
        with self.context.resources.store.signals.listen(task_id) as changed:
            async with asyncio.timeout(timeout):
                while True:
                    changed.clear()
                    task = await self.task(task_id)
                    if task["state"] in ("completed", "failed", "cancelled", "expired"):
                        return task
                    with suppress(TimeoutError):  # another process makes no signal here
                        async with asyncio.timeout(LOOK_S):
                            await changed.wait()

    async def events(self, **query: Any) -> list[JSON]:
        answer = await self.client.get("/v1/events", params={"limit": 1000, **query})
        assert answer.status_code == 200, answer.text
        events: list[JSON] = answer.json()["data"]
        return events

    async def told(self, task_id: str, type: str) -> JSON:
        """The data of a task's only event of this type, as soon as it is there."""
        (event,) = await wait_until(lambda: self.events(task=task_id, type=type))
        data: JSON = event["data"]
        return data

    async def steps(self, task_id: str) -> list[JSON]:
        answer = await self.client.get(f"/v1/tasks/{task_id}/timeline")
        assert answer.status_code == 200, answer.text
        steps: list[JSON] = answer.json()["data"]
        return steps

    def callback_url(self, task_id: str, token: str | None = None) -> str:
        """The callback URL of this task, with its valid token or with the given one."""
        right = self.context.resources.keyring.callback_token("evolink", task_id)
        return f"{self.url}/callbacks/evolink/{task_id}/{token or right}"


@cache
def new_store() -> bytes:
    """The SQLite file of a new store. To migrate one costs half of what a world costs."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "darkroom.db"
        begin(path)
        store = SqliteStore(path, "new", lambda _, __: "", lambda _: None, lambda: 0)
        store.prepare(migrate=True)
        store.dispose()
        return path.read_bytes()


def place_store(settings: Settings) -> None:
    """Puts a new store into a data folder that does not exist yet."""
    path = settings.sqlite_path
    if path is None or path.parent.exists() or settings.migrate == "off":
        return
    path.parent.mkdir(mode=0o700, parents=True)
    path.touch(0o600)
    path.write_bytes(new_store())


@asynccontextmanager
async def world(
    folder: Path,
    *,
    sandbox: SandboxOptions | None = None,
    upstream: ASGIApp | None = None,
    role: Role | None = None,
    **settings: Any,
) -> AsyncIterator[World]:
    """A running world. `upstream` replaces the sandbox. `settings` (by field name) replace the
    defaults of the tests, and None removes a default.
    """
    async with AsyncExitStack() as stack:
        options = sandbox or SandboxOptions(
            networks=(ip_network(LOOPBACK),),
            delay_s=0.05,
            fetch_inputs=False,  # tests have no internet
            callback_delays_s=(0.05, 0.05, 0.05),
        )
        sandbox_url = await stack.enter_async_context(
            answering(upstream or create_sandbox(options))
        )
        bound = bind("127.0.0.1", 0)
        port = bound.getsockname()[1]
        usual = {
            "port": port,
            "data_dir": folder / "data",
            "callback_url": f"http://127.0.0.1:{port}",
            "admin_key": ADMIN_KEY,
            "evolink_api_key": "sandbox",
            "evolink_base_url": sandbox_url,
            "evolink_result_hosts": "127.0.0.1",
            "upstream_networks": LOOPBACK,
            "endpoint_networks": LOOPBACK,
            "task_callback_networks": LOOPBACK,
            "reconcile_after_s": "30",
            "submit_schedule": "0.05",
            "download_schedule": "0.05",
            "delivery_schedule": "0.05,0.05",
            "min_free_bytes": 0,
            "stop_s": 2,
        }
        made = load_settings(
            {},
            None,
            **{name: value for name, value in (usual | settings).items() if value is not None},
        )
        know(*(v.get_secret_value() for _, v in made if isinstance(v, SecretStr)))
        place_store(made)
        role = role or Role()
        context = await stack.enter_async_context(running(made, role))
        await stack.enter_async_context(
            listening(
                Server(create_app(context, role), bound, made.stop_s, context.gate), asyncio.Event()
            )
        )
        stack.callback(context.resources.store.signals.stop)
        key = {"authorization": f"Bearer {ADMIN_KEY}"}
        url = f"http://127.0.0.1:{port}"
        enter = stack.enter_async_context
        yield World(
            url=url,
            sandbox_url=sandbox_url,
            settings=made,
            context=context,
            client=await enter(httpx.AsyncClient(base_url=url, headers=key, timeout=30)),
            stranger=await enter(httpx.AsyncClient(base_url=url, timeout=30)),
            sandbox=await enter(
                httpx.AsyncClient(
                    base_url=sandbox_url, headers={"authorization": "Bearer sandbox"}, timeout=30
                )
            ),
        )
