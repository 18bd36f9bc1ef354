"""Erasure by the owner and removal by retention, over real sockets."""

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from service.app import Role
from service.images.sweep import AGE_MS, sweep
from service.upkeep import retention, retention_sql
from service.upkeep.retention import DAY_MS, Retention
from tests.api import SUBMIT, TIME, UNTIL_DONE, got, order, refused, submitted
from tests.waiting import wait_until
from tests.world import World, subscriber, world

pytestmark = pytest.mark.slow

PROMPT = "a very private lighthouse"
JSON = dict[str, Any]


@pytest.fixture(params=["local", "s3"])
async def place(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    """A world that keeps its images in the local folder or on S3."""
    more: dict[str, Any] = (
        {}
        if request.param == "local"
        else {"blob_url": f"s3://{request.getfixturevalue('s3_bucket')}/images"}
    )
    async with world(tmp_path, **more) as made:
        yield made


async def kept(here: World) -> set[str]:
    return {blob.name async for page in here.context.resources.blobs.listed() for blob in page}


def later(here: World, ms: int, days: float = 30, image_days: float | None = None) -> Retention:
    """The retention job, with a clock that is `ms` ahead."""
    resources = here.context.resources
    return Retention(resources, days, image_days, 365, lambda: resources.store.clock() + ms)


async def pages(here: World, after: str | None = None) -> JSON:
    return got(
        await here.client.get("/v1/events", params={} if after is None else {"after": after})
    )


async def test_an_erased_task_has_no_content_and_its_images_are_gone(place: World) -> None:
    """The answer is 204, also the second time. The row keeps its figures, image links answer 410,
    and no blob is left.
    """
    task = await submitted(place.client, UNTIL_DONE, n=2, prompt=PROMPT, metadata={"customer": "7"})
    assert len(await kept(place)) == 2
    with capture_logs() as lines:
        for _ in range(2):
            answer = await place.client.delete(f"/v1/tasks/{task['id']}")
            assert (answer.status_code, answer.content) == (204, b"")
    assert [line["images"] for line in lines if line["event"] == "task.erased"] == [2, 0]
    assert await kept(place) == set()
    bare: JSON = {"prompt": None, "metadata": {}, "request": {}}
    bare |= {"images": [], "results": [], "data": []}
    erased = await place.task(task["id"])
    assert erased == {**task, **bare, "erased_at": erased["erased_at"]}
    assert re.fullmatch(TIME, erased["erased_at"])
    assert (task["state"], task["usage"]["credits_used"]) == (
        "completed",
        (await place.task(task["id"]))["usage"]["credits_used"],
    )
    for image in task["images"]:
        for headers in ({}, {"if-none-match": f'"{image["sha256"]}"'}, {"range": "bytes=0-1"}):
            refused(await place.stranger.get(image["url"], headers=headers), 410, "gone")
        assert (await place.stranger.head(image["url"])).status_code == 410
    for event in await place.events(task=task["id"]):
        assert (event["data"]["metadata"], event["data"]["request"], event["data"]["results"]) == (
            {},
            {},
            [],
        )
    assert [step["step"] for step in await place.steps(task["id"])][-1] == "task.erased"


async def test_only_a_task_that_has_ended_is_erased_and_only_by_its_owner(here: World) -> None:
    """A running task gets 409 by either id. A task of another owner gets 404, like an unknown task.
    A read key gets 403.
    """
    async with here.owner() as client, here.owner() as other, here.owner("read") as reader:
        task = await submitted(client, {}, sandbox={"delay": 600})
        for task_id in (task["id"], task["upstream_id"]):
            refused(
                await client.delete(f"/v1/tasks/{task_id}"),
                409,
                "task_not_ended",
                task_id=task["id"],
            )
            refused(await other.delete(f"/v1/tasks/{task_id}"), 404, "task_not_found")
        refused(
            await other.delete("/v1/tasks/task-unified-1757165031-unknown"), 404, "task_not_found"
        )
        refused(await reader.delete(f"/v1/tasks/{task['id']}"), 403)
        refused(await here.stranger.delete(f"/v1/tasks/{task['id']}"), 401)
        got(await client.post(f"/v1/tasks/{task['id']}/cancel"))
        assert (await client.delete(f"/v1/tasks/{task['upstream_id']}")).status_code == 204
        assert got(await client.get(f"/v1/tasks/{task['id']}"))["state"] == "cancelled"


async def test_the_same_order_again_is_the_erased_task(here: World) -> None:
    """The idempotency key is kept as long as the row, so a repeated submission is not paid twice. A
    repeated refusal comes back with the message "erased".
    """
    for more in ({}, {"sandbox": {"submit_status": 422}}):
        body, headers = (
            order(prompt=PROMPT, **more),
            {**UNTIL_DONE, "idempotency-key": f"order-{len(more)}"},
        )
        first = await here.client.post(SUBMIT, json=body, headers=headers)
        task_id = first.json()["id"] if not more else first.json()["error"]["task_id"]
        assert (await here.client.delete(f"/v1/tasks/{task_id}")).status_code == 204
        again = await here.client.post(SUBMIT, json=body, headers=headers)
        assert (again.status_code, again.headers["idempotency-replayed"]) == (
            first.status_code,
            "true",
        )
        if more:
            error = refused(again, 422, first.json()["error"]["code"], task_id=task_id)
            assert error["message"] == "erased"
        else:
            assert (got(again)["id"], got(again)["prompt"]) == (task_id, None)


async def test_images_that_the_store_cannot_delete_are_left_to_the_sweep(tmp_path: Path) -> None:
    """The task is erased although a blob cannot be deleted, and the failure is logged. The image
    link answers 410, and the sweep removes the blob later.
    """
    async with world(tmp_path) as here:
        task = await submitted(here.client, UNTIL_DONE)
        (name,) = await kept(here)
        path, aside = here.settings.image_dir / name, tmp_path / "aside"
        path.rename(aside)
        path.mkdir()  # a folder in place of the file
        with capture_logs() as lines:
            assert (await here.client.delete(f"/v1/tasks/{task['id']}")).status_code == 204
        assert [
            line["event"] for line in lines if line["event"] in ("task.erased", "blobs.failed")
        ] == ["task.erased", "blobs.failed"]
        path.rmdir()
        aside.rename(path)
        refused(await here.stranger.get(task["images"][0]["url"]), 410, "gone")
        assert await kept(here) == {name}
        resources = here.context.resources
        assert (
            await sweep(replace(resources, clock=lambda: resources.clock() + AGE_MS + 60_000)) == 1
        )


async def test_what_is_old_goes_and_readers_are_told(tmp_path: Path) -> None:
    """Events, deliveries, prompts and timelines go after the retention days, not a minute before.
    Images stay. The first page of a reader with an older sequence says `resync`.
    """
    async with world(tmp_path) as here, subscriber() as takes:
        got(await here.client.post("/v1/endpoints", json={"url": takes.url}), 201)
        task = await submitted(here.client, UNTIL_DONE, prompt=PROMPT, metadata={"customer": "7"})

        async def delivered() -> bool:
            found = got(await here.client.get("/v1/deliveries", params={"state": "pending"}))
            return len(takes.received) == 2 and not found["data"]

        await wait_until(delivered)
        before, page = await here.task(task["id"]), await pages(here)
        assert await later(here, 30 * DAY_MS - 60_000).apply() == {
            "events": 0,
            "deliveries": 0,
            "tasks": 0,
            "images": 0,
            "files": 0,
        }
        assert (await here.task(task["id"]), await pages(here)) == (before, page)
        with capture_logs() as lines:
            assert await later(here, 30 * DAY_MS + 1).apply() == {
                "events": 2,
                "deliveries": 2,
                "tasks": 1,
                "images": 0,
                "files": 0,
            }
        (line,) = [line for line in lines if line["event"] == "retention.applied"]
        assert (line["events"], line["deliveries"], line["tasks"], line["images"]) == (2, 2, 1, 0)
        bare = await here.task(task["id"])
        gone: JSON = {"prompt": None, "metadata": {}, "request": {}}
        assert bare == {**before, **gone, "erased_at": bare["erased_at"]}
        assert re.fullmatch(TIME, bare["erased_at"])
        assert [step["step"] for step in await here.steps(task["id"])] == ["task.erased"]
        assert got(await here.client.get("/v1/deliveries"))["data"] == []
        assert (await here.stranger.get(task["images"][0]["url"])).status_code == 200
        first = page["data"][0]["sequence"]
        assert await pages(here, first) == {
            "data": [],
            "next_after": page["next_after"],
            "resync": True,
        }
        assert await pages(here) == {
            "data": [],
            "next_after": page["next_after"],
            "resync": False,
        }, "a reader without a position starts at the oldest event"
        assert (await pages(here, page["next_after"]))["resync"] is False
        held = await asyncio.wait_for(
            here.client.get("/v1/events", params={"after": first, "wait": 60}), 30
        )
        assert got(held)["resync"] is True, "the answer comes at once"
        assert await later(here, 31 * DAY_MS).apply() == {
            "events": 0,
            "deliveries": 0,
            "tasks": 0,
            "images": 0,
            "files": 0,
        }


async def test_images_go_after_days_of_their_own(place: World) -> None:
    """After `image_days` the blobs are gone and links answer 410. The task's content stays. Without
    `image_days` images stay for ever.
    """
    task = await submitted(place.client, UNTIL_DONE, n=2, metadata={"customer": "7"})
    assert (await later(place, 5 * DAY_MS, days=30).apply())["images"] == 0
    assert (await later(place, 5 * DAY_MS - 60_000, days=30, image_days=5).apply())["images"] == 0
    assert len(await kept(place)) == 2
    assert (await later(place, 5 * DAY_MS, days=30, image_days=5).apply())["images"] == 2
    assert await kept(place) == set()
    for image in task["images"]:
        refused(await place.stranger.get(image["url"]), 410, "gone")
    assert await place.task(task["id"]) == {**task, "images": [], "results": [], "data": []}
    refused(await place.stranger.get(f"{place.url}/images/img_unknown"), 404, "image_not_found")


async def test_several_at_once_do_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three concurrent jobs with small batches remove each row once."""
    for limit in ("EVENTS", "DELIVERIES", "IMAGES"):
        monkeypatch.setattr(retention_sql, limit, 2)
    monkeypatch.setattr(retention_sql, "TASKS", 1)
    monkeypatch.setattr(retention, "PAUSE_S", 0)
    async with world(tmp_path) as here:
        tasks = [await submitted(here.client, UNTIL_DONE) for _ in range(4)]
        passes = await asyncio.gather(
            *(later(here, 99 * DAY_MS, image_days=1).apply() for _ in range(3))
        )
        assert {name: sum(each[name] for each in passes) for name in passes[0]} == {
            "events": 8,
            "deliveries": 0,
            "tasks": 4,
            "images": 4,
            "files": 0,
        }
        for task in tasks:
            assert (await here.task(task["id"]))["prompt"] is None
        assert await kept(here) == set()


async def test_processes_with_workers_apply_it_by_themselves(tmp_path: Path) -> None:
    """The job takes its days from the settings. Short ones make it run more often."""
    async with world(tmp_path, retention_days=1e-6, image_retention_days=1e-6) as here:
        task = await submitted(here.client, UNTIL_DONE, prompt=PROMPT)

        async def gone() -> bool:
            return (
                not await kept(here)
                and (await here.task(task["id"]))["prompt"] is None
                and not await here.events()
            )

        await wait_until(gone)


async def test_a_process_without_workers_removes_nothing(tmp_path: Path) -> None:
    before = asyncio.all_tasks()
    async with world(tmp_path, role=Role(workers=False)):
        assert "retention" not in {task.get_name() for task in asyncio.all_tasks() - before}
