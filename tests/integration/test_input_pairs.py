"""Each kind of input image on each surface: the API, the command line and the sandbox."""

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from typer.testing import CliRunner

from service.cli import program
from service.upstreams.sandbox import SandboxOptions
from tests.api import SUBMIT, UNTIL_DONE, got, refused
from tests.inputs import photo, uploaded
from tests.world import ADMIN_KEY, LOOPBACK, World, world

JSON = dict[str, Any]
EDIT = "wan2.5-image-to-image"
PUBLIC = "https://example.com/public.png"
WIDE, TALL = photo("JPEG", (1200, 400)), photo("PNG", (400, 1200))
KINDS = ("link", "file", "image", "result link", "content link", "data URL")


@dataclass(frozen=True)
class Stock:
    """A world with a file and a result: an entry of each kind, and the bytes that it names."""

    world: World
    entries: dict[str, str]
    contents: dict[str, bytes]


@pytest.fixture(scope="module")
async def stock(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stock]:
    options = SandboxOptions(networks=(ip_network(LOOPBACK),), delay_s=0.02, fetch_inputs=False)
    async with world(tmp_path_factory.mktemp("pairs"), sandbox=options) as here:
        file = await uploaded(here.client, WIDE)
        body = {"model": EDIT, "prompt": "first", "image_urls": [file["id"]]}
        image = got(await here.client.post(SUBMIT, json=body, headers=UNTIL_DONE))["images"][0]
        result = (await here.client.get(image["url"])).content
        entries = {
            "link": PUBLIC,
            "file": file["id"],
            "image": image["id"],
            "result link": image["url"],
            "content link": f"{here.url}/v1/files/{file['id']}/content",
            "data URL": f"data:image/png;base64,{base64.b64encode(TALL).decode()}",
        }
        contents = {"file": WIDE, "content link": WIDE, "data URL": TALL}
        contents |= {"image": result, "result link": result}
        yield Stock(here, entries, contents)


async def sent(here: World, upstream_id: str) -> list[str]:
    """The links that the upstream got."""
    tasks = (await here.sandbox.get("/sandbox/tasks")).json()["data"]
    (urls,) = (each["image_urls"] for each in tasks if each["id"] == upstream_id)
    return list(urls)


async def run(here: World, *arguments: str) -> JSON:
    """The document that a command prints."""
    settings = {"DARKROOM_URL": here.url, "DARKROOM_API_KEY": ADMIN_KEY}
    done = await asyncio.to_thread(
        CliRunner().invoke, program, [*arguments, "--json"], env=settings
    )
    assert done.exit_code == 0, done.output
    lines = (line for line in done.stdout.splitlines() if '"service":' not in line)  # no log
    document: JSON = json.loads(list(lines)[-1])
    return document


async def by_api(here: World, *entries: str, **fields: Any) -> JSON:
    body = {"model": EDIT, "prompt": "x", "image_urls": list(entries)} | fields
    return got(await here.client.post(SUBMIT, json=body, headers=UNTIL_DONE))


async def by_command(here: World, *entries: str) -> JSON:
    images = [word for entry in entries for word in ("--image", entry)]
    return await run(here, "submit", "x", *images, "--wait")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("submit", [by_api, by_command], ids=["API", "command line"])
async def test_an_entry_of_each_kind_is_an_input_on_each_surface(
    stock: Stock, kind: str, submit: Any
) -> None:
    """The upstream gets a link that leads to the bytes of the entry. A public link stays as it
    is.
    """
    task = await submit(stock.world, stock.entries[kind])
    assert task["state"] == "completed", task
    (link,) = await sent(stock.world, task["upstream_id"])
    if kind == "link":
        assert link == PUBLIC
    else:
        answer = await stock.world.stranger.get(link)
        assert answer.content == stock.contents[kind]
        with Image.open(io.BytesIO(answer.content)) as image:
            (shown,) = task["inputs"]
            assert (shown["width"], shown["height"]) == image.size


