"""What one task costs its store, from the submission to the recorded delivery: one picture and one
endpoint. The limits are counts, so they hold on any machine. A change that lowers a count lowers
its limit here and its row in docs/benchmarks.md.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from starlette.responses import Response

from service.queue import shared_commits, worker
from tests.round_trips import READ, WRITE, counted_statements, relay
from tests.upstream import Upstream, document, picture
from tests.waiting import wait_until
from tests.world import Subscriber, World, subscriber, world

# Of one task: statements (with BEGIN and COMMIT), write and read transactions, bytes of the WAL.
SQLITE = (60, 7, 0, 380_000)
ROUND_TRIPS = 62
IDLE_A_SECOND = 2.0
TASKS = 7  # the median counts: looks for due work fall into some of them
IDLE_S = 10.0


@asynccontextmanager
async def at_work(
    folder: Path, **settings: Any
) -> AsyncIterator[tuple[World, Upstream, Subscriber]]:
    """A world with one endpoint, on an upstream that sends no callback by itself."""
    upstream = Upstream(files={"picture": [Response(picture("JPEG"), media_type="image/jpeg")]})
    async with world(folder, upstream=upstream.app, **settings) as made, subscriber() as takes:
        endpoint = {"url": takes.url, "types": ["image.task.completed"]}
        (await made.client.post("/v1/endpoints", json=endpoint)).raise_for_status()
        yield made, upstream, takes


async def one_task(here: World, upstream: Upstream, takes: Subscriber) -> None:
    """Submits a task, calls back, and waits until the worker is done with the delivery."""
    count = len(takes.received)
    task = await here.submit(prompt=f"task {count}")
    result = document("completed", f"{here.sandbox_url}/files/picture", id=task["upstream_id"])
    upstream.queries[task["upstream_id"]] = [result]
    answer = await here.stranger.post(here.callback_url(task["id"]), content=bytes(result.body))
    assert answer.json() == {"status": "accepted"}
    delivered = here.context.resources.metrics.registry.get_sample_value
    await wait_until(
        lambda: delivered("darkroom_deliveries_total", {"outcome": "delivered"}) == count + 1
    )


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """On a slow machine a task costs no more: no look for due work falls into it, and its
    confirmation waits for the download.
    """
    monkeypatch.setattr(worker, "LOOK_S", 60.0)
    monkeypatch.setattr(shared_commits, "LONGEST_S", 30.0)
    return monkeypatch


@pytest.mark.usefixtures("patient")
async def test_a_task_costs_few_statements_on_sqlite(tmp_path: Path) -> None:
    with counted_statements() as statements:
        async with at_work(tmp_path) as running:
            await one_task(*running)
            wal, figures = tmp_path / "data" / "darkroom.db-wal", []
            for _ in range(TASKS):
                statements.clear()
                size = wal.stat().st_size
                await one_task(*running)
                counts = [len(statements), statements.count(WRITE), statements.count(READ)]
                figures.append([*counts, wal.stat().st_size - size])
    least = [min(each) for each in zip(*figures, strict=True)]  # a look in between adds
    assert all(count <= most for count, most in zip(least, SQLITE, strict=True)), figures


async def test_a_task_costs_few_round_trips_on_postgresql_and_an_idle_process_next_to_none(
    postgres_url: str, patient: pytest.MonkeyPatch
) -> None:
    with TemporaryDirectory(prefix="darkroom-") as name:  # the path of a socket is short
        folder, figures = Path(name), []
        async with (
            relay(postgres_url, folder) as counted,
            at_work(folder, database_url=counted.url, secret_key="s" * 32) as running,
        ):
            for _ in range(TASKS):  # a statement takes a round trip more on a new connection
                await one_task(*running)
            for _ in range(TASKS):
                before = counted.round_trips
                await one_task(*running)
                figures.append(counted.round_trips - before)
            patient.undo()
            await one_task(*running)  # looks begin again
            await asyncio.sleep(1)  # looks that follow the work
            before = counted.round_trips
            await asyncio.sleep(IDLE_S)
            idle = (counted.round_trips - before) / IDLE_S
    assert min(figures) <= ROUND_TRIPS, figures
    print(f"{idle} a second while idle")
    assert idle <= IDLE_A_SECOND
