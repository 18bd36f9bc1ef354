"""The end of a task that the upstream never ends, over raw sockets."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from service.db import tables
from service.db.transaction import Transaction
from service.tasks import task_queries
from service.tasks.rows import TaskRow
from tests.downloads import bytes_of, quick
from tests.partial import COMPLETED, Said
from tests.untidy import Shape, response
from tests.upstream import picture
from tests.waiting import wait_until
from tests.world import World, world

JSON = dict[str, Any]
TTL_S, LONG_S = 1.0, 50
NEVER = [
    b'{"id": "$ID", "status": "processing"}',
    b'{"id": "$ID", "status": "pending", "progress": 99}',
    b'{"status": "in_queue"}',
    b'{"status": ""}',
    b'{"id": "$ID"}',
    b'{"id": "$ID", "status": null}',
    b'{"status": 7}',
    b'{"status": {"name": "processing"}}',
    b'{"id": "$ID", "status": "in_review", "results": ["$LINK"]}',
    b'{"id": "$ID", "status": "done", "status": "failed"}',
    b'{"id": "$ID", "status": "processing", "results": ["$LINK"]}',
]


@asynccontextmanager
async def living(folder: Path, server: Said, ttl_s: float) -> AsyncIterator[World]:
    """A silent task would be queried after ten minutes, if it had the time."""
    settings: JSON = {
        "evolink_base_url": server.url,
        "reconcile_after_s": 600,
        "evolink_task_ttl_s": ttl_s,
    }
    with quick():
        async with world(folder, **settings) as made:
            yield made


@pytest.fixture(scope="module")
async def here(server: Said, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    async with living(tmp_path_factory.mktemp("ttl"), server, TTL_S) as made:
        yield made


@pytest.fixture
async def patient(server: Said, tmp_path: Path) -> AsyncIterator[World]:
    """Its tasks have more time than a test takes."""
    async with living(tmp_path, server, LONG_S) as made:
        yield made


async def submitted(here: World, server: Said, *queries: bytes) -> JSON:
    return await here.submit(prompt=server.scripted(*queries))


def asked(server: Said, task: JSON) -> int:
    return server.asked.count(("query", server.names[task["upstream_id"]]))


async def types(here: World, task: JSON) -> list[str]:
    return [event["type"] for event in await here.events(task=task["id"])]


async def test_a_task_that_never_ends_expires_at_its_time(here: World, server: Said) -> None:
    """The upstream is asked at that moment, whatever the backoff, and no more after it."""
    tasks = {answer: await submitted(here, server, answer) for answer in NEVER}
    for answer, task in tasks.items():
        ended = await here.ended(task["id"])
        assert (ended["state"], ended["error"]["code"]) == ("expired", "expired"), answer
        assert asked(server, task) == 1, answer
    await asyncio.sleep(0.3)
    for answer, task in tasks.items():
        assert asked(server, task) == 1, answer
        assert await types(here, task) == ["image.task.submitted", "image.task.expired"], answer


async def planned(here: World, task: JSON, asked_so_far: Callable[[], bool]) -> TaskRow:
    """The task's row once its query has been recorded."""

    async def look() -> TaskRow | None:
        if not asked_so_far():
            return None
        row = await here.context.resources.store.read(task_queries.task_row, task["id"], None)
        return row if row and row.settle_lease_until is None else None

    row: TaskRow = await wait_until(look)
    return row


def end_time(tx: Transaction, ids: Sequence[str]) -> list[None]:
    """The time of the tasks is up now, and a query is due."""
    for task_id in ids:
        values = {"submitted_at": tx.now - LONG_S * 1000, "settle_due_at": tx.now}
        tx.change(tables.tasks, task_id, values)
    return [None] * len(ids)


async def test_a_query_just_before_shortens_the_next_wait(patient: World, server: Said) -> None:
    """After an early query the next one would come a minute later."""
    task = await submitted(patient, server, NEVER[0])
    assert (await patient.client.post(f"/v1/tasks/{task['id']}/reconcile")).status_code == 200
    row = await planned(patient, task, lambda: asked(server, task) == 1)
    assert row.submitted_at is not None
    assert row.settle_due_at == row.submitted_at + LONG_S * 1000
    await patient.context.resources.store.write(end_time, task["id"])
    assert (await patient.ended(task["id"]))["state"] == "expired"
    assert asked(server, task) == 2


async def test_retry_after_does_not_put_the_end_off(patient: World, server: Said) -> None:
    """Silence is no answer, so the worker asks again until the upstream says something."""
    task = await submitted(patient, server, NEVER[0])
    name = server.names[task["upstream_id"]]
    busy = response("Content-Length: %d", "Retry-After: 3600", status="503 Busy")
    server.shapes["query", name] = Shape(busy)
    assert (await patient.client.post(f"/v1/tasks/{task['id']}/reconcile")).status_code == 200
    row = await planned(patient, task, lambda: asked(server, task) == 1)
    assert row.submitted_at is not None
    assert row.settle_due_at == row.submitted_at + LONG_S * 1000
    await patient.context.resources.store.write(end_time, task["id"])
    await planned(patient, task, lambda: asked(server, task) == 2)
    assert (await patient.task(task["id"]))["state"] == "submitted"
    del server.shapes["query", name]
    await patient.client.post(f"/v1/tasks/{task['id']}/reconcile")
    assert (await patient.ended(task["id"]))["state"] == "expired"


async def test_late_proof_still_counts(here: World, server: Said) -> None:
    """The picture is stored and listed, and operators are told. State and event stand."""
    task = await submitted(here, server, NEVER[0], NEVER[0], COMPLETED)
    assert (await here.ended(task["id"]))["state"] == "expired"
    body = json.dumps({"id": task["upstream_id"], "status": "completed"})
    said = await here.stranger.post(here.callback_url(task["id"]), content=body)
    assert said.status_code == 200

    async def saved() -> JSON | None:
        now = await here.task(task["id"])
        return now if now["images"] else None

    now = await wait_until(saved)
    assert (now["state"], await bytes_of(here, now["images"][0])) == ("expired", picture())

    async def told() -> bool:
        return "task.late_result" in await types(here, task)

    await wait_until(told)
    assert (await types(here, task)).count("image.task.expired") == 1
