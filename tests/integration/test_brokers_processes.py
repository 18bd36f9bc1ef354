"""Publishing processes that are killed. They start as a user starts them, over a real NATS server
with JetStream on disk.
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.api import ASYNC, JSON, submitted
from tests.brokers import START_S, BrokerServer, address, broker_running, made, reader
from tests.integration.test_brokers import caught_up
from tests.processes import ADMIN_KEY, Running, sandbox, service_settings, started
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(300)
ENDS = {"image.task.completed", "image.task.failed"}
TARGET, SECRET = "events", "k" * 40


@pytest.fixture
async def server() -> AsyncIterator[BrokerServer]:
    with broker_running("nats") as running:
        await wait_until(running.up, START_S)
        yield running


def client_of(running: Running) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=running.address,
        headers={"authorization": f"Bearer {ADMIN_KEY}"},
        trust_env=False,
        timeout=60,
    )


async def all_told(client: httpx.AsyncClient, tasks: int) -> list[JSON]:
    """Waits until each task has ended and returns every event. A submission that a kill cut off is
    given up after a second.
    """

    async def look() -> list[JSON] | None:
        events: list[JSON] = (await client.get("/v1/events", params={"limit": 1000})).json()["data"]
        ended = {event["subject"] for event in events if event["type"] in ENDS}
        return events if len(ended) >= tasks else None

    events: list[JSON] = await wait_until(look, 120)
    return events


def publisher(both: list[Running], sequence: str) -> Running | None:
    """The process that has told that it published this event."""
    for running in both:
        if any(line["sequence"] >= sequence for line in running.logged("sink.published")):
            return running
    return None


async def test_a_service_that_is_killed_again_and_again_publishes_every_event_once(
    server: BrokerServer, tmp_path: Path
) -> None:
    """The process gets SIGKILL four times while events flow. The broker ends with all events, in
    sequence, each once.
    """
    taken, tasks = reader("nats", server.port, TARGET), 40
    with sandbox("--delay", "0.2", folder=tmp_path) as upstream:
        settings = service_settings(
            upstream.address,
            tmp_path,
            SINKS=address("nats", server.port, TARGET),
            UNCERTAIN_AFTER_S="1",
            RECONCILE_AFTER_S="2",
            TEST_LEASE_MS="5000",
        )
        for round in range(4):
            with started("serve", folder=tmp_path, **settings) as running:
                if round == 0:
                    await made(server, TARGET)
                before = len(await taken())
                async with client_of(running) as client:
                    await asyncio.gather(*(submitted(client, ASYNC) for _ in range(tasks // 4)))

                async def more(before: int = before) -> bool:
                    return len(await taken()) > before

                await wait_until(more, START_S)
                running.signal(signal.SIGKILL)
        with started("serve", folder=tmp_path, **settings) as running:
            async with client_of(running) as client:
                ids = [event["id"] for event in await all_told(client, tasks)]
            got = [message.id for message in await caught_up(taken, ids)]
    assert got[: len(ids)] == ids
    assert len(set(got)) == len(got)


async def test_another_process_goes_on_where_a_dead_one_was(
    server: BrokerServer, postgres_url: str, tmp_path: Path
) -> None:
    """Two processes share one PostgreSQL and one of them publishes. After it is killed, the other
    takes over within the lease time, and loses and repeats nothing.
    """
    taken = reader("nats", server.port, TARGET)
    with sandbox("--delay", "0.1", folder=tmp_path) as upstream, ExitStack() as stack:
        more = {
            "DATABASE_URL": postgres_url,
            "SECRET_KEY": SECRET,
            "UNCERTAIN_AFTER_S": "1",
            "SINKS": address("nats", server.port, TARGET),
            "TEST_LEASE_MS": "5000",
        }
        settings = service_settings(upstream.address, tmp_path, **more)
        both = [
            stack.enter_context(started("serve", folder=tmp_path, **settings)) for _ in range(2)
        ]
        await made(server, TARGET)
        async with client_of(both[0]) as client:
            for _ in range(5):
                await submitted(client, ASYNC)
            first = await all_told(client, 5)
        await caught_up(taken, [event["id"] for event in first])
        publishing = await wait_until(lambda: publisher(both, first[-1]["sequence"]))
        (other,) = [running for running in both if running is not publishing]
        async with client_of(other) as client:
            tasks = [await submitted(client, ASYNC) for _ in range(5)]
            os.kill(publishing.process.pid, signal.SIGKILL)
            tasks += [await submitted(client, ASYNC) for _ in range(5)]
            events = await all_told(client, 5 + len(tasks))
        got = [
            message.id for message in await caught_up(taken, [event["id"] for event in events], 120)
        ]
    assert got[: len(events)] == [event["id"] for event in events]
