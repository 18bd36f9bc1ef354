"""Several service processes, webs and workers, on one PostgreSQL, with an upstream, a subscriber
and orders under way.
"""

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import httpx

from service.signing import Keyring
from tests.api import SUBMIT, order
from tests.crash.bench import Bench, benches
from tests.crash.life import TERMINAL, listed
from tests.crash.load import SECRET, post
from tests.launcher import Launched
from tests.processes import service_settings
from tests.servers import kept_port
from tests.waiting import wait_until

JSON = dict[str, Any]
PATIENCE_S = 60.0
LEASE_MS = 2000
WEB, WORKER = ("serve", "--no-worker"), ("worker",)
SETTINGS = {
    "SECRET_KEY": SECRET,
    "SUBMIT_TIMEOUT_S": "10",
    "SUBMIT_SCHEDULE": "0.3",
    "UNCERTAIN_AFTER_S": "10",
    "RECONCILE_AFTER_S": "2",
    "DELIVERY_SCHEDULE": ",".join(["0.3"] * 100),
    "STOP_S": "5",
}


@dataclass(slots=True)
class Member:
    """One process and a client of it."""

    process: Launched
    client: httpx.AsyncClient
    folder: Path
    environment: dict[str, str]

    async def killed(self) -> None:
        """Sends SIGKILL, unless the process has ended already."""
        if self.process.code is None:
            self.process.signal(signal.SIGKILL)
        await wait_until(lambda: self.process.code is not None, PATIENCE_S)

    def lines(self) -> list[JSON]:
        """The lines that it has logged so far."""
        return [
            json.loads(line) for line in self.process.printed.splitlines() if line.startswith("{")
        ]


@dataclass(slots=True)
class Group:
    """The processes of a test. `accepted` are the tasks that a client knows, `kept` the tasks with
    a callback that was answered with 200.
    """

    bench: Bench
    database: str
    stack: AsyncExitStack
    members: list[Member] = field(default_factory=list)
    accepted: set[str] = field(default_factory=set)
    odd: list[str] = field(default_factory=list)
    port: int = 0

    async def start(self, arguments: Sequence[str], **more: str) -> Member:
        """Starts one more process and waits until it works."""
        port = kept_port(self.stack)
        folder = self.bench.folder / f"process-{port}"
        folder.mkdir()
        self.port = self.port or port  # the upstream calls back to the first process
        callbacks = f"http://127.0.0.1:{self.port}"
        data = str(self.bench.folder / "data")
        given = {
            **SETTINGS,
            "DATABASE_URL": self.database,
            "PORT": str(port),
            "CALLBACK_URL": callbacks,
            "DATA_DIR": data,
            "TEST_LEASE_MS": str(LEASE_MS),
        } | more
        environment = service_settings(self.bench.upstream_url, folder, **given)
        process, client = await self.bench.start(self.stack, folder, environment, *arguments)
        self.members.append(Member(process, client, folder, environment))
        return self.members[-1]

    async def order(self, web: Member, number: int, **fields: Any) -> str:
        """Submits an order until a web process accepts it. Returns the task's id."""
        headers = {"prefer": "respond-async", "idempotency-key": f"order-{number}"}

        async def taken() -> str | None:
            with suppress(httpx.TransportError):
                answer = await web.client.post(
                    SUBMIT, json=order(prompt=str(number), **fields), headers=headers
                )
                if answer.status_code == 200:
                    return str(answer.json()["id"])
                if answer.status_code != 503 or "retry-after" not in answer.headers:
                    self.odd.append(f"{number}: {answer.status_code} {answer.text}")
            return None

        task_id: str = await wait_until(taken, PATIENCE_S)
        self.accepted.add(task_id)
        return task_id

    async def ended(self, web: Member) -> dict[str, str]:
        """Waits until all accepted tasks have ended, and returns their states. Checks that each has
        one terminal event and was submitted once.
        """

        async def over() -> dict[str, str] | None:
            states = {
                task["id"]: task["state"]
                for task in await listed(web.client, "tasks")
                if task["id"] in self.accepted
            }
            return (
                states
                if len(states) == len(self.accepted)
                and not {"queued", "submitting", "submitted", "storing", "uncertain"}
                & set(states.values())
                else None
            )

        states: dict[str, str] = await wait_until(over, PATIENCE_S)
        events = [
            event for event in await listed(web.client, "events") if event["type"] in TERMINAL
        ]
        assert sorted(event["subject"] for event in events) == sorted(self.accepted), (
            "one terminal event each"
        )
        keys = [key for keys in self.bench.upstream.posts.values() for key in keys]
        assert len(keys) == len(set(keys)), "nothing is submitted twice"
        assert self.odd == []
        return states

    async def callback(self, member: Member, task: Mapping[str, Any]) -> str:
        """Sends a callback that says the task has failed. Returns the status of the answer."""
        return await post(
            f"{member.client.base_url}/callbacks/evolink/{task['id']}/{token(task['id'])}",
            task["upstream_id"],
        )

    def alive(self) -> None:
        for member in self.members:
            assert member.process.code is None, member.process.printed
            assert "Traceback" not in member.process.printed, member.process.printed


def token(task_id: str) -> str:
    return Keyring([SECRET.encode()]).callback_token("evolink", task_id)


@asynccontextmanager
async def groups(
    folder: Path, server: str, template: str = "template1", database: str | None = None
) -> AsyncIterator[Group]:
    """A group without processes. `database` is the address of an existing database. Without it, the
    group makes a copy of the template on the server.
    """
    async with benches(folder, server, template) as bench, AsyncExitStack() as stack:
        url = (
            database if database is not None else await stack.enter_async_context(bench.database())
        )
        group = Group(bench, url, stack)
        try:
            yield group
        finally:
            for member in group.members:
                await member.killed()


async def ask(database: str, statement: str, *args: Any) -> list[Any]:
    """The rows of a statement on a connection of its own."""
    connection = await asyncpg.connect(database)
    try:
        return list(await connection.fetch(statement, *args))
    finally:
        await connection.close()


@asynccontextmanager
async def terminating(database: str, condition: str) -> AsyncIterator[None]:
    """Terminates the connections that meet the condition on `pg_stat_activity`, again and again,
    until the block ends.
    """

    async def never() -> bool:
        await ask(
            database,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname ="
            f" current_database() AND {condition}",
        )
        return False

    ending = asyncio.create_task(wait_until(never, PATIENCE_S))
    try:
        yield
    finally:
        ending.cancel()
        await asyncio.gather(ending, return_exceptions=True)
