"""The sweep removes blobs that no row names, in the local folder and on S3."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from service import jobs
from service.app import Role
from service.images import sweep
from service.images.sweep import AGE_MS
from tests.api import UNTIL_DONE, submitted
from tests.blobs import put
from tests.waiting import wait_until
from tests.world import World, world

pytestmark = pytest.mark.slow

ORPHAN = "0-" + "0f" * 32 + ".png"


@pytest.fixture(params=["local", "s3"])
async def here(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    """A world that keeps its images in the local folder or on S3."""
    place = (
        None if request.param == "local" else f"s3://{request.getfixturevalue('s3_bucket')}/images"
    )
    async with world(tmp_path, blob_url=place) as made:
        yield made


async def kept(here: World) -> set[str]:
    return {blob.name async for page in here.context.resources.blobs.listed() for blob in page}


async def swept(here: World, ms: int) -> int:
    """The number of blobs that a sweep removes, with a clock that is `ms` ahead."""
    resources = here.context.resources
    return await sweep.sweep(replace(resources, clock=lambda: resources.clock() + ms))


async def test_what_no_row_names_goes_after_a_day(here: World) -> None:
    """The sweep removes an orphan after a day, not earlier. Images are still served. Files with a
    foreign name or of an unknown task stay.
    """
    task = await submitted(here.client, UNTIL_DONE, n=2)
    images = await kept(here)
    others = {f"task_{'a' * 26}/{ORPHAN}", f"{task['id']}/notes.txt", "elsewhere/0.png"}
    for name in {f"{task['id']}/{ORPHAN}", *others}:
        await put(here.context.resources.blobs, name, b"x")
    everything = await kept(here)
    assert (len(images), len(everything)) == (2, 6)
    assert await swept(here, AGE_MS - 60_000) == 0
    assert await kept(here) == everything
    with capture_logs() as lines:
        assert await swept(here, AGE_MS + 60_000) == 1
    assert await kept(here) == images | others
    for image in task["images"]:
        assert (await here.stranger.get(image["url"])).status_code == 200
    (line,) = [line for line in lines if line["event"] == "blobs.swept"]
    assert (line["seen"], line["removed"]) == (6, 1)
    assert await swept(here, AGE_MS + 60_000) == 0


async def test_two_at_once_do_no_harm(here: World) -> None:
    """Three concurrent sweeps remove the same orphans and no image."""
    task = await submitted(here.client, UNTIL_DONE)
    orphans = {f"{task['id']}/{number}-{'0f' * 32}.png" for number in range(1, 9)}
    images = await kept(here)
    for name in orphans:
        await put(here.context.resources.blobs, name, b"x")
    counts = await asyncio.gather(*(swept(here, AGE_MS + 60_000) for _ in range(3)))
    assert sum(counts) >= len(orphans)
    assert await kept(here) == images


async def test_what_is_named_in_the_last_moment_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A late result commits between the look at a page and the removal. The sweep checks the page
    again and keeps the blob.
    """
    async with world(tmp_path) as here:
        task = await submitted(here.client, UNTIL_DONE)
        name = f"{task['id']}/{ORPHAN}"
        await put(here.context.resources.blobs, name, b"x")
        orphans, looks = sweep.orphans, iter([True])
        monkeypatch.setattr(
            sweep,
            "orphans",
            lambda connection, blobs: orphans(connection, blobs) if next(looks, False) else [],
        )
        assert await swept(here, AGE_MS + 60_000) == 0
        assert name in await kept(here)


async def test_processes_with_workers_sweep_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process sweeps repeatedly, logs a failure and goes on."""
    monkeypatch.setattr(jobs, "EVERY_S", 0.05)
    monkeypatch.setattr(sweep, "AGE_MS", -60_000)
    with capture_logs() as lines:
        async with world(tmp_path) as here:
            task = await submitted(here.client, UNTIL_DONE)
            root, aside = here.settings.image_dir, tmp_path / "aside"
            root.rename(aside)
            root.write_bytes(b"")  # a file in place of the folder
            (failure,) = await wait_until(
                lambda: [
                    line
                    for line in lines
                    if line["event"] == "worker.failed" and "Not a directory" in line["exception"]
                ][:1]
            )
            assert (failure["stage"], failure["key"], failure["exception"]) == (
                "sweep",
                None,
                "BlobUnavailable: Not a directory",
            )
            root.unlink()
            aside.rename(root)
            images = await kept(here)
            await put(here.context.resources.blobs, f"{task['id']}/{ORPHAN}", b"x")

            async def alone() -> bool:
                return await kept(here) == images

            await wait_until(alone)
            await wait_until(lambda: any(line.get("removed") == 1 for line in lines))


async def test_a_process_without_workers_sweeps_nothing(tmp_path: Path) -> None:
    before = asyncio.all_tasks()
    async with world(tmp_path, role=Role(workers=False)):
        assert "sweep" not in {task.get_name() for task in asyncio.all_tasks() - before}
