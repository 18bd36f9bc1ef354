"""Saving results over real sockets: which bytes are saved, when an image counts, and that a failing
store loses nothing.
"""

import asyncio
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from service.blobs.blob_store import CHUNK
from service.db.transaction import Lease
from service.images.download_worker import DownloadWorker
from service.images.validator import ImageValidator
from tests.downloads import bytes_of, called, downloading, link, made, noise, saved, served, steps
from tests.integration.test_result_hosts import ok, raw_host
from tests.upstream import After, Upstream, document, failed, picture
from tests.waiting import wait_until
from tests.world import World

WORLD = downloading


@pytest.mark.parametrize(
    ("format", "media_type"),
    [("PNG", "image/png"), ("JPEG", "image/jpeg"), ("WEBP", "image/webp"), ("GIF", "image/gif")],
)
async def test_a_result_is_kept_byte_for_byte(
    format: str, media_type: str, here: World, upstream: Upstream
) -> None:
    """Type and size come from the content, whatever the name and header say. Images are served with
    their hash, in the upstream's order.
    """
    bodies = [picture(format, (64, 48), shade) for shade in (10, 200)]
    names = [f"{format}-{number}.bin" for number in range(2)]
    upstream.files |= {
        name: [served(body, "text/plain")] for name, body in zip(names, bodies, strict=True)
    }
    task = await here.ended(
        (await made(here, upstream, *(link(here, name) for name in names)))["id"]
    )
    assert task["state"] == "completed"
    assert task["results"] == [image["url"] for image in task["images"]]
    for index, (image, body) in enumerate(zip(task["images"], bodies, strict=True)):
        figures = {
            "index": index,
            "media_type": media_type,
            "bytes": len(body),
            "sha256": hashlib.sha256(body).hexdigest(),
        }
        assert image | figures | {"width": 64, "height": 48} == image
        assert await bytes_of(here, image) == body


async def test_a_large_result_is_kept_whole(here: World, upstream: Upstream) -> None:
    """A file that is written in several pieces has the same bytes."""
    body = noise(size=(400, 240))
    assert len(body) > CHUNK
    assert await bytes_of(here, await saved(here, upstream, "large.png", served(body))) == body


@pytest.mark.parametrize("how", ["baseline", "progressive", "restart markers"])
async def test_a_jpeg_without_its_end_marker_is_kept_byte_for_byte(
    how: str, here: World, upstream: Upstream
) -> None:
    """Some upstreams drop the last two bytes. The picture decodes whole, so it counts at once."""
    more = {"baseline": {}, "progressive": {"progressive": True}}
    body = noise("JPEG", **more.get(how, {"restart_marker_blocks": 4}))[:-2]
    async with raw_host(ok(body)) as port:
        url = f"http://127.0.0.1:{port}/a.jpg"
        task = await here.ended((await made(here, upstream, url))["id"])
    assert (task["state"], task["images"][0]["media_type"]) == ("completed", "image/jpeg")
    assert await bytes_of(here, task["images"][0]) == body
    assert [step for step, _ in await steps(here, task)] == ["image.stored"]


def no_incoming(images: Path, _: str) -> Path:
    return images / ".incoming"


def no_folder(images: Path, task_id: str) -> Path:
    return images / task_id


@pytest.mark.parametrize(
    "place", [no_incoming, no_folder], ids=["where it is written", "where it is kept"]
)
async def test_a_blob_store_that_fails_is_tried_again(
    place: Callable[[Path, str], Path], here: World, upstream: Upstream
) -> None:
    """A blob store's failure is not the link's fault. The result is fetched again and saved once
    the store works.
    """
    upstream.files["patient.png"] = [served(picture())]
    task = await here.submit()
    folder = place(here.settings.image_dir, task["id"])
    away = folder.with_name(".away")
    if folder.exists():
        folder.rename(away)
    folder.write_bytes(b"a file where a folder should be")
    result = link(here, "patient.png")
    upstream.queries[task["upstream_id"]] = [document("completed", result)]
    await called(here, task, "completed", result)

    async def retried() -> list[Any]:
        return [reason for step, reason in await steps(here, task) if step == "image.retry"]

    reasons = await wait_until(retried)
    assert reasons[0].startswith("BlobUnavailable: ")
    folder.unlink()
    if away.exists():
        away.rename(folder)
    assert (await here.ended(task["id"]))["state"] == "completed"
    faults = here.context.resources.metrics.registry.get_sample_value(
        "darkroom_worker_faults_total", {"stage": "download"}
    )
    assert not faults  # the error was expected


