"""Clients from the npm registry, unmodified, in one process: `eventsource` on a stream that is
silent for a while, and `images.generate` of `openai`.
"""

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from service.web.routes import event_routes
from tests.api import UNTIL_DONE, got, submitted
from tests.consumers.programs import MODULES, node
from tests.world import TEXT_TO_IMAGE, World, world

JSON = dict[str, Any]
PROGRAM = Path(__file__).parent / "clients.mjs"
REPORTS_S = 100


@pytest.fixture(scope="module")
async def silent(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """A service whose streams comment more often than events come, and that has one event."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(event_routes, "CHECK_S", 0.01)
        patch.setattr(event_routes, "COMMENT_S", 0.01)
        async with world(tmp_path_factory.mktemp("silent")) as here:
            await submitted(here.client, UNTIL_DONE)
            yield here


@pytest.fixture(scope="module")
async def reports(silent: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Everything that the clients reported, by kind."""
    folder = tmp_path_factory.mktemp("clients")
    (folder / "node_modules").symlink_to(MODULES)
    shutil.copy(PROGRAM, folder)
    environment = {
        "PATH": os.environ["PATH"],
        "SERVICE": silent.url,
        "KEY": silent.client.headers["authorization"].removeprefix("Bearer "),
        "AFTER": (await silent.events())[-1]["sequence"],
        "MODEL": TEXT_TO_IMAGE,
    }
    run = partial(subprocess.run, cwd=folder, env=environment, capture_output=True, text=True)
    done = await asyncio.to_thread(run, [node(), PROGRAM.name], timeout=REPORTS_S)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, list[Any]] = {}
    for line in done.stdout.splitlines():
        kind, value = json.loads(line)
        found.setdefault(kind, []).append(value)
    return found


async def test_eventsource_sees_events_alone(silent: World, reports: JSON) -> None:
    """A comment is no event, the id of the last event stays, and the connection holds."""
    events = (await silent.events())[2:]
    assert reports["event"] == [[each["sequence"], each["type"], each] for each in events]
    assert reports.keys() == {"event", "images", "refusal"}


async def test_openai_gets_the_links_of_the_images(silent: World, reports: JSON) -> None:
    """`r.data[0].url` is the link of the first stored image, and so on."""
    assert [len(links) for _, _, links in reports["images"]] == [1, 2]
    for id, created, links in reports["images"]:
        task = got(await silent.client.get(f"/v1/tasks/{id}"))
        assert (task["results"], task["created"]) == (links, created)
        for link in links:
            assert (await silent.stranger.get(link)).headers["content-type"] == "image/png"


async def test_openai_raises_for_a_refusal(reports: JSON) -> None:
    assert reports["refusal"] == [[True, 400, "size", "invalid_request_error"]]
