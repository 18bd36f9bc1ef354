"""Runs a traced service and kills it again and again. Each start gets the files that a power cut
would have left.
"""

import asyncio
import random
import re
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from service.upstreams.sandbox import create_sandbox
from tests.api import SUBMIT, got, order
from tests.crash.bench import SANDBOX, Upstream
from tests.crash.life import PATIENCE_S, listed, passing
from tests.durability.disk import Coin, Disk, kept, lost
from tests.durability.promises import Watch, callbacks_of
from tests.durability.trace import Begun, Moment, moments, tracing
from tests.launcher import Launched, Launcher, launching
from tests.processes import ADMIN_KEY, service_settings
from tests.servers import kept_port
from tests.waiting import wait_until
from tests.world import Subscriber, answering, subscriber

JSON = dict[str, Any]
CLIENTS = 2
SEEDS = (1, 2, 3, 5)
MOST = 4_000_000  # characters of trace before a kill, enough for several tasks
SETTINGS = {
    "LOG_LEVEL": "debug",  # with the requests of callbacks
    "SUBMIT_TIMEOUT_S": "5",
    "SUBMIT_SCHEDULE": "0.3",
    "UNCERTAIN_AFTER_S": "6",
    "RECONCILE_AFTER_S": "600",  # the upstream does not repeat a lost callback
    "DELIVERY_SCHEDULE": "0.3",
}


def coin(seed: int) -> Coin | None:
    """Decides the fate of unsynced data: all of it is lost, or each part is kept or lost at random.
    With None only the process dies.
    """
    tossed = random.Random(seed)
    return (None, lost, lambda: tossed.random() < 0.5)[seed % 3]


@dataclass(slots=True)
class Rounds:
    """The results.

    `place` is the folder above the last service's data. `made` is the first service's trace.
    `answered` are the tasks that clients know. `differing` are files that the trace does not
    explain.
    """

    folder: Path
    place: Path = Path()
    made: list[Moment] = field(default_factory=list)
    answered: set[str] = field(default_factory=set)
    deaths: list[int | None] = field(default_factory=list)
    watches: list[Watch] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    tasks: list[JSON] = field(default_factory=list)
    events: list[JSON] = field(default_factory=list)
    pictures: dict[str, bytes] = field(default_factory=dict)
    received: list[str] = field(default_factory=list)
    posts: dict[str, list[str]] = field(default_factory=dict)
    log: str = ""


@dataclass(slots=True)
class Stage:
    """The run under way. `place` is the folder above the service's data."""

    rounds: Rounds
    launcher: Launcher
    upstream: Upstream
    upstream_url: str
    subscriber: Subscriber
    port: int
    place: Path
    disk: Disk
    read: int = 0
    begun: Begun = field(default_factory=dict)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[tuple[Launched, httpx.AsyncClient]]:
        """Runs a service and reads its trace after the end."""
        settings = service_settings(self.upstream_url, self.place, **SETTINGS, PORT=str(self.port))
        process = Launched(self.launcher, self.rounds.folder, settings)
        await wait_until(
            lambda: "service.started" in process.printed or process.code is not None, PATIENCE_S
        )
        assert "service.started" in process.printed, process.printed
        url, headers = f"http://127.0.0.1:{self.port}", {"authorization": f"Bearer {ADMIN_KEY}"}
        async with httpx.AsyncClient(
            base_url=url, headers=headers, trust_env=False, timeout=100
        ) as client:
            yield process, client
        await wait_until(lambda: process.code is not None, PATIENCE_S)
        await wait_until(
            lambda: re.search(rf"\n{process.pid} +\+\+\+ ", self.written()), PATIENCE_S
        )
        self.rounds.deaths.append(process.code)
        self.rounds.log += process.printed
        self.watch(process.printed)

    def written(self) -> str:
        """The whole lines that the tracer wrote since the last process ended. Children of a dead
        process may still be at work.
        """
        with (self.rounds.folder / "trace").open("rb") as file:
            file.seek(self.read)
            return "\n" + file.read().decode("ascii").rpartition("\n")[0] + "\n"

    def watch(self, printed: str) -> None:
        written = self.written()
        self.read += len(written) - 1
        seen = list(moments(written.splitlines(), self.begun))
        self.rounds.made = self.rounds.made or seen
        watch = Watch(self.disk, callbacks_of(printed))
        watch.observe(seen)
        self.rounds.watches.append(watch)
        there = {str(path): path.read_bytes() for path in self.place.rglob("*") if path.is_file()}
        for moment in watch.unsure:
            if differing(there, self.disk) & {moment.call.path, moment.call.other}:
                self.disk.observe(moment)
        self.rounds.differing.extend(
            f"{name} in round {len(self.rounds.watches)}" for name in differing(there, self.disk)
        )

    def cut(self, coin: Coin | None) -> None:
        """Cuts the power, unless the coin is None."""
        if coin is not None:
            self.place = self.rounds.folder / f"disk-{len(self.rounds.watches)}"
            self.disk.lay(self.place, coin)
            self.disk = Disk(self.place)


