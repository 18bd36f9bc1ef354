"""A whole world that keeps its images on S3, and links to a server of these images."""

import hashlib
import sys
from pathlib import Path

import httpx
import pytest
from structlog.testing import capture_logs

from service.app import Role
from service.backends import open_blobs
from service.cli.sandbox_commands import dev_settings
from service.errors import ConfigurationError
from service.settings import load_settings
from tests.api import SUBMIT, UNTIL_DONE, got, order, refused, submitted
from tests.waiting import wait_until
from tests.world import ADMIN_KEY, World, subscriber, world


def files(here: World) -> list[Path]:
    """The files below the data folder without the database and the key."""
    own = ("darkroom.", "secret.key")
    return [
        path
        for path in here.settings.data_dir.rglob("*")
        if path.is_file() and not path.name.startswith(own)
    ]


async def test_images_on_s3_are_served_as_any_others(s3_bucket: str, tmp_path: Path) -> None:
    """The service answers whole requests, ranges, conditional requests and HEAD. No image is left
    on the local disk.
    """
    async with world(tmp_path, blob_url=f"s3://{s3_bucket}/pictures") as here:
        task = await submitted(here.client, UNTIL_DONE, n=2)
        assert task["state"] == "completed"
        for image in task["images"]:
            assert image["url"] == f"{here.url}/images/{image['id']}.png"
            whole = await here.stranger.get(image["url"])
            assert (whole.status_code, whole.headers["content-type"]) == (200, "image/png")
            assert hashlib.sha256(whole.content).hexdigest() == image["sha256"]
            assert whole.headers["etag"] == f'"{image["sha256"]}"'
            part = await here.stranger.get(
                image["url"], headers={"range": "bytes=10-99", "if-range": whole.headers["etag"]}
            )
            assert (part.status_code, part.content) == (206, whole.content[10:100])
            assert part.headers["content-range"] == f"bytes 10-99/{image['bytes']}"
            again = await here.stranger.get(
                image["url"], headers={"if-none-match": whole.headers["etag"]}
            )
            assert (again.status_code, again.content) == (304, b"")
            head = await here.stranger.head(image["url"])
            assert (head.status_code, head.headers["content-length"]) == (200, str(image["bytes"]))
        assert files(here) == []
        assert got(await here.client.get("/readyz"))["status"] == "ok"


async def test_links_lead_to_what_serves_the_same_names(
    s3_server: str, s3_bucket: str, tmp_path: Path
) -> None:
    """Links in tasks, results, events and deliveries use `image_base_url` and need no key. The
    service's own links still work.
    """
    base = f"{s3_server}/{s3_bucket}/pictures"
    async with (
        world(tmp_path, blob_url=f"s3://{s3_bucket}/pictures", image_base_url=f"{base}/") as here,
        subscriber() as takes,
        httpx.AsyncClient(trust_env=False) as anybody,
    ):
        got(await here.client.post("/v1/endpoints", json={"url": takes.url}), 201)
        task = await submitted(here.client, UNTIL_DONE, n=2, callback_url=f"{takes.url}/own")
        links = [
            f"{base}/{task['id']}/{image['index']}-{image['sha256']}.png"
            for image in task["images"]
        ]
        assert [image["url"] for image in task["images"]] == task["results"] == links
        assert (await here.task(task["id"]))["results"] == links
        (event,) = await here.events(type="image.task.completed")
        assert event["data"]["results"] == links
        assert event["source"] == here.url
        await wait_until(
            lambda: len([each for each in takes.received if links[1].encode() in each.body]) == 2
        )
        for link, image in zip(links, task["images"], strict=True):
            answer = await anybody.get(link)
            assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
            assert answer.content == (await here.stranger.get(f"/images/{image['id']}")).content


