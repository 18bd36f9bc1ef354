"""One task's life through real processes that die or pause at checkpoints, and a record of the
state at its end.
"""

import hashlib
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.api import SUBMIT, got, order
from tests.crash.bench import Bench
from tests.crash.death import Death, death, pictures
from tests.launcher import LOG, Launched
from tests.processes import UPSTREAM_KEY
from tests.waiting import wait_until

JSON = dict[str, Any]
PATIENCE_S = 90.0
LEASE_MS = 6000
PICTURES = 2
TERMINAL = {f"image.task.{state}" for state in ("completed", "failed", "cancelled", "expired")}
SETTINGS = {
    "SECRET_KEY": "the secret key of the crash tests that all share",
    "SUBMIT_TIMEOUT_S": "5",
    "SUBMIT_SCHEDULE": "0.3",
    "UNCERTAIN_AFTER_S": "6",
    "RECONCILE_AFTER_S": "600",
    "DELIVERY_SCHEDULE": "0.3",
    "STOP_S": "5",
}


@dataclass(frozen=True, slots=True)
class Case:
    """The checkpoints at which the processes of a case die, one after the other. With `paused` its
    only process stops there until another process has done its work, or on SQLite until its lease
    has expired. With `late` the other process has given the task up meanwhile.
    """

    store: str
    points: tuple[str, ...]
    paused: bool = False
    late: bool = False

    def __str__(self) -> str:
        words = [self.store, *["paused"] * self.paused, *["late"] * self.late, *self.points]
        return "-".join(words)

    @property
    def erased(self) -> bool:
        return self.points[-1] == "erase.committed"

    @property
    def doubted(self) -> bool:
        """Whether the paused process holds the upstream's answer."""
        return self.paused and self.points[0] == "submission.answered" and not self.late


@dataclass(slots=True)
class Ended:
    """The state after all work is done. `posts` are the idempotency keys of the task's submissions
    to the upstream, `answers` the answers to its callbacks. `after` is the state of a task that the
    paused process took after it continued.
    """

    exits: list[int | None]
    deaths: list[Death]
    tasks: list[JSON]
    events: list[JSON]
    deliveries: list[JSON]
    posts: list[str]
    received: list[str]
    originals: list[bytes]
    served: list[bytes]
    files: list[str]
    unfinished: list[str]
    log: str
    answers: list[int | None]
    steps: list[str]
    after: str | None = None


