"""The test kills consumers again and again while events flow. They are the programs of
docs/consuming.md, at a service in a process of its own.
"""

import asyncio
import os
import random
import sqlite3
from contextlib import AsyncExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api import ASYNC, got, submitted
from tests.brokers import PASSWORD, START_S, USER, address, broker_running, made
from tests.consumers.programs import quick, written
from tests.environment import STOP_S
from tests.launcher import Forked
from tests.processes import ADMIN_KEY, forked, sandbox, service_settings, started
from tests.servers import free_port
from tests.waiting import wait_until

KILLS, TASKS = 20, 500
ROUND = TASKS // KILLS  # tasks between two kills, with two events each
PICTURES = 5  # the tasks of a round that complete; the rest fail, which takes less time
SCHEDULE = ",".join(["0.1"] * 40 + ["1"] * 60)
PATIENCE_S = 100


@dataclass(slots=True)
class Consumer:
    """A program with an inbox of its own. The test kills it at moments that `random` chooses, and
    starts it again at once.
    """

    folder: Path
    program: str
    environment: dict[str, str]
    random: random.Random
    port: int = 0
    kills: int = 0
    running: list[Forked] = field(default_factory=list)

    def start(self) -> None:
        output, faults = self.folder / "output", self.folder / f"{self.program}.faults"
        prelude = quick(self.program, self.port)
        self.running.append(forked((), self.folder, output, faults, self.environment, prelude))

    def kill(self) -> None:
        self.stop()
        self.kills += 1

    def stop(self) -> None:
        process = self.running.pop()
        process.kill()
        process.wait(STOP_S)

    @property
    def count(self) -> int:
        faults = self.folder / f"{self.program}.faults"
        assert self.running[-1].poll() is None, faults.read_text("utf-8")[-2000:]
        with (
            closing(sqlite3.connect(self.folder / "inbox.db", timeout=30)) as db,
            suppress(sqlite3.OperationalError),
        ):  # the inbox does not exist yet
            return int(db.execute("SELECT count(*) FROM events").fetchone()[0])
        return 0

    @property
    def kept(self) -> list[tuple[str, str]]:
        """Id and sequence of the events in the inbox, in order of arrival."""
        with closing(sqlite3.connect(self.folder / "inbox.db", timeout=30)) as db:
            return db.execute("SELECT id, sequence FROM events ORDER BY rowid").fetchall()

    async def live(self, number: int) -> None:
        """Waits until the program is killed among a round's first events and has started again.
        Some starts are killed once more.
        """
        moment = number * 2 * ROUND + self.random.randint(0, ROUND)
        await wait_until(lambda: self.count >= moment, PATIENCE_S)
        self.kill()
        self.start()
        if self.random.random() < 0.25:
            self.kill()
            self.start()


def consumer(
    folder: Path, program: str, seed: int, environment: dict[str, str], port: int = 0
) -> Consumer:
    folder = folder / program.removesuffix(".py")
    folder.mkdir()
    written(folder)
    return Consumer(folder, program, environment, random.Random(f"{seed} {program}"), port)


@pytest.mark.timeout(480)
async def test_consumers_that_are_killed_end_with_every_event_once(tmp_path: Path) -> None:
    """The consumers get twenty kills each, by webhook, stream, pull and NATS. They miss no event,
    drop each repeated event, and the readers keep the sequence.
    """
    seed = int(os.environ.get("DARKROOM_TEST_SEED") or random.SystemRandom().randrange(2**32))
    print(f"DARKROOM_TEST_SEED={seed}")
    async with AsyncExitStack() as stack:
        upstream = stack.enter_context(sandbox("--delay", "0", folder=tmp_path))
        broker = stack.enter_context(broker_running("nats"))
        await wait_until(broker.up, START_S)
        settings = service_settings(
            upstream.address,
            tmp_path,
            DELIVERY_SCHEDULE=SCHEDULE,
            SINKS=address("nats", broker.port, "darkroom"),
        )
        service = stack.enter_context(started("serve", folder=tmp_path, **settings))
        key = {"authorization": f"Bearer {ADMIN_KEY}"}
        client = await stack.enter_async_context(
            httpx.AsyncClient(base_url=service.address, headers=key, timeout=60, trust_env=False)
        )
        port = free_port()
        endpoint = got(
            await client.post(
                "/v1/endpoints", json={"url": f"http://127.0.0.1:{port}/hooks", "types": ["*"]}
            ),
            201,
        )
        reading = {"DARKROOM_URL": service.address, "DARKROOM_API_KEY": ADMIN_KEY}
        webhooks = consumer(
            tmp_path, "with_starlette.py", seed, {"SECRET": endpoint["secret"]}, port
        )
        readers = [
            consumer(tmp_path, program, seed, reading) for program in ("follow.py", "pull.py")
        ]
        await made(broker, "darkroom")
        account = {
            "NATS_URL": f"nats://127.0.0.1:{broker.port}",
            "NATS_USER": USER,
            "NATS_PASSWORD": PASSWORD,
        }
        messages = consumer(tmp_path, "from_nats.py", seed, account)
        consumers = [webhooks, messages, *readers]
        for each in consumers:
            each.start()
            stack.callback(each.stop)
        for number in range(KILLS):
            faults: list[dict[str, Any]] = [{}] * PICTURES + [
                {"sandbox": {"fail": "service_error"}}
            ] * (ROUND - PICTURES)
            flow = asyncio.gather(*(submitted(client, ASYNC, **fault) for fault in faults))
            await asyncio.gather(flow, *(each.live(number) for each in consumers))

        async def delivered() -> bool:
            return not got(await client.get("/v1/deliveries", params={"state": "pending"}))["data"]

        await wait_until(lambda: all(each.count >= 2 * TASKS for each in consumers), PATIENCE_S)
        await wait_until(delivered, PATIENCE_S)  # whose end may be an event
        events = await outbox(client)
        of_tasks = await outbox(client, type="image.task.*")
        # The killed receiver fails and recovers, which is an event for operators.
        await wait_until(lambda: all(each.count >= len(events) for each in consumers), PATIENCE_S)
        attempts = len(service.logged("delivery.attempted"))
        print(f"killed {[each.kills for each in consumers]} times, {attempts} requests")
    assert len(of_tasks) == 2 * TASKS < attempts
    assert all(each.kills >= KILLS for each in consumers)
    for each in (webhooks, messages):
        assert sorted(each.kept) == sorted(events), f"{each.program}, seed {seed}"
    for each in readers:
        assert each.kept == events, f"{each.program}, seed {seed}"


async def outbox(client: httpx.AsyncClient, **query: str) -> list[tuple[str, str]]:
    """Every event in sequence, read by a client that is never killed."""
    found: list[tuple[str, str]] = []
    while page := got(
        await client.get(
            "/v1/events", params={"after": found[-1][1] if found else "0", "limit": 1000, **query}
        )
    )["data"]:
        found += [(event["id"], event["sequence"]) for event in page]
    return found