def differing(there: dict[str, bytes], disk: Disk) -> set[str]:
    """The files that differ from the trace. SQLite writes one of them through memory, so it does
    not count.
    """
    known = {f"{disk.root}/{name}": content for name, content in disk.left(kept).items()}
    return {
        name
        for name in there.keys() | known.keys()
        if not name.endswith("-shm") and there.get(name) != known.get(name)
    }


async def ordering(client: httpx.AsyncClient, answered: set[str], name: str) -> None:
    """A client that submits orders until the service stops answering. It waits for the end of every
    other order.
    """
    with suppress(httpx.TransportError):
        for number in range(1000):
            headers = {
                "prefer": "wait=30" if number % 2 else "respond-async",
                "idempotency-key": f"{name}-{number}",
            }
            task = got(
                await client.post(
                    SUBMIT, json=order(prompt=f"{name}-{number}", n=1 + number % 2), headers=headers
                )
            )
            answered.add(task["id"])


async def killed(stage: Stage, seed: int) -> None:
    async with stage.serving() as (process, client):
        if not stage.rounds.watches:
            got(
                await client.post(
                    "/v1/endpoints", json={"url": stage.subscriber.url, "types": ["image.task.*"]}
                ),
                201,
            )
        enough = random.Random(seed).randrange(MOST // 5, MOST)
        orders = asyncio.gather(
            *(
                ordering(client, stage.rounds.answered, f"{seed}-{number}")
                for number in range(CLIENTS)
            )
        )
        trace = stage.rounds.folder / "trace"
        begun = trace.stat().st_size
        await wait_until(
            lambda: trace.stat().st_size - begun >= enough or process.code is not None, PATIENCE_S
        )
        process.signal(signal.SIGKILL)
        await orders
    stage.cut(coin(seed))


async def finished(stage: Stage) -> None:
    """Lets the last service run until no work is left, and reads its results."""
    rounds = stage.rounds
    async with stage.serving() as (process, client):

        async def quiet() -> bool:
            rounds.tasks = await listed(client, "tasks")
            if all(task["state"] in ("completed", "failed") for task in rounds.tasks) and all(
                delivery["state"] == "delivered" for delivery in await listed(client, "deliveries")
            ):
                return True
            if await listed(client, "events"):
                await passing(client)
            return False

        await wait_until(quiet, PATIENCE_S)
        rounds.tasks, rounds.events = await listed(client, "tasks"), await listed(client, "events")
        for image in (image for task in rounds.tasks for image in task["images"]):
            rounds.pictures[image["sha256"]] = (await client.get(image["url"])).content
        process.signal(signal.SIGTERM)
    rounds.received = [got.headers["webhook-id"] for got in stage.subscriber.received]
    rounds.posts = dict(stage.upstream.posts)


async def run(folder: Path) -> Rounds:
    rounds = Rounds(folder)
    place = folder / "disk"
    place.mkdir()
    upstream = Upstream(create_sandbox(SANDBOX))
    async with AsyncExitStack() as stack:
        launcher = stack.enter_context(launching(*tracing(folder / "trace")))
        url, listening = (
            await stack.enter_async_context(answering(upstream)),
            await stack.enter_async_context(subscriber()),
        )
        stage = Stage(
            rounds, launcher, upstream, url, listening, kept_port(stack), place, Disk(place)
        )
        for seed in SEEDS:
            await killed(stage, seed)
        await finished(stage)
        rounds.place = stage.place
    if not rounds.differing and not any(watch.broken for watch in rounds.watches):
        (folder / "trace").unlink()  # the copy is large
    return rounds
