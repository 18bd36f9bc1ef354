"""A running sandbox, a receiver of its callbacks, and faults set by flag or by request."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from decimal import Decimal
from ipaddress import ip_network
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.cli.sandbox_commands import default_faults
from service.upstreams.sandbox import SandboxOptions, create_sandbox
from tests.world import answering

ORDER = {"model": "wan2.5-text-to-image", "prompt": "a lighthouse, 灯塔", "size": "768x768"}
QUICK = SandboxOptions(
    networks=(ip_network("127.0.0.0/8"),),
    delay_s=0,
    callback_delays_s=(0, 0, 0),
    seed=7,
    price=Decimal("1.5"),
    fetch_inputs=False,  # tests have no internet
)
KEY = {"authorization": "Bearer sk-test"}
WAYS = ("flag", "request")


@asynccontextmanager
async def sandbox(
    options: SandboxOptions = QUICK, clock: Callable[[], float] | None = None
) -> AsyncIterator[httpx.AsyncClient]:
    """A client with a key of a running sandbox."""
    app = create_sandbox(options) if clock is None else create_sandbox(options, clock)
    async with (
        answering(app) as base,
        httpx.AsyncClient(base_url=base, headers=KEY, trust_env=False, timeout=20) as client,
    ):
        yield client


@dataclass
class Receiver:
    """Answers callbacks with `statuses` one after another, then with 200, and keeps the
    requests.
    """

    url: str = ""
    statuses: list[int] = field(default_factory=list)
    bodies: asyncio.Queue[bytes] = field(default_factory=asyncio.Queue)
    requests: list[Request] = field(default_factory=list)

    async def take(self, request: Request) -> Response:
        self.requests.append(request)
        self.bodies.put_nowait(await request.body())
        return Response(status_code=self.statuses.pop(0) if self.statuses else 200)

    async def next(self) -> Any:
        return json.loads(await asyncio.wait_for(self.bodies.get(), 30))


@asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    async with answering(
        Starlette(routes=[Route("/callbacks", receiver.take, methods=["POST"])])
    ) as base:
        receiver.url = f"{base}/callbacks"
        yield receiver


async def submit(
    client: httpx.AsyncClient, headers: dict[str, str] | None = None, **fields: Any
) -> httpx.Response:
    return await client.post("/v1/images/generations", json=ORDER | fields, headers=headers)


async def finished(client: httpx.AsyncClient, **fields: Any) -> Any:
    """A terminal task. The sandbox delays the answer to the submission until the task has ended, so
    the first query shows the end.
    """
    answer = await submit(
        client, sandbox={"callback_first": True} | fields.pop("sandbox", {}), **fields
    )
    return (await client.get(f"/v1/tasks/{answer.json()['id']}")).json()


async def created(client: httpx.AsyncClient) -> list[Any]:
    """The tasks that the sandbox has created."""
    tasks: list[Any] = (await client.get("/sandbox/tasks")).json()["data"]
    return tasks


@dataclass(frozen=True)
class Faulty:
    """A sandbox with faults, as defaults or in every request."""

    client: httpx.AsyncClient
    asked: dict[str, Any]

    async def submit(self, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
        return await submit(
            self.client, headers, **fields | {"sandbox": self.asked | fields.get("sandbox", {})}
        )

    async def finished(self, **fields: Any) -> Any:
        return await finished(
            self.client, **fields | {"sandbox": self.asked | fields.get("sandbox", {})}
        )

    async def file(self, **fields: Any) -> httpx.Response:
        """The first file of a new task."""
        return await self.client.get((await self.finished(**fields))["results"][0])

    async def created(self) -> list[Any]:
        return await created(self.client)


@asynccontextmanager
async def faulty(way: str, **faults: Any) -> AsyncIterator[Faulty]:
    """With "flag" the faults are texts in the form of `--fault`. With "request" they are the field
    `sandbox` of each submission.
    """
    flags = [
        f"{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in faults.items()
    ]
    async with sandbox(
        replace(QUICK, faults=default_faults(flags) if way == "flag" else {})
    ) as client:
        yield Faulty(client, faults if way == "request" else {})


async def taken(
    client: httpx.AsyncClient, method: str, url: str, **more: Any
) -> tuple[bytes, bool]:
    """The received part of a body, and whether it is complete."""
    body = b""
    try:
        async with client.stream(method, url, **more) as answer:
            async for chunk in answer.aiter_raw():
                body += chunk
    except httpx.RemoteProtocolError:
        return body, False
    return body, True