async def test_a_folder_can_be_served_by_another_too(tmp_path: Path) -> None:
    """A link ends with the file's path below the image folder."""
    async with world(tmp_path, image_base_url="https://cdn.example/i") as here:
        task = await submitted(here.client, UNTIL_DONE)
        (path,) = here.settings.image_dir.rglob("*.png")
        assert task["results"] == [
            f"https://cdn.example/i/{path.relative_to(here.settings.image_dir)}"
        ]


async def test_a_bucket_that_is_away_delays_images_and_nothing_else(
    s3_server: str, s3_bucket: str, tmp_path: Path
) -> None:
    """The service starts without the bucket, takes submissions and callbacks, and reports `blobs`
    as the cause. It saves the images as soon as the bucket exists.
    """
    late = f"late-{s3_bucket}"
    with capture_logs() as lines:
        async with world(tmp_path, blob_url=f"s3://{late}") as here:
            assert got(await here.client.get("/readyz")) == {
                "status": "degraded",
                "causes": ["blobs"],
            }
            task = got(await here.client.post(SUBMIT, json=order()))
            await wait_until(lambda: any(line["event"] == "image.retry" for line in lines))

            async def storing() -> bool:
                return bool((await here.task(task["id"]))["state"] == "storing")

            await wait_until(storing)
            async with httpx.AsyncClient(trust_env=False) as anybody:
                assert (await anybody.put(f"{s3_server}/{late}")).status_code == 200
            (image,) = (await here.ended(task["id"]))["images"]
            assert (await here.stranger.get(image["url"])).status_code == 200
            assert got(await here.client.get("/readyz"))["status"] == "ok"
    reasons = {line["reason"] for line in lines if line["event"] == "image.retry"}
    assert all(reason.endswith("the object store answered 404 Not Found") for reason in reasons)


async def test_an_image_that_vanished_from_s3_is_an_error_not_a_broken_picture(
    s3_bucket: str, tmp_path: Path
) -> None:
    """The service answers 503 before the first byte of the body."""
    async with world(tmp_path, blob_url=f"s3://{s3_bucket}") as here:
        (image,) = (await submitted(here.client, UNTIL_DONE))["images"]
        async for page in here.context.resources.blobs.listed():
            for blob in page:
                await here.context.resources.blobs.delete(blob.name)
        refused(await here.stranger.get(image["url"]), 503, "unavailable")


def test_a_sandbox_keeps_its_images_to_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`darkroom dev` ignores the bucket and the image address of the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DARKROOM_BLOB_URL", "s3://bucket")
    monkeypatch.setenv("DARKROOM_IMAGE_BASE_URL", "https://cdn.example")
    settings = dev_settings(load_settings(), "http://127.0.0.1:9", {})
    assert (settings.blob_url, settings.image_base_url) == (
        f"file://{tmp_path}/data/sandbox/images",
        None,
    )


async def test_a_missing_extra_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line names the setting and the extra to install, before the service opens anything. A
    service that keeps images in a folder starts without the extra.
    """
    monkeypatch.delitem(sys.modules, "service.blobs.s3", raising=False)
    monkeypatch.setitem(sys.modules, "obstore", None)
    settings = load_settings({}, None, data_dir=tmp_path, blob_url="s3://bucket")
    with pytest.raises(
        ConfigurationError,
        match=r"^DARKROOM_BLOB_URL: s3:// needs the extra s3: darkroom-service\[s3\]$",
    ):
        await open_blobs(settings, {})
    async with world(tmp_path, role=Role(workers=False)) as here:
        assert (
            await here.stranger.get("/readyz", headers={"authorization": f"Bearer {ADMIN_KEY}"})
        ).json()["status"] == "ok"


async def test_unfit_variables_stop_the_start_with_a_line(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names the setting and the bad value, and contains no key."""
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "perhaps")
    settings = load_settings({}, None, data_dir=tmp_path, blob_url=f"s3://{s3_bucket}")
    with pytest.raises(
        ConfigurationError, match=r"^DARKROOM_BLOB_URL: s3://bucket-\w+ cannot be used: .*perhaps"
    ) as caught:
        await open_blobs(settings, {})
    assert "secret" not in str(caught.value)