@pytest.mark.parametrize("submit", [by_api, by_command], ids=["API", "command line"])
async def test_all_kinds_together_keep_their_order(stock: Stock, submit: Any) -> None:
    """Five at a time, in two orders."""
    for kinds in (KINDS[:5], KINDS[:0:-1]):
        task = await submit(stock.world, *(stock.entries[kind] for kind in kinds))
        links = await sent(stock.world, task["upstream_id"])
        for kind, link in zip(kinds, links, strict=True):
            if kind == "link":
                assert link == PUBLIC
            else:
                assert (await stock.world.stranger.get(link)).content == stock.contents[kind]


async def test_a_path_is_an_input_on_the_command_line(stock: Stock, tmp_path: Path) -> None:
    """By the limits of the model: one takes a picture with alpha, and the default does not."""
    path = tmp_path / "clear.png"
    path.write_bytes(photo("PNG", mode="RGBA"))
    arguments = ("submit", "x", "--image", str(path), "--model", "gpt-image-2", "--wait")
    task = await run(stock.world, *arguments)
    (link,) = await sent(stock.world, task["upstream_id"])
    assert (await stock.world.stranger.get(link)).content == path.read_bytes()
    with pytest.raises(AssertionError, match="alpha"):
        await run(stock.world, "submit", "x", "--image", str(path))
    file = await run(stock.world, "files", "upload", str(path), "--model", "gpt-image-2")
    assert file["media_type"] == "image/png"


@pytest.mark.parametrize("submit", [by_api, by_command], ids=["API", "command line"])
async def test_results_are_fed_back_from_task_to_task(stock: Stock, submit: Any) -> None:
    """Each task's result is the next one's input, without leaving the service."""
    entry = stock.entries["file"]
    for _ in range(3):
        task = await submit(stock.world, entry)
        assert task["inputs"][0]["id"] == entry
        entry = task["images"][0]["id"]


@pytest.mark.parametrize("last", [WIDE, TALL], ids=["wide", "tall"])
@pytest.mark.parametrize("submit", [by_api, by_command], ids=["API", "command line"])
async def test_the_aspect_follows_the_last_of_several_images(
    stock: Stock, last: bytes, submit: Any
) -> None:
    """As the upstream documents it, if the submission has no size."""
    files = [await uploaded(stock.world.client, each) for each in (WIDE, TALL)]
    ids = [file["id"] for file in (files if last is TALL else files[::-1])]
    (image,) = (await submit(stock.world, *ids))["images"]
    assert image["width"] / image["height"] == pytest.approx(1 / 3 if last is TALL else 3, rel=0.01)


# --- the sandbox, as the upstream itself


async def at_upstream(here: World, *entries: str) -> httpx.Response:
    body = {"model": EDIT, "prompt": "x", "image_urls": list(entries)}
    return await here.sandbox.post(SUBMIT, json=body)


async def test_the_sandbox_takes_links_in_their_order(stock: Stock) -> None:
    """Public links, and those of its own file API."""
    form = {"file": ("own.png", TALL)}
    answer = await stock.world.sandbox.post("/api/v1/files/upload/stream", files=form)
    links = [PUBLIC, answer.json()["data"]["file_url"], "https://example.com/other.png"]
    for entries in (links, links[::-1]):
        task = (await at_upstream(stock.world, *entries)).json()
        assert await sent(stock.world, task["id"]) == entries


@pytest.mark.parametrize("kind", ["file", "image", "data URL"])
async def test_the_sandbox_refuses_what_the_upstream_would(stock: Stock, kind: str) -> None:
    """It takes links alone."""
    answer = await at_upstream(stock.world, PUBLIC, stock.entries[kind])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "image_urls")


async def test_a_kind_that_does_not_exist_is_refused_on_each_surface(stock: Stock) -> None:
    refused(
        await stock.world.client.post(
            SUBMIT, json={"model": EDIT, "prompt": "x", "image_urls": ["nothing.png"]}
        ),
        400,
        param="image_urls",
    )
    with pytest.raises(AssertionError, match=r"nothing\.png"):
        await by_command(stock.world, "nothing.png")
    assert (await at_upstream(stock.world, "nothing.png")).status_code == 400
