"""The service under attack: a real process on a sandbox upstream, with an attacker's and a victim's
key, and a stream of callbacks whose times are measured.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from service.signing import Keyring
from tests.api import ASYNC, SUBMIT, order
from tests.processes import ADMIN_KEY, Running, sandbox, service_settings, started

SECRET_KEY = "the secret key of the attack has 32 bytes or more"
MIB = 1 << 20


@dataclass(slots=True)
class Target:
    running: Running
    folder: Path
    admin: httpx.AsyncClient
    attacker: httpx.AsyncClient
    victim: httpx.AsyncClient
    stranger: httpx.AsyncClient
    waiting: dict[str, Any] = field(default_factory=dict)  # the task whose callbacks are measured

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.running.address.removeprefix("http://").split(":")
        return host, int(port)

    def head(self, client: httpx.AsyncClient, request: str, *lines: str) -> bytes:
        key = client.headers.get("authorization")
        own = [f"authorization: {key}"] if key else []
        return "\r\n".join([f"{request} HTTP/1.1", "host: x", *own, *lines, "", ""]).encode()

    @asynccontextmanager
    async def connections(
        self, count: int, request: bytes
    ) -> AsyncIterator[list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]:
        """So many connections on which this request was sent, and of which nothing is read."""
        async with AsyncExitStack() as stack:
            made = []
            for _ in range(count):
                reader, writer = await asyncio.open_connection(*self.address, limit=1 << 14)
                stack.callback(writer.close)
                writer.write(request)
                made.append((reader, writer))
            yield made

    def resident(self) -> int:
        """The resident memory of the process in bytes."""
        status = Path(f"/proc/{self.running.process.pid}/status").read_text(encoding="ascii")
        return int(status.partition("VmRSS:")[2].split()[0]) * 1024

    def processor_s(self) -> float:
        """The processor time of the process so far."""
        fields = Path(f"/proc/{self.running.process.pid}/stat").read_text(encoding="ascii")
        return sum(map(int, fields.rpartition(") ")[2].split()[11:13])) / 100

    async def callback(self) -> float:
        """The seconds of one callback."""
        task_id = self.waiting["id"]
        token = Keyring([SECRET_KEY.encode()]).callback_token("evolink", task_id)
        body = {"id": self.waiting["upstream_id"], "status": "processing"}
        began = time.perf_counter()
        answer = await self.stranger.post(f"/callbacks/evolink/{task_id}/{token}", json=body)
        assert answer.status_code == 200, answer.text
        return time.perf_counter() - began

    async def callbacks_p99(self, seconds: float) -> float:
        """Of callbacks that are sent one after another."""
        end, took = time.perf_counter() + seconds, list[float]()
        while time.perf_counter() < end:
            took.append(await self.callback())
        return sorted(took)[int(len(took) * 0.99)]


@asynccontextmanager
async def target(folder: Path) -> AsyncIterator[Target]:
    async with AsyncExitStack() as stack:
        with ExitStack() as processes:
            upstream = processes.enter_context(sandbox(folder=folder))
            settings = service_settings(upstream.address, folder, SECRET_KEY=SECRET_KEY)
            running = processes.enter_context(started("serve", folder=folder, **settings))

            async def client(key: str | None) -> httpx.AsyncClient:
                headers = {"authorization": f"Bearer {key}"} if key else {}
                made = httpx.AsyncClient(
                    base_url=running.address, headers=headers, timeout=60, trust_env=False
                )
                return await stack.enter_async_context(made)

            admin = await client(ADMIN_KEY)
            keys = []
            for owner in ("attacker", "victim"):
                body = {"owner": owner, "scopes": ["submit", "read", "subscribe"]}
                keys.append((await admin.post("/v1/keys", json=body)).json()["key"])
            attacker, victim = [await client(key) for key in keys]
            made = Target(running, folder, admin, attacker, victim, await client(None))
            late = order(sandbox={"delay": 3600})
            answer = await victim.post(SUBMIT, json=late, headers={})
            assert answer.status_code == 200, answer.text
            made.waiting = answer.json()
            yield made


async def submitted(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await client.post(SUBMIT, json=order(**fields), headers=ASYNC)
    assert answer.status_code == 200, answer.text
    task: dict[str, Any] = answer.json()
    return task
