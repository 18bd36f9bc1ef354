"""The upstream's own tool server, `@evolinkai/evolink-media`, with the service for the upstream.
The package is as its registry has it, except for its two base URLs.
"""

import asyncio
import base64
import hashlib
import os
import re
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.upstreams.catalogue import load_catalogue
from tests.api import ASYNC, got, submitted
from tests.consumers.programs import MODULES, node
from tests.consumers.tool_server import ToolFailed, ToolServer, tool_server
from tests.inputs import of_length, photo
from tests.waiting import wait_until
from tests.world import World, world

JSON = dict[str, Any]
PACKAGE = "@evolinkai/evolink-media"
ADDRESSES = ("https://api.evolink.ai", "https://files-api.evolink.ai")
ENTRY = "dist/evolink-media/src/index.js"


@dataclass(frozen=True, slots=True)
class Tools:
    """The tool server of one owner. `client` has the same key."""

    here: World
    server: ToolServer
    client: httpx.AsyncClient
    folder: Path

    async def call(self, tool: str, **arguments: Any) -> str:
        text = await self.server.call(tool, **arguments)
        assert not re.search("undefined|null|NaN", text), text
        return text

    async def refused(self, tool: str, **arguments: Any) -> str:
        with pytest.raises(ToolFailed) as caught:
            await self.server.call(tool, **arguments)
        return str(caught.value)

    async def uploaded(self, **source: Any) -> dict[str, str]:
        return fields_of(await self.call("upload_file", **source))

    async def ended(self, task_id: str) -> str:
        """What `check_task` says once the task has ended."""

        async def look() -> str | None:
            text = await self.call("check_task", task_id=task_id)
            return None if fields_of(text)["Status"] in ("pending", "processing") else text

        text: str = await wait_until(look, 90)
        return text


def fields_of(text: str) -> dict[str, str]:
    """The lines of the form `Name: value`."""
    return dict(re.findall(r"^([A-Z][A-Za-z ]*): (.*)$", text, re.MULTILINE))


def with_base_url(folder: Path, url: str) -> Path:
    """The entry of a copy of the package in which each of the upstream's addresses is `url`."""
    copy = folder / "evolink-media"
    shutil.copytree(MODULES / PACKAGE, copy)
    (folder / "node_modules").symlink_to(MODULES)
    replaced = 0
    for path in (copy / "dist").rglob("*.js"):
        text = path.read_text("utf-8")
        for address in ADDRESSES:
            replaced += text.count(f"'{address}'")
            text = text.replace(f"'{address}'", f"'{url}'")
        path.write_text(text, "utf-8")
    assert replaced == len(ADDRESSES)
    return copy / ENTRY


def served(entry: Path, key: str) -> AbstractAsyncContextManager[ToolServer]:
    environment = {"PATH": os.environ["PATH"], "EVOLINK_API_KEY": key}
    return tool_server([node(), str(entry)], entry.parent, environment)


@pytest.fixture(scope="module")
async def tools(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Tools]:
    node()
    folder = tmp_path_factory.mktemp("tools")
    async with world(folder) as here, here.owner(name="agent") as client:
        entry = with_base_url(folder, here.url)
        key = client.headers["authorization"].removeprefix("Bearer ")
        async with served(entry, key) as server:
            yield Tools(here, server, client, folder)


async def models(tools: Tools) -> Sequence[str]:
    """The models that the tool accepts. Its list leaves out those of its other channel."""
    (described,) = (
        tool
        for tool in (await tools.server.request("tools/list", {}))["tools"]
        if tool["name"] == "generate_image"
    )
    accepted: list[str] = described["inputSchema"]["properties"]["model"]["enum"]
    text = await tools.call("list_models", category="image")
    listed = re.findall(r"^\*\*(.+)\*\* \[image\]$", text, re.MULTILINE)
    assert set(accepted) >= set(listed) != set()
    return accepted


# --- images


