"""Scripts and nodes of the upstream's users that submit, poll and save files: a program of our own
makes the requests of each, with its default model.
"""

import asyncio
import io
import json
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any
from urllib.error import HTTPError

import pytest
from PIL import Image

from tests.api import ASYNC, got, submitted
from tests.inputs import uploaded
from tests.world import World

JSON = dict[str, Any]
# Where a skill looks for the result, in this order.
RESULTS = ("result_url", "url", "file_url", "output_url", "text", "result", "results")
SKILL = {
    "X-EvoLink-Source": "skill",
    "X-EvoLink-Skill": "nanobanana-2-lite-image",
    "X-EvoLink-Package": "evolink-nanobanana-2-lite",
    "X-EvoLink-Campaign": "nanobanana-2-lite-image",
    "X-EvoLink-Touchpoint": "first_run",
}
POLLS, POLL_S = 1000, 0.05


@dataclass(frozen=True, slots=True)
class Script:
    """`order`: the fields that it sends beside the prompt. `ends`: the statuses at which it stops.
    `keyed`: it sends its key with downloads too.
    """

    order: JSON
    ends: frozenset[str] = frozenset(("completed", "failed"))
    headers: Mapping[str, str] = field(default_factory=dict)
    keyed: bool = False

    def submit(self, url: str, key: str, **fields: Any) -> str:
        body = {**self.order, "prompt": "a lighthouse", **fields}
        task = json.loads(self.asked("POST", f"{url}/v1/images/generations", key, body))
        assert isinstance(task["task_info"].get("estimated_time", 0), int)
        return str(task["id"])

    async def ended(self, url: str, key: str, task_id: str) -> JSON:
        path = f"{url}/v1/tasks/{urllib.parse.quote(task_id, safe='')}"
        for _ in range(POLLS):
            task: JSON = json.loads(await asyncio.to_thread(self.asked, "GET", path, key))
            if task.get("status", "unknown") in self.ends:
                return task
            await asyncio.sleep(POLL_S)
        raise AssertionError("the script polls to its limit")

    def asked(self, method: str, url: str, key: str | None, body: JSON | None = None) -> bytes:
        headers = {"Accept": "application/json", **self.headers}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            content: bytes = answer.read()
            return content


def result_of(task: JSON) -> str:
    """The first thing that a skill takes for the result."""
    found = next(task[name] for name in RESULTS if task.get(name))
    return str(found[0] if isinstance(found, list) else found)


SCRIPTS = {
    "sunshare/evolink-imagegen": Script(
        {"model": "z-image-turbo", "size": "1:1"},
        ends=frozenset(("completed", "failed", "cancelled", "canceled")),
        headers={"User-Agent": "EvolinkImageGenSkill/1.0"},
    ),
    "the nanobanana skill": Script({"model": "gemini-3.1-flash-lite-image"}, headers=SKILL),
    "the nodes of torans/ComfyUI_EvoLink": Script(
        {"model": "gpt-image-2", "size": "auto", "resolution": "1K", "quality": "medium", "n": 1},
        keyed=True,
    ),
}


@pytest.fixture(params=SCRIPTS)
def script(request: pytest.FixtureRequest) -> Script:
    return SCRIPTS[request.param]


@pytest.fixture
def key(here: World) -> str:
    return str(here.client.headers["authorization"]).removeprefix("Bearer ")


async def run(script: Script, here: World, key: str, **fields: Any) -> JSON:
    task_id = await asyncio.to_thread(script.submit, here.url, key, **fields)
    return await script.ended(here.url, key, task_id)


async def test_a_script_saves_the_image_of_its_default_model(
    here: World, script: Script, key: str
) -> None:
    """It takes the extension of the file from the link."""
    task = await run(script, here, key)
    assert (task["status"], task["model"], len(task["results"])) == (
        "completed",
        script.order["model"],
        1,
    )
    link = result_of(task)
    saved = await asyncio.to_thread(script.asked, "GET", link, key if script.keyed else None)
    assert PurePosixPath(urllib.parse.urlparse(link).path).suffix == ".png"
    with Image.open(io.BytesIO(saved)) as image:
        assert image.format == "PNG"


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ({"cancel": "status"}, "request_cancelled"),
        ({"cancel": "code"}, "request_cancelled"),
        ({"fail": "content_policy_violation"}, "content_policy_violation"),
        ({"fail": "service_error"}, "service_error"),
    ],
)
async def test_a_script_ends_with_the_reason_of_a_failure(
    here: World, script: Script, key: str, fault: JSON, code: str
) -> None:
    task = await submitted(here.client, ASYNC, sandbox=fault)
    ended = await script.ended(here.url, key, task["id"])
    assert (ended["status"], ended["error"]["code"]) == ("failed", code)
    assert ended["error"]["message"]


async def test_a_script_shows_why_its_order_is_refused(
    here: World, script: Script, key: str
) -> None:
    """It prints the code and the message of the error."""
    with pytest.raises(HTTPError) as caught:
        await run(script, here, key, size="5:1x")
    error = json.loads(caught.value.read())["error"]
    assert (caught.value.code, error["code"]) == (400, "invalid_parameter")
    assert "size" in error["message"]


async def test_a_node_sends_several_images_and_a_ratio(here: World, key: str) -> None:
    """Each kind of option that the nodes offer, with an uploaded picture."""
    link = f"{here.url}/v1/files/{(await uploaded(here.client))['id']}/content"
    more = {"size": "9:21", "resolution": "2K", "quality": "high", "n": 2, "image_urls": [link]}
    task = await run(SCRIPTS["the nodes of torans/ComfyUI_EvoLink"], here, key, **more)
    assert len(task["results"]) == 2
    for image in task["images"]:
        assert abs(image["width"] / image["height"] - 9 / 21) < 0.01


async def test_a_key_is_checked_for_free(here: World, key: str) -> None:
    """Installers of skills ask for the credits."""
    left = json.loads(
        await asyncio.to_thread(Script({}).asked, "GET", f"{here.url}/v1/credits", key)
    )
    assert left["data"]["token"]["remaining_credits"] > 0
    with pytest.raises(HTTPError, match="401"):
        await asyncio.to_thread(Script({}).asked, "GET", f"{here.url}/v1/credits", "wrong")
    assert got(await here.client.get("/v1/credits")) == left