class Life:
    """A case under way."""

    def __init__(
        self, case: Case, bench: Bench, environment: dict[str, str], stack: AsyncExitStack
    ) -> None:
        self.case, self.bench, self.environment, self._stack = case, bench, environment, stack
        self.told: list[str] = []  # the ids that the service answered to the client
        self.deaths: list[Death] = []
        sandbox: JSON = {}
        if case.doubted or case.late:
            sandbox = {"drop_callback": True}
        elif case.paused and case.points[0].startswith("inbox."):
            sandbox = {"delay": 3}  # the process has recorded the submission before it pauses
        self.body = order(prompt=str(case), n=PICTURES, **({"sandbox": sandbox} if sandbox else {}))

    @property
    def folder(self) -> Path:
        return self.bench.folder / str(self.case)

    @property
    def heard(self) -> list[str]:
        """The ids of the events that the subscriber received."""
        return [
            got.headers["webhook-id"]
            for got in self.bench.subscriber.received
            if got.path == f"/{self.case}"
        ]

    async def start(self, port: int, **more: str) -> tuple[Launched, httpx.AsyncClient]:
        async with self.bench.starting:
            environment = self.environment | more | {"DARKROOM_PORT": str(port)}
            return await self.bench.start(self._stack, self.folder, environment)

    async def submit(self, client: httpx.AsyncClient, prefer: str = "respond-async") -> JSON:
        return got(await self.ask(client, prefer))

    async def ask(self, client: httpx.AsyncClient, prefer: str = "respond-async") -> httpx.Response:
        return await client.post(
            SUBMIT, json=self.body, headers={"prefer": prefer, "idempotency-key": "once"}
        )

    async def subscribe(self, client: httpx.AsyncClient) -> None:
        url = f"{self.bench.subscriber.url}/{self.case}"
        got(await client.post("/v1/endpoints", json={"url": url, "types": ["image.task.*"]}), 201)

    async def killed(self, process: Launched, client: httpx.AsyncClient) -> int | None:
        """Waits until the process has died, and acts as its client meanwhile. Returns the exit
        code.
        """
        with suppress(httpx.TransportError):
            self.told.append((await self.submit(client))["id"])
            if self.case.erased:
                task = await self.quiet(client)
                await client.delete(f"/v1/tasks/{task['id']}")
        await wait_until(lambda: process.code is not None, PATIENCE_S)
        posts, database = (
            len(self.bench.upstream.posts[str(self.case)]),
            self.environment.get("DARKROOM_DATABASE_URL"),
        )
        self.deaths.append(
            await death(
                self.folder / "data", database, told=list(self.told), posts=posts, heard=self.heard
            )
        )
        return process.code

    async def quiet(self, client: httpx.AsyncClient) -> JSON:
        """Waits until the task has ended and every delivery has arrived."""
        task = await self.submit(client, "wait=90")

        async def told() -> bool:
            if all(
                delivery["state"] == "delivered" for delivery in await listed(client, "deliveries")
            ):
                return True
            await passing(client)
            return False

        await wait_until(told, PATIENCE_S)
        return task

    async def called_back(self, upstream: httpx.AsyncClient, task: JSON) -> bool:
        """Whether the service answered the last callback and judged every callback that it kept."""
        (source,) = await made(upstream, task)
        answers = [call["status"] for call in source["callbacks"]]
        kept = answers.count(200) + (self.case.points[0] == "inbox.committed")
        lines = (self.folder / LOG).read_text().count("callback.received")
        return answers[-1:] == [200] and lines >= kept

    async def seen(self, client: httpx.AsyncClient, exits: list[int | None]) -> Ended:
        task = await self.quiet(client)
        if self.case.erased:
            got_nothing = await client.delete(f"/v1/tasks/{task['id']}")
            assert got_nothing.status_code == 204, got_nothing.text
        tasks = await listed(client, "tasks")
        theirs = {"authorization": f"Bearer {UPSTREAM_KEY}"}
        async with httpx.AsyncClient(
            base_url=self.bench.upstream_url, headers=theirs, trust_env=False, timeout=10
        ) as upstream:
            if self.case.points[0].startswith("inbox.") and not self.case.paused:
                await wait_until(lambda: self.called_back(upstream, task), PATIENCE_S)
            sources = await made(upstream, task)
            originals = [
                (await upstream.get(link)).content
                for source in sources
                for link in source["results"]
            ]
        served = [await client.get(image["url"]) for image in tasks[0]["images"]]
        files, unfinished = pictures(self.folder / "data")
        steps = got(await client.get(f"/v1/tasks/{task['id']}/timeline"))["data"]
        return Ended(
            exits=exits,
            deaths=self.deaths,
            tasks=tasks,
            events=await listed(client, "events"),
            deliveries=await listed(client, "deliveries"),
            posts=self.bench.upstream.posts[str(self.case)],
            received=self.heard,
            originals=originals,
            served=[answer.content for answer in served if answer.status_code == 200],
            files=sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in files),
            unfinished=[path.name for path in unfinished],
            log=(self.folder / LOG).read_text(),
            answers=[call["status"] for source in sources for call in source["callbacks"]],
            steps=[step["step"] for step in steps],
        )


async def made(upstream: httpx.AsyncClient, task: JSON) -> list[JSON]:
    """The upstream's tasks for a task."""
    sources = await listed(upstream, "tasks", "/sandbox")
    return [source for source in sources if source["idempotency_key"] == task["id"]]


async def passing(client: httpx.AsyncClient) -> None:
    """Waits for a moment at the service. Dozens of polling cases would slow the service down."""
    last = max(int(event["sequence"]) for event in await listed(client, "events"))
    await client.get("/v1/events", params={"after": last, "wait": 0.5})


async def listed(client: httpx.AsyncClient, what: str, below: str = "/v1") -> list[JSON]:
    data: list[JSON] = (await client.get(f"{below}/{what}", params={"limit": 1000})).json()["data"]
    return data
