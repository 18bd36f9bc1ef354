"""Results whose bytes are no image: the last body is kept for the operator until retention. The
result host answers in raw bytes.
"""

import asyncio
import gzip
import hashlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from service.cli.backup import write_backup
from service.db.tables import images
from service.images import downloads
from service.images.sweep import AGE_MS, sweep
from service.tasks.rows import image_rows, select_images
from service.upkeep.retention import DAY_MS, Retention
from tests.downloads import Part, called, downloading, link, made, saved, served, steps
from tests.integration.test_result_hosts import ok, raw_host
from tests.upstream import Upstream, document, page, picture
from tests.waiting import wait_until
from tests.world import JSON, World

DAYS = 30


@pytest.fixture(scope="module")
async def here(
    upstream: Upstream, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[World]:
    """A world in which the same wrong bytes are final after 0.2 s."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(downloads, "WRONG_MS", 200)
        async with downloading(tmp_path_factory.mktemp("quarantine"), upstream) as made:
            yield made


async def blobs(here: World, task: JSON) -> dict[str, bytes]:
    """Every blob of the task with its bytes."""
    store = here.context.resources.blobs
    return {
        name: b"".join([chunk async for chunk in store.read(name)])
        for name in await names_of(here, task)
    }


async def names_of(here: World, task: JSON) -> list[str]:
    listed = here.context.resources.blobs.listed()
    return [blob.name async for page in listed for blob in page if task["id"] in blob.name]


async def only_blob(here: World, task: JSON) -> bytes:
    """A body is deleted after the outcome that replaces it is recorded."""

    async def alone() -> bool:
        return len(await names_of(here, task)) == 1

    await wait_until(alone)
    (content,) = (await blobs(here, task)).values()
    return content


async def lost_beside_a_picture(here: World, upstream: Upstream, url: str) -> JSON:
    """A task that failed. Its first result is a picture, its second is lost."""
    upstream.files["good.png"] = [served(picture())]
    task = await here.ended((await made(here, upstream, link(here, "good.png"), url))["id"])
    assert (task["state"], task["error"]["code"]) == ("failed", "results_lost")
    return task


UNKNOWN = {
    "jpeg xl": b"\xff\x0a" + bytes(range(256)),
    "heic": b"\0\0\0\x18ftypheic" + bytes(300),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
    "html": b"<html><h1>Just a moment</h1></html>",
    "json": b'{"error": "later"}',
    "half a picture": picture("WEBP")[:-30],
    "too many pixels": picture(size=(401, 250)),
    "one byte": b"x",
}


@pytest.mark.parametrize("name", UNKNOWN)
async def test_the_last_body_that_is_no_image_is_kept_for_the_operator(
    name: str, here: World, upstream: Upstream
) -> None:
    """The task lists it for an admin, with its place, length, hash and reason. Nobody else sees
    it, and no link serves it.
    """
    body = UNKNOWN[name]
    assert len(body) < here.settings.max_image_bytes
    async with raw_host(ok(body)) as port:
        task = await lost_beside_a_picture(here, upstream, f"http://127.0.0.1:{port}/x.png")
    (kept,) = task["quarantine"]
    sha256 = hashlib.sha256(body).hexdigest()
    assert (kept["index"], kept["bytes"], kept["sha256"]) == (1, len(body), sha256)
    assert kept["reason"] == dict(await steps(here, task))["image.lost"]
    assert kept["blob"] == f"quarantine/{task['id']}/1-{sha256}.bin"
    assert (await blobs(here, task))[kept["blob"]] == body
    assert [image["index"] for image in task["images"]] == [0]
    listed = (await here.client.get("/v1/tasks")).json()["data"]
    assert {each["quarantine"] for each in listed} == {None}
    for event in await here.events(task=task["id"]):
        assert "quarantine" not in event["data"]


async def test_an_owner_does_not_see_the_quarantine(here: World, upstream: Upstream) -> None:
    upstream.files["private"] = [served(b"no picture")]
    async with here.owner() as client:
        body = {"model": "wan2.5-text-to-image", "prompt": "x", "size": "768x768"}
        task = (await client.post("/v1/images/generations", json=body)).json()
        assert task["quarantine"] is None
        url = link(here, "private")
        upstream.queries[task["upstream_id"]] = [document("completed", url)]
        await called(here, task, "completed", url)
        assert len((await here.ended(task["id"]))["quarantine"]) == 1
        own = (await client.get(f"/v1/tasks/{task['id']}")).json()
    assert (own["quarantine"], own["images"]) == (None, [])


async def test_a_body_in_quarantine_is_never_served(here: World, upstream: Upstream) -> None:
    """Neither under an image's id nor under the name of its blob."""
    upstream.files["page"] = [page(200)]
    task = await lost_beside_a_picture(here, upstream, link(here, "page"))
    (row,) = await here.context.resources.store.read(
        lambda connection: image_rows(
            connection, select_images(images.c.task_id == task["id"], images.c.state == "lost")
        )
    )
    for path in (f"/images/{row.id}", f"/images/{row.id}.png", f"/images/{row.blob}"):
        assert (await here.stranger.get(path)).status_code == 404


async def test_only_the_last_body_is_kept(here: World, upstream: Upstream) -> None:
    """A body replaces the one before it, and an image replaces all."""
    upstream.files["odd"] = [served(f"page {number}".encode()) for number in range(4)]
    upstream.files["odd"] += [served(b"page 3")] * 100
    task = await here.ended((await made(here, upstream, link(here, "odd")))["id"])
    assert await only_blob(here, task) == b"page 3"
    await saved(here, upstream, "healed", *[served(b"page")] * 2, served(picture()))
    tasks = (await here.client.get("/v1/tasks", params={"limit": 1})).json()["data"]
    assert await only_blob(here, tasks[0]) == picture()
    assert (await here.task(tasks[0]["id"]))["quarantine"] is None


async def test_an_empty_body_is_not_kept(here: World, upstream: Upstream) -> None:
    upstream.files["empty"] = [served(b"")]
    task = await lost_beside_a_picture(here, upstream, link(here, "empty"))
    assert task["quarantine"] is None


async def test_a_compressed_body_is_kept_unpacked(here: World, upstream: Upstream) -> None:
    packed = gzip.compress(b"no picture", mtime=0)
    upstream.files["packed"] = [Part(packed, headers={"content-encoding": "gzip"})]
    task = await lost_beside_a_picture(here, upstream, link(here, "packed"))
    assert b"no picture" in (await blobs(here, task)).values()


async def test_a_body_over_the_limit_is_not_kept(here: World, upstream: Upstream) -> None:
    upstream.files["huge"] = [served(bytes(here.settings.max_image_bytes + 1))]
    task = await lost_beside_a_picture(here, upstream, link(here, "huge"))
    assert task["quarantine"] is None
    assert list((await blobs(here, task)).values()) == [picture()]


async def test_an_erased_task_has_no_body_in_quarantine(here: World, upstream: Upstream) -> None:
    upstream.files["erased"] = [served(b"no picture")]
    task = await lost_beside_a_picture(here, upstream, link(here, "erased"))
    assert len(await blobs(here, task)) == 2
    assert (await here.client.delete(f"/v1/tasks/{task['id']}")).status_code == 204
    assert await blobs(here, task) == {}
    assert (await here.task(task["id"]))["quarantine"] is None


async def test_retention_removes_the_body_and_keeps_the_picture(
    here: World, upstream: Upstream
) -> None:
    """The sweep leaves the body alone before that."""
    upstream.files["old"] = [served(b"no picture")]
    task = await lost_beside_a_picture(here, upstream, link(here, "old"))
    resources = here.context.resources
    ahead = replace(resources, clock=lambda: resources.clock() + AGE_MS + 60_000)
    await sweep(ahead)
    assert len(await blobs(here, task)) == 2
    retention = Retention(resources, DAYS, None, 365, lambda: resources.clock() + DAYS * DAY_MS)
    await retention.apply()
    assert list((await blobs(here, task)).values()) == [picture()]
    after = await here.task(task["id"])
    assert (after["quarantine"], len(after["images"])) == (None, 1)


async def test_a_backup_holds_the_body(here: World, upstream: Upstream, tmp_path: Path) -> None:
    upstream.files["backed up"] = [served(b"no picture")]
    task = await lost_beside_a_picture(here, upstream, link(here, "backed up"))
    path = here.settings.sqlite_path
    assert path is not None
    manifest = await asyncio.to_thread(write_backup, here.settings, path, tmp_path)
    assert manifest.images.lost == []
    kept = tmp_path / "images" / task["quarantine"][0]["blob"]
    assert kept.read_bytes() == b"no picture"


async def test_a_full_disk_keeps_its_room_for_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below `DARKROOM_MIN_FREE_BYTES` the result is lost without its body. The task is submitted
    while there is room.
    """
    monkeypatch.setattr(downloads, "WRONG_MS", 200)
    upstream = Upstream()
    async with raw_host(ok(b"no picture")) as port:
        async with downloading(
            tmp_path, upstream, evolink_result_hosts="files.example", download_schedule="600"
        ) as here:
            task = await made(here, upstream, f"http://127.0.0.1:{port}/a.png")
            await wait_until(lambda: steps(here, task))
        async with downloading(tmp_path, upstream, min_free_bytes=1 << 60) as here:
            ended = await here.ended(task["id"])
            assert (ended["state"], ended["quarantine"]) == ("failed", None)
            assert await blobs(here, task) == {}