async def test_every_image_model_of_its_list_makes_an_image(tools: Tools) -> None:
    """The sandbox knows the models and refuses what the catalogue refuses: a model that edits gets
    an uploaded picture. `check_task` shows a link from which anybody gets the image.
    """
    link = (await tools.uploaded(base64_data=base64.b64encode(photo()).decode()))["File URL"]
    names = await models(tools)
    assert len(names) >= 20
    edits = {name for name in names if needs_image(name)}

    async def made(name: str) -> None:
        more = {"image_urls": [link]} if name in edits else {}
        answer = await tools.call("generate_image", model=name, prompt="a lighthouse", **more)
        text = await tools.ended(fields_of(answer)["Task ID"])
        fields = fields_of(text)
        assert (fields["Model"], fields["Status"], fields["Progress"]) == (
            name,
            "completed",
            "100%",
        )
        (result,) = re.findall(r"^ *\[1\] (\S+)$", text, re.MULTILINE)
        image = await tools.here.stranger.get(result)
        assert (image.status_code, image.headers["content-type"]) == (200, "image/png")

    await asyncio.gather(*map(made, names))


def needs_image(model: str) -> bool:
    entry = load_catalogue().entry(model)
    return entry is not None and bool(getattr(entry.fields.get("image_urls"), "min", 0))


async def test_a_size_and_a_number_of_images_are_passed_on(tools: Tools) -> None:
    """Ratios for most models, pixels for the models of OpenAI, as the tool describes them."""
    for model, size, n in (
        ("z-image-turbo", "16:9", 1),
        ("gpt-image-1.5", "1024x1536", 2),
        ("wan2.5-text-to-image", "1280x720", 4),
    ):
        order = {"model": model, "prompt": "a lighthouse", "size": size, "n": n}
        task_id = fields_of(await tools.call("generate_image", **order))["Task ID"]
        text = await tools.ended(task_id)
        assert len(re.findall(r"^ *\[\d\] http", text, re.MULTILINE)) == n
        task = got(await tools.client.get(f"/v1/tasks/{task_id}"))
        assert (task["request"]["size"], task["request"]["n"]) == (size, n)


# --- files


async def test_files_are_uploaded_listed_counted_and_deleted(tools: Tools) -> None:
    """By path, in base64 and as a data URL. The list shows the quota as well."""
    path = tools.folder / "Straße 7.jpeg"
    path.write_bytes(photo("JPEG"))
    text = base64.b64encode(photo()).decode()
    before = used(await tools.call("list_files"))
    files = [
        await tools.uploaded(file_path=str(path)),
        await tools.uploaded(file_path=str(path), upload_path="in", file_name="street.jpeg"),
        await tools.uploaded(base64_data=text, file_name="night.png"),
        await tools.uploaded(base64_data=f"data:image/png;base64,{text}"),
    ]
    assert [file["File Name"] for file in files[:3]] == [path.name, "street.jpeg", "night.png"]
    assert [file["Type"] for file in files] == ["image/jpeg"] * 2 + ["image/png"] * 2
    for file, content in zip(files, [photo("JPEG")] * 2 + [photo()] * 2, strict=True):
        assert (await tools.client.get(file["File URL"])).content == content
    text = await tools.call("list_files", page=1, page_size=4)
    assert re.findall(r"\[(file_\w+)\]", text) == [file["File ID"] for file in files[::-1]]
    assert used(text) == before + 4
    assert f"total: {before + 4})" in text
    for file in files:
        assert "deleted" in await tools.call("delete_file", file_id=file["File ID"])
    assert used(await tools.call("list_files")) == before


def used(text: str) -> int:
    """The used files of the quota. The rest of it is left."""
    found = re.search(r"Quota: (\d+)/(\d+) files used, (\d+) remaining \[\w+\]", text)
    assert found, text
    used, most, left = map(int, found.groups())
    assert used + left == most
    return used


async def test_uploaded_pictures_are_edited_in_their_order(tools: Tools) -> None:
    """A result is edited further without leaving the service."""
    files = [await tools.uploaded(base64_data=base64.b64encode(photo(format)).decode())
             for format in ("PNG", "JPEG")]  # fmt: skip
    links = [file["File URL"] for file in files]
    for _ in range(2):
        order = {"model": "wan2.5-image-to-image", "prompt": "at night", "image_urls": links}
        task_id = fields_of(await tools.call("generate_image", **order))["Task ID"]
        text = await tools.ended(task_id)
        task = got(await tools.client.get(f"/v1/tasks/{task_id}"))
        assert [each["sha256"] for each in task["inputs"]] == [
            await sha256(tools, link) for link in links
        ]
        links = [*re.findall(r"^ *\[1\] (\S+)$", text, re.MULTILINE), links[0]]


