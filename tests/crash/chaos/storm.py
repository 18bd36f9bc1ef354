"""One chaos run. Clients submit orders and the upstream makes images, while processes die and pause
and servers stop and return. The run then waits undisturbed until every task has ended.
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import httpx
from starlette.responses import Response

from tests.api import SUBMIT, order
from tests.crash.chaos.door import Door
from tests.crash.chaos.members import Member
from tests.crash.chaos.upstream import upstream
from tests.crash.chaos.weather import Act, Scale, acts, faults
from tests.environment import START_S
from tests.launcher import borrowed
from tests.processes import ADMIN_KEY, service_settings
from tests.servers import kept_port, running_server
from tests.waiting import wait_until
from tests.world import Received, Subscriber, subscriber

JSON = dict[str, Any]
RETRY_S, HURRY_S, HURRY_BELOW_S = 0.3, 10.0, 60.0
ANSWER_S = 15.0
EARLY = 0.2  # the share of kills that may meet a process while it starts
STUMBLE = 0.03  # the share of deliveries that the subscriber takes and answers 500
OPEN = ("queued", "submitting", "uncertain", "submitted", "storing")
LAYOUTS: dict[str, list[tuple[str, ...]]] = {
    "sqlite": [("serve",)],
    "postgres": [("serve", "--no-worker"), ("serve", "--no-worker"), ("worker",), ("worker",)],
}
SETTINGS = {
    "SECRET_KEY": "the secret key of the chaos runs that all share",
    "SUBMIT_TIMEOUT_S": "3",
    "SUBMIT_SCHEDULE": "0.5,1,2",
    "UNCERTAIN_AFTER_S": "20",
    "RECONCILE_AFTER_S": "5",
    "QUERY_TIMEOUT_S": "3",
    "DOWNLOAD_SCHEDULE": "0.5,1,2",
    "DELIVERY_SCHEDULE": ",".join(["0.5", "1"] + ["3"] * 98),
    "DELIVERY_TIMEOUT_S": "3",
    "STOP_S": "5",
}


@dataclass(slots=True)
class Storm:
    """A run under way. `accepted` has the task of each order as its client was told. `odd` has the
    answers that a client must never get.
    """

    store: str
    scale: Scale
    seed: int
    folder: Path
    database: str
    members: list[Member] = field(default_factory=list)
    accepted: dict[str, str] = field(default_factory=dict)
    odd: list[str] = field(default_factory=list)
    restarts: int = 0
    restarting: asyncio.Lock = field(default_factory=asyncio.Lock)
    front: Door = field(init=False)
    upstream: Door = field(init=False)
    subscription: Door = field(init=False)
    subscriber: Subscriber = field(init=False)
    client: httpx.AsyncClient = field(init=False)
    upstream_pid: int = 0
    upstream_port: int = 0

    async def order(self, number: int) -> None:
        """Submits the order until the service answers, as a client does."""
        name, chance = f"{number:05}", Random(f"{self.seed}/{number}")
        body = order(
            prompt=name,
            n=chance.choice([1, 1, 2]),
            metadata={"order": name},
            sandbox=faults(chance),
        )
        headers = {
            "idempotency-key": f"order-{name}",
            "prefer": chance.choice(["respond-async", "wait=1", "wait=5"]),
        }

        async def answered() -> bool:
            with suppress(httpx.TransportError):
                answer = await self.client.post(SUBMIT, json=body, headers=headers)
                if answer.status_code == 200:
                    self.accepted[name] = answer.json()["id"]
                    return True
                if answer.status_code not in (429, 503):
                    self.odd.append(f"order {name}: {answer.status_code} {answer.text[:300]}")
            await asyncio.sleep(RETRY_S)
            return False

        await wait_until(answered, self.scale.seconds + self.scale.patience)

    def member(self, choice: float) -> Member:
        """Chooses a process that is not paused, if there is one."""
        awake = [member for member in self.members if not member.asleep] or self.members
        return awake[int(choice * len(awake))]

    async def act(self, act: Act, victim: Member) -> None:
        match act.what:
            case "kill":
                await victim.kill(act.lasts)
            case "pause":
                await victim.pause(act.lasts)
            case "restart":
                async with self.restarting:
                    mode = "immediate" if act.choice < 0.5 else "fast"
                    server = running_server(self.database)
                    await asyncio.to_thread(server.control, "-m", mode, "restart")
                    self.restarts += 1
            case "freeze":
                os.kill(self.upstream_pid, signal.SIGSTOP)
                await asyncio.sleep(act.lasts)
                os.kill(self.upstream_pid, signal.SIGCONT)
            case _:
                door = self.upstream if act.what == "refuse" else self.subscription
                await door.shut(act.lasts)

    async def page(self, path: str, **query: str | int) -> JSON:
        """Reads from a service that may still be starting."""

        async def read() -> JSON | None:
            with suppress(httpx.TransportError):
                answer = await self.client.get(path, params=query)
                if answer.status_code != 503:
                    document: JSON = answer.raise_for_status().json()
                    return document
            await asyncio.sleep(RETRY_S)
            return None

        document: JSON = await wait_until(read, self.scale.patience)
        return document

    async def hurry(self) -> None:
        """Refreshes tasks in a run of less than a minute. Without that, a task with a lost callback
        and a failed query would wait for minutes.
        """
        while self.scale.seconds < HURRY_BELOW_S:
            await asyncio.sleep(HURRY_S)
            for task in (await self.page("/v1/tasks", state="submitted", limit=1000))["data"]:
                with suppress(httpx.TransportError):
                    await self.client.post(f"/v1/tasks/{task['id']}/reconcile")

    async def quiet(self) -> bool:
        """Whether every task has ended and every delivery has arrived."""
        busy = [
            (f"/v1/{'deliveries' if state == 'pending' else 'tasks'}", state)
            for state in (*OPEN, "pending")
        ]
        for path, state in busy:
            if (await self.page(path, state=state, limit=1))["data"]:
                await asyncio.sleep(RETRY_S)
                return False
        return True

    async def blow(self, group: asyncio.TaskGroup) -> None:
        """Runs orders and acts, each at its time. The clock stops while the run waits for a process
        that an act is to kill at work.
        """
        chance, now = Random(f"{self.seed}/times"), asyncio.get_running_loop().time
        plan: list[tuple[float, Act | int]] = [
            (act.at, act) for act in acts(self.scale, self.store, Random(f"{self.seed}/acts"))
        ]
        plan += [
            (chance.uniform(0, self.scale.seconds), number) for number in range(self.scale.tasks)
        ]
        started = now()
        for at, what in sorted(plan, key=lambda each: each[0]):
            await asyncio.sleep(max(0.0, started + at - now()))
            if isinstance(what, Act):
                victim = self.member(what.choice)
                if what.what == "kill" and not victim.ready() and chance.random() > EARLY:
                    began = now()
                    await wait_until(victim.ready, self.scale.patience)
                    await asyncio.sleep(
                        chance.uniform(0, 2 * self.scale.seconds / self.scale.kills)
                    )
                    started += now() - began
                group.create_task(self.act(what, victim))
            else:
                group.create_task(self.order(what))

    async def rage(self) -> bool:
        """Runs the whole schedule. Returns whether every task ended in time."""
        keepers = [asyncio.create_task(member.keep()) for member in self.members]
        try:
            async with asyncio.TaskGroup() as group:
                await self.blow(group)
            hurrying = asyncio.create_task(self.hurry())
            try:
                await wait_until(self.quiet, self.scale.patience)
            except AssertionError:
                return False
            finally:
                hurrying.cancel()
            return True
        finally:
            for keeper in keepers:
                keeper.cancel()
            await asyncio.gather(*keepers, return_exceptions=True)


@asynccontextmanager
async def storms(
    store: str, scale: Scale, seed: int, folder: Path, database: str = ""
) -> AsyncIterator[Storm]:
    """Starts every process and subscribes an endpoint. `database` is the URL of a server that the
    run may restart.
    """
    storm = Storm(store, scale, seed, folder, database)
    chance = Random(f"{seed}/doors")
    async with AsyncExitStack() as stack:
        launcher = stack.enter_context(borrowed())
        storm.upstream_pid, storm.upstream_port = await upstream(launcher, seed, folder)
        storm.subscriber = await stack.enter_async_context(subscriber())
        storm.subscriber.answer = stumbling(chance)
        layout = LAYOUTS[store]
        ports = [kept_port(stack) for _ in layout]
        storm.front = Door(
            [port for port, (command, *_) in zip(ports, layout, strict=True) if command == "serve"],
            chance,
            stack,
        )
        storm.upstream = Door([storm.upstream_port], chance, stack)
        storm.subscription = Door([int(storm.subscriber.url.rpartition(":")[2])], chance, stack)
        settings = SETTINGS | {"CALLBACK_URL": storm.front.url, "BASE_URL": storm.front.url}
        if database:
            settings |= {"DATABASE_URL": database}
        environment = service_settings(storm.upstream.url, folder, **settings)
        storm.members = [
            Member(
                launcher,
                folder / f"{number}-{command[0]}",
                environment | {"DARKROOM_PORT": str(port)},
                command,
            )
            for number, (command, port) in enumerate(zip(layout, ports, strict=True))
        ]
        for member in storm.members:
            member.start()
        for door in (storm.front, storm.upstream, storm.subscription):
            await door.open()
        storm.client = await stack.enter_async_context(
            httpx.AsyncClient(
                base_url=storm.front.url,
                headers={"authorization": f"Bearer {ADMIN_KEY}"},
                timeout=ANSWER_S,
                trust_env=False,
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=16),
            )
        )
        for member in storm.members:
            await wait_until(member.told, START_S)
            assert member.ready(), member.process.printed
        endpoint = {"url": storm.subscription.url, "types": ["image.task.*"]}
        (await storm.client.post("/v1/endpoints", json=endpoint)).raise_for_status()
        yield storm


def stumbling(chance: Random) -> Any:
    """The subscriber's answers: it takes each event, but sometimes answers 500."""

    def answer(_: int, __: Received) -> Response:
        return Response(status_code=500 if chance.random() < STUMBLE else 204)

    return answer


def logs(members: Sequence[Member], event: str) -> int:
    """Counts an event in the logs."""
    needle = f'"event":"{event}"'.encode()
    spaced = f'"event": "{event}"'.encode()
    return sum(
        text.count(needle) + text.count(spaced)
        for member in members
        for text in [member.process.log.read_bytes()]
    )
