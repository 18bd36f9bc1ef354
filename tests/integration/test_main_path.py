"""The main path, end to end over real sockets."""

import hashlib
from pathlib import Path

import pytest

from tests.world import subscriber, world

pytestmark = pytest.mark.slow


async def test_a_task_becomes_stored_images_and_one_signed_terminal_event(tmp_path: Path) -> None:
    """The service submits, takes the callback, settles, stores and emits. The event's images are
    the images that the upstream served.
    """
    async with world(tmp_path) as here, subscriber() as takes:
        made = await here.client.post("/v1/endpoints", json={"url": takes.url})
        assert made.status_code == 201
        task = await here.submit(
            n=2, prompt="一只猫", metadata={"order": "7"}, headers={"prefer": "wait=20"}
        )
        assert task["state"] == "completed"
        assert len(task["results"]) == 2
        assert task["metadata"] == {"order": "7"}
        upstream = (await here.sandbox.get(f"/v1/tasks/{task['upstream_id']}")).json()
        for ours, theirs in zip(task["images"], upstream["results"], strict=True):
            served = (await here.stranger.get(ours["url"])).content
            assert served == (await here.sandbox.get(theirs)).content
            assert hashlib.sha256(served).hexdigest() == ours["sha256"]
        types = [event["type"] for event in await here.events()]
        assert types == ["image.task.submitted", "image.task.completed"]