async def sha256(tools: Tools, link: str) -> str:
    return hashlib.sha256((await tools.client.get(link)).content).hexdigest()


# --- refusals and failures


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ({"model": "z-image-turbo", "size": "5:1"}, ("[400]", "size", "16:9", "5:1")),
        ({"model": "gpt-image-1.5-lite", "n": 2}, ("[400]", "n must be", "1 to 1", "2")),
        ({"model": "qwen-image-edit"}, ("[400]", "image_urls")),
        ({"model": "z-image-turbo", "prompt": ""}, ("[400]", "prompt")),
        ({"model": "qwen-image-edit", "image_urls": ["ftp://a/b.png"]}, ("[400]", "image_urls[0]")),
        ({"model": "z-image-turbo", "prompt": "x" * 2001}, ("2000",)),
        ({"model": "unheard-of"}, ("z-image-turbo",)),
    ],
)
async def test_the_tool_shows_why_an_order_is_refused(
    tools: Tools, order: JSON, words: Sequence[str]
) -> None:
    message = await tools.refused("generate_image", **{"prompt": "a", **order})
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no picture", ("40002", "no picture")),
        (photo("PNG", (383, 400)), ("40002", "383x400")),
        (photo("PNG", mode="RGBA"), ("40002", "alpha")),
        (photo("GIF", mode="P"), ("40002", "GIF")),
        (of_length((10 << 20) + 1), ("40001", str((10 << 20) + 1))),
    ],
)
async def test_the_tool_shows_why_a_file_is_refused(
    tools: Tools, content: bytes, words: Sequence[str]
) -> None:
    path = tools.folder / "refused.png"
    path.write_bytes(content)
    message = await tools.refused("upload_file", file_path=str(path))
    assert [word for word in ("File API error", *words) if word not in message] == [], message


async def test_a_file_or_task_that_does_not_exist_is_told(tools: Tools) -> None:
    assert "404" in await tools.refused("delete_file", file_id="file_" + "a" * 26)
    assert "[404]" in await tools.refused("check_task", task_id="task_" + "a" * 26)
    link = f"{tools.here.url}/v1/files/file_{'a' * 26}/content"
    order = {"model": "qwen-image-edit", "prompt": "a", "image_urls": [link]}
    assert "image_urls" in await tools.refused("generate_image", **order)


@pytest.mark.parametrize(
    ("fault", "code", "retryable"),
    [
        ({"fail": "content_policy_violation"}, "content_policy_violation", "No"),
        ({"fail": "generation_timeout"}, "generation_timeout", "Yes"),
        ({"cancel": "status"}, "request_cancelled", "No"),
    ],
)
async def test_the_tool_explains_why_a_task_failed(
    tools: Tools, fault: JSON, code: str, retryable: str
) -> None:
    """`check_task` ends for a cancelled task too, with the advice for its code."""
    task = await submitted(tools.client, ASYNC, sandbox=fault)
    fields = fields_of(await tools.ended(task["id"]))
    assert (fields["Status"], fields["Error code"]) == ("failed", code)
    assert fields["Retryable"].startswith(retryable)


async def test_the_tool_shows_that_a_budget_is_exhausted(tools: Tools) -> None:
    budget = {"period": "total", "credits": 0.000001}
    got(await tools.here.client.put("/v1/budgets/agent", json=budget))
    message = await tools.refused("generate_image", model="z-image-turbo", prompt="a")
    assert "[402]" in message
    assert "budget" in message
    got(await tools.here.client.put("/v1/budgets/agent", json={**budget, "credits": None}))
    await tools.call("generate_image", model="z-image-turbo", prompt="a")


async def test_a_wrong_key_is_told_by_every_tool(tools: Tools) -> None:
    entry = tools.folder / "evolink-media" / ENTRY
    async with served(entry, "wrong") as server:
        for tool, arguments in (
            ("generate_image", {"prompt": "a"}),
            ("check_task", {"task_id": "task_" + "a" * 26}),
            ("upload_file", {"base64_data": base64.b64encode(photo()).decode()}),
            ("list_files", {}),
        ):
            with pytest.raises(ToolFailed, match="401"):
                await server.call(tool, **arguments)
