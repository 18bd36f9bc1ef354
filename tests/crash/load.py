"""Callbacks as the upstream sends them, each on its own connection, while the service restarts."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from service.signing import Keyring
from tests.api import ASYNC, got, submitted
from tests.callbacks import connected
from tests.waiting import wait_until

SECRET = "the secret key of the restarts that a test knows too"
RATE = 50  # callbacks a second
TRY_S, PATIENCE_S = (
    10.0,
    60.0,
)  # The upstream's timeout, and the longer one of the tests, which share their machine.
FRESH = 5  # one callback in this many is the first of its task, the rest are repeats
AT_ONCE = 16


@dataclass(slots=True)
class Load:
    """The answers to all callbacks. No callback is retried."""

    tasks: list[dict[str, Any]]
    token: Callable[[str, str], str] = Keyring([SECRET.encode()]).callback_token
    answers: Counter[str] = field(default_factory=Counter)
    said: Counter[str] = field(default_factory=Counter)  # answers with 200, by task
    slowest_s: float = 0.0

    async def send(self, url: str, task: dict[str, Any]) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with asyncio.timeout(PATIENCE_S):
                status = await post(
                    f"{url}/callbacks/evolink/{task['id']}/{self.token('evolink', task['id'])}",
                    task["upstream_id"],
                )
        except (OSError, EOFError, TimeoutError) as error:
            status = repr(error)
        self.slowest_s = max(self.slowest_s, loop.time() - began)
        self.answers[status] += 1
        self.said[task["id"]] += status == "200"

    async def send_all(self, url: str) -> None:
        """Sends callbacks until cancelled, and then waits for those under way."""
        began, sent, random_ = asyncio.get_running_loop().time(), 0, random.Random(7)
        async with asyncio.TaskGroup() as group:
            try:
                while True:
                    await until(began + sent / RATE)
                    begun = min(1 + sent // FRESH, len(self.tasks))
                    task = (
                        self.tasks[begun - 1]
                        if sent % FRESH == 0
                        else random_.choice(self.tasks[:begun])
                    )
                    group.create_task(self.send(url, task))
                    sent += 1
            except asyncio.CancelledError:
                pass


async def until(time: float) -> None:
    """By the loop's clock."""
    clock = asyncio.get_running_loop().time
    await wait_until(lambda: clock() >= time, timeout=PATIENCE_S)


async def post(url: str, upstream_id: str) -> str:
    """Returns the status of the answer. Raises OSError or EOFError if there is none."""
    body = json.dumps(
        {"id": upstream_id, "status": "failed", "error": {"code": "service_error", "message": "no"}}
    ).encode()
    target = httpx.URL(url)
    head = (
        f"POST {target.raw_path.decode()} HTTP/1.1\r\nhost: hooks.example\r\ncontent-length:"
        f" {len(body)}\r\n\r\n"
    )
    async with connected(url) as (reader, writer):
        writer.write(head.encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
    return answer.split()[1].decode()


async def bound(client: httpx.AsyncClient, task: dict[str, Any]) -> dict[str, Any]:
    """The task once it has its upstream id, which a slow submission still lacks."""

    async def look() -> dict[str, Any] | None:
        shown = got(await client.get(f"/v1/tasks/{task['id']}"))
        return shown if shown["upstream_id"] else None

    return task if task["upstream_id"] else dict(await wait_until(look, PATIENCE_S))


async def loaded(client: httpx.AsyncClient, count: int, *, worker: bool = True) -> Load:
    """Makes `count` tasks that have failed at the upstream, which sends no callbacks for them.
    Without a worker they wait for their submission.
    """
    turn = asyncio.Semaphore(AT_ONCE)

    async def one() -> dict[str, Any]:
        async with turn:
            sandbox = {"fail": "service_error", "drop_callback": True}
            task = await submitted(client, {} if worker else ASYNC, sandbox=sandbox)
            return await bound(client, task) if worker else task

    return Load(list(await asyncio.gather(*(one() for _ in range(count)))))


@asynccontextmanager
async def sending(load: Load, url: str) -> AsyncIterator[None]:
    running = asyncio.create_task(load.send_all(url))
    try:
        yield
    finally:
        running.cancel()
        await running
