"""Tasks in the HTTP API: their shape, lookup by id, timelines, and cancelling."""

import re
import time
from typing import Any

import pytest

from tests.api import TIME, UNTIL_DONE, an_id, got, refused, submitted
from tests.callbacks import said, verdict
from tests.waiting import wait_until
from tests.world import TEXT_TO_IMAGE, World, subscriber

JSON = dict[str, Any]
LATE = {"delay": 600}  # the task outlasts the test


# --- the shape
# --------------------------------------------------------------------------------------------------


async def test_a_queued_task_has_every_key_and_null_for_what_is_unknown(still: World) -> None:
    """The task's shape is fixed: all keys are always present."""
    async with still.owner() as client:
        task = await submitted(
            client, n=2, metadata={"order": "7"}, callback_url="http://127.0.0.1:9/done"
        )
    assert re.fullmatch(an_id("task"), task["id"])
    assert type(task["created"]) is int
    assert abs(task["created"] - time.time()) < 60
    assert task == {
        "id": task["id"],
        "owner": task["owner"],
        "object": "image.generation.task",
        "created": task["created"],
        "ended_at": None,
        "erased_at": None,
        "model": TEXT_TO_IMAGE,
        "type": "image",
        "status": "pending",
        "progress": 0,
        "task_info": {"can_cancel": True, "estimated_time": None},
        "usage": {
            "billing_rule": None,
            "credits_reserved": None,
            "credits_used": None,
            "user_group": None,
        },
        "results": [],
        "error": None,
        "state": "queued",
        "upstream": "evolink",
        "upstream_id": None,
        "metadata": {"order": "7"},
        "request": {"size": "768x768", "n": 2},
        "images": [],
        "prompt": "a lighthouse",
        "held": None,
        "warnings": [],
        "inputs": [],
        "data": None,
        "quarantine": None,
    }
    assert got(await still.client.get(f"/v1/tasks/{task['id']}")) == task


async def test_a_completed_task_lists_its_images_in_order_and_their_links_as_results(
    here: World,
) -> None:
    """`results` are our own links, in the upstream's order, and an image has every key."""
    task = await submitted(here.client, UNTIL_DONE, n=2)
    assert (task["status"], task["state"], task["progress"], task["error"]) == (
        "completed",
        "completed",
        100,
        None,
    )
    assert task["task_info"] == {"can_cancel": False, "estimated_time": 1}
    assert task["usage"] == {
        "billing_rule": "per_call",
        "credits_reserved": 4,
        "credits_used": 4,
        "user_group": "default",
    }
    assert [image["url"] for image in task["images"]] == task["results"]
    for index, image in enumerate(task["images"]):
        assert re.fullmatch(an_id("img"), image["id"])
        assert re.fullmatch("[0-9a-f]{64}", image["sha256"])
        assert image == {
            "id": image["id"],
            "index": index,
            "url": f"{here.url}/images/{image['id']}.png",
            "media_type": "image/png",
            "bytes": len((await here.stranger.get(image["url"])).content),
            "sha256": image["sha256"],
            "width": 768,
            "height": 768,
        }


async def test_a_failed_task_has_the_upstreams_error_and_no_results(here: World) -> None:
    """The task's error is the upstream's error."""
    task = await submitted(here.client, UNTIL_DONE, sandbox={"fail": "content_policy_violation"})
    assert (task["status"], task["state"], task["results"], task["images"]) == (
        "failed",
        "failed",
        [],
        [],
    )
    assert task["error"]["code"] == "content_policy_violation"
    assert {"code", "message", "type"} <= task["error"].keys()


async def test_a_task_is_found_by_our_id_and_by_the_upstreams(here: World) -> None:
    task = await submitted(here.client, headers={}, sandbox=LATE)
    assert task["upstream_id"].startswith("task-unified-")
    by_theirs = got(await here.client.get(f"/v1/tasks/{task['upstream_id']}"))
    assert by_theirs["id"] == task["id"]
    assert (
        got(await here.client.get(f"/v1/tasks/{task['upstream_id']}/timeline"))["data"][0]["step"]
        == "task.queued"
    )


@pytest.mark.parametrize(
    "id",
    [
        "task_aaaaaaaaaaaaaaaaaaaaaaaaaa",
        "unknown",
        "a" * 300,
        "%00",
        "task_%00",
        "a%20b",
        "%ff",
        "task_%3f",
    ],
)
async def test_an_unknown_id_is_not_found_whatever_it_looks_like(still: World, id: str) -> None:
    """The answer is 404 in the common error form, without a query to the upstream."""
    refused(await still.client.get(f"/v1/tasks/{id}"), 404)
    refused(await still.client.get(f"/v1/tasks/{id}/timeline"), 404)
    refused(await still.client.post(f"/v1/tasks/{id}/cancel"), 404)