async def test_what_a_callback_names_is_fetched_at_once_and_counts_later(
    here: World, upstream: Upstream
) -> None:
    """The image is saved while the confirmation runs. The task shows it only once the upstream
    agrees.
    """
    agreed = asyncio.Event()
    upstream.files["early.png"] = [served(picture())]
    task = await here.submit()
    upstream.queries[task["upstream_id"]] = [
        After(agreed.wait, document("completed", link(here, "early.png")))
    ]
    await called(here, task, "completed", link(here, "early.png"))

    async def saved() -> bool:
        return ("image.stored", None) in await steps(here, task)

    await wait_until(saved)
    before = await here.task(task["id"])
    assert (before["state"], before["results"], before["images"]) == ("submitted", [], [])
    agreed.set()
    ended = await here.ended(task["id"])
    assert (ended["state"], len(ended["images"])) == ("completed", 1)
    assert upstream.asked["early.png"] == 1


async def test_what_only_a_callback_named_is_not_shown(here: World, upstream: Upstream) -> None:
    """An image that was fetched for a callback does not count when the upstream says that the task
    failed.
    """
    agreed = asyncio.Event()
    upstream.files["false.png"] = [served(picture())]
    task = await here.submit()
    upstream.queries[task["upstream_id"]] = [After(agreed.wait, failed("service_error"))]
    await called(here, task, "completed", link(here, "false.png"))

    async def saved() -> bool:
        return ("image.stored", None) in await steps(here, task)

    await wait_until(saved)
    agreed.set()
    ended = await here.ended(task["id"])
    assert (ended["state"], ended["images"]) == ("failed", [])


async def test_the_queries_link_wins_over_the_callbacks(here: World, upstream: Upstream) -> None:
    """A download is discarded when its address was replaced meanwhile. The confirmed address is
    fetched.
    """
    gate = asyncio.Event()
    upstream.files |= {
        "callback.png": [After(gate.wait, served(picture(shade=1)))],
        "query.png": [served(picture(shade=2))],
    }
    task = await here.submit()

    async def asked() -> None:  # or the link could be replaced before its download begins
        await wait_until(lambda: upstream.asked["callback.png"])

    answer = document("completed", link(here, "query.png"))
    upstream.queries[task["upstream_id"]] = [After(asked, answer)]
    await called(here, task, "completed", link(here, "callback.png"))

    async def confirmed() -> bool:
        shown = await here.task(task["id"])
        return bool(shown["state"] == "storing" and upstream.asked["callback.png"])

    await wait_until(confirmed)
    gate.set()
    ended = await here.ended(task["id"])
    assert ended["state"] == "completed"
    assert await bytes_of(here, ended["images"][0]) == picture(shade=2)
    metric = "darkroom_downloads_total"
    assert (
        here.context.resources.metrics.registry.get_sample_value(metric, {"outcome": "superseded"})
        == 1
    )


async def test_an_image_that_is_not_wanted_any_more_is_no_work(here: World) -> None:
    """A lease from before the row changed is released, and no request is sent for it."""
    downloader = DownloadWorker(here.context.resources, ImageValidator(1, 1, 1), (1.0,), 1, 0)
    with capture_logs() as lines:
        await downloader.run(Lease("download", "img_nobody", 1, 1))
    assert [line for line in lines if line.get("kind") != "credits"] == []