# --- the timeline
# --------------------------------------------------------------------------------------------------


async def test_a_timeline_tells_every_step_in_order(here: World) -> None:
    """The timeline runs from `task.queued` to the delivery, each entry with its time and figures. A
    callback has its verdict, its count and the last time it arrived.
    """
    async with here.owner() as client, subscriber() as takes:
        got(
            await client.post(
                "/v1/endpoints", json={"url": takes.url, "types": ["image.task.completed"]}
            ),
            201,
        )
        task = await submitted(client, UNTIL_DONE, sandbox={"repeat_callback": 3})
        path = f"/v1/tasks/{task['id']}/timeline"

        async def whole() -> list[JSON] | None:
            steps: list[JSON] = got(await client.get(path))["data"]
            told = {step["step"] for step in steps}
            counts = [step["count"] for step in steps if step["step"] == "callback.received"]
            return steps if "delivery.attempted" in told and counts == [3] else None

        steps = await wait_until(whole)
    names = [step["step"] for step in steps]
    spine = [
        "task.queued",
        "task.submitted",
        "task.confirmed",
        "task.settled",
        "delivery.attempted",
    ]
    assert [name for name in names if name in spine] == spine
    assert set(names) == {*spine, "callback.received", "image.stored", "event.emitted"}
    assert [step["time"] for step in steps] == sorted(step["time"] for step in steps)
    assert all(re.fullmatch(TIME, step["time"]) for step in steps)
    told = {step["step"]: step for step in steps}
    callback = told["callback.received"]
    assert (callback["verdict"], callback["status"], callback["count"]) == (
        "accepted",
        "completed",
        3,
    )
    assert re.fullmatch(an_id("cb"), callback["callback_id"])
    assert callback["last_seen_at"] >= callback["time"]
    assert told["task.submitted"]["upstream_id"] == task["upstream_id"]
    assert told["image.stored"]["image_id"] == task["images"][0]["id"]
    assert told["task.settled"]["state"] == "completed"
    assert told["delivery.attempted"]["status"] == 204
    assert [step["type"] for step in steps if step["step"] == "event.emitted"] == [
        "image.task.submitted",
        "image.task.completed",
    ]


# --- cancelling
# --------------------------------------------------------------------------------------------------


async def test_a_cancelled_task_is_over_here_and_says_so_once(here: World) -> None:
    """The cancel is local. The answer is the task, and there is one terminal event. A second cancel
    is 409 with the task's id.
    """
    async with here.owner() as client:
        task = await submitted(client, headers={}, sandbox=LATE)
        cancelled = got(await client.post(f"/v1/tasks/{task['upstream_id']}/cancel"))
        assert (cancelled["cancel"], cancelled["id"], cancelled["state"], cancelled["status"]) == (
            "local",
            task["id"],
            "cancelled",
            "failed",
        )
        assert cancelled["error"]["code"] == "request_cancelled"
        assert not cancelled["task_info"]["can_cancel"]
        refused(
            await client.post(f"/v1/tasks/{task['id']}/cancel"),
            409,
            "task_ended",
            task_id=task["id"],
        )
        events = got(await client.get("/v1/events", params={"task": task["id"]}))["data"]
        assert [event["type"] for event in events] == [
            "image.task.submitted",
            "image.task.cancelled",
        ]
        assert "cancel" not in events[-1]["data"]


async def test_nothing_that_comes_after_a_local_cancel_is_kept_but_the_charge(here: World) -> None:
    """After the upstream's late success the task stays cancelled and has no images. The service
    records the cost. The test sends the callback, once the task is cancelled.
    """
    task = await submitted(here.client, headers={}, sandbox={"drop_callback": True})
    cancelled = got(await here.client.post(f"/v1/tasks/{task['id']}/cancel"))
    assert cancelled["usage"]["credits_used"] is None
    assert await verdict(here, task, said(task, "completed")) == "accepted"

    async def charged() -> JSON | None:
        now = await here.task(task["id"])
        return now if now["usage"]["credits_used"] is not None else None

    now = await wait_until(charged)
    assert (now["state"], now["images"], now["results"], now["usage"]["credits_used"]) == (
        "cancelled",
        [],
        [],
        2,
    )


async def test_a_task_that_has_ended_cannot_be_cancelled(here: World) -> None:
    """The answer is 409, and the task does not change."""
    task = await submitted(here.client, UNTIL_DONE)
    refused(
        await here.client.post(f"/v1/tasks/{task['id']}/cancel"),
        409,
        "task_ended",
        task_id=task["id"],
    )
    assert await here.task(task["id"]) == task
