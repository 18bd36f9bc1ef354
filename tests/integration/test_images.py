"""Stored images over HTTP: whole, ranges, conditional requests, and missing files."""

import hashlib
import re
import time
from contextlib import AsyncExitStack
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from service.upstreams.sandbox import SandboxOptions, create_sandbox
from tests.api import UNTIL_DONE, refused, submitted
from tests.downloads import noise, served
from tests.upstream import Upstream, document
from tests.world import LOOPBACK, World, answering, world

JSON = dict[str, Any]
PROMPT = "a large one"


@pytest.fixture(scope="module")
async def stored(here: World) -> tuple[JSON, bytes]:
    """An image and its bytes."""
    image: JSON = (await submitted(here.client, UNTIL_DONE))["images"][0]
    return image, (await here.stranger.get(image["url"])).content


async def test_an_image_is_served_whole_and_can_do_no_harm(
    here: World, stored: tuple[JSON, bytes]
) -> None:
    """An image needs no key. It has its stored type, forbids sniffing and scripts, and is
    immutable.
    """
    image, content = stored
    answer = await here.stranger.get(image["url"])
    assert answer.status_code == 200
    assert hashlib.sha256(content).hexdigest() == image["sha256"]
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["content-length"] == str(image["bytes"]) == str(len(content))
    assert answer.headers["etag"] == f'"{image["sha256"]}"'
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-security-policy"].startswith("sandbox")
    assert "set-cookie" not in answer.headers
    assert "x-request-id" in answer.headers


async def test_head_has_the_headers_and_no_body(here: World, stored: tuple[JSON, bytes]) -> None:
    """HEAD has the headers of a GET of the whole image, for every range."""
    image, _ = stored
    whole = await here.stranger.get(image["url"])
    for headers in ({}, {"range": "bytes=0-1"}):
        answer = await here.stranger.head(image["url"], headers=headers)
        assert (answer.status_code, answer.content) == (200, b"")
        for name in (
            "content-length",
            "content-type",
            "etag",
            "cache-control",
            "content-security-policy",
        ):
            assert answer.headers[name] == whole.headers[name]


@pytest.mark.parametrize("tags", ["{}", "W/{}", '"other", {}', '"a",W/"b" , {}', "*"])
async def test_a_reader_who_has_it_is_not_sent_it_again(
    here: World, stored: tuple[JSON, bytes], tags: str
) -> None:
    """GET and HEAD answer 304 without a body, and ignore a range."""
    image, _ = stored
    headers = {"if-none-match": tags.format(f'"{image["sha256"]}"'), "range": "bytes=0-0"}
    for method in ("GET", "HEAD"):
        answer = await here.stranger.request(method, image["url"], headers=headers)
        assert (answer.status_code, answer.content) == (304, b"")
        assert answer.headers["etag"] == f'"{image["sha256"]}"'
        assert answer.headers["cache-control"].endswith("immutable")


async def test_a_reader_who_has_another_is_sent_it(here: World, stored: tuple[JSON, bytes]) -> None:
    """A tag of another image changes nothing."""
    image, content = stored
    for tags in ("", '"other"', image["sha256"], f'"{image["sha256"]}x"'):
        answer = await here.stranger.get(image["url"], headers={"if-none-match": tags})
        assert (answer.status_code, answer.content) == (200, content)


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [
        ("bytes=0-0", 0, 0),
        ("bytes=0-99", 0, 99),
        ("bytes=100-199", 100, 199),
        ("bytes=100-", 100, -1),
        ("bytes=0-", 0, -1),
        ("bytes=-1", -1, -1),
        ("bytes=-100", -100, -1),
        ("bytes=-999999999", 0, -1),
        ("bytes=10-999999999", 10, -1),
        ("Bytes=0-9", 0, 9),
    ],
)
async def test_a_range_is_served_alone(
    here: World, stored: tuple[JSON, bytes], asked: str, first: int, last: int
) -> None:
    """A range may be first, middle, open or last bytes. An end beyond the image means its end."""
    image, content = stored
    first, last = first % len(content), last % len(content)
    answer = await here.stranger.get(image["url"], headers={"range": asked})
    assert answer.status_code == 206
    assert answer.content == content[first : last + 1]
    assert answer.headers["content-range"] == f"bytes {first}-{last}/{len(content)}"
    assert answer.headers["content-length"] == str(last - first + 1)
    assert answer.headers["etag"] == f'"{image["sha256"]}"'


@pytest.mark.parametrize(
    "asked",
    ["bytes=9-1", "bytes=-", "bytes=0-1,5-6", "items=0-1", "bytes=a-b", "0-1", "bytes=٣-", ""],
)
async def test_an_invalid_or_multiple_range_is_ignored(
    here: World, stored: tuple[JSON, bytes], asked: str
) -> None:
    """The answer is the whole image, as RFC 9110 allows for several ranges and requires for invalid
    ones.
    """
    image, content = stored
    answer = await here.stranger.get(image["url"], headers=[(b"range", asked.encode())])
    assert (answer.status_code, answer.content) == (200, content)


@pytest.mark.parametrize("asked", ["bytes={}-", "bytes={}-{}", "bytes=999999999-", "bytes=-0"])
async def test_a_range_outside_of_the_image_is_refused(
    here: World, stored: tuple[JSON, bytes], asked: str
) -> None:
    """The 416 answer states the image's size."""
    image, content = stored
    answer = await here.stranger.get(
        image["url"], headers={"range": asked.replace("{}", str(len(content)))}
    )
    refused(answer, 416, "range_not_satisfiable", param="Range")
    assert answer.headers["content-range"] == f"bytes */{len(content)}"


async def test_a_range_of_another_version_is_the_whole(
    here: World, stored: tuple[JSON, bytes]
) -> None:
    """`If-Range` must name this image with a strong tag. A date never matches."""
    image, content = stored
    etag = f'"{image["sha256"]}"'
    for given, status in (
        (etag, 206),
        (f"W/{etag}", 200),
        ('"other"', 200),
        ("Wed, 21 Oct 2026 07:28:00 GMT", 200),
    ):
        answer = await here.stranger.get(
            image["url"], headers={"range": "bytes=0-9", "if-range": given}
        )
        assert (answer.status_code, answer.content) == (
            status,
            content[:10] if status == 206 else content,
        )


@pytest.mark.parametrize(
    "extension",
    ["png", "PNG", "jpg", "jpeg", "JPG", "webp", "gif", "avif", "bmp", "tif", "heic", "svg", "jxl"],
)
async def test_an_image_has_the_same_answers_under_any_extension(
    here: World, stored: tuple[JSON, bytes], extension: str
) -> None:
    """Programs that look at a link's end take the image. Its content type stays the stored one."""
    image, content = stored
    plain = image["url"].removesuffix(".png")
    named = f"{plain}.{extension}"
    tag = f'"{image["sha256"]}"'
    for headers in ({}, {"range": "bytes=5-9"}, {"if-none-match": tag}, {"range": "bytes=-0"}):
        one, other = [await here.stranger.get(url, headers=headers) for url in (plain, named)]
        assert one.status_code == other.status_code
        for answer in (one, other):
            del answer.headers["x-request-id"], answer.headers["date"]
        assert one.headers == other.headers
        if one.status_code != 416:
            assert one.content == other.content
    head = await here.stranger.head(named)
    assert (head.headers["content-type"], head.headers["content-length"]) == (
        "image/png",
        str(len(content)),
    )


@pytest.mark.parametrize(
    "end", [".", ".html", ".png.jpg", ".png.", ".png/", "png", ".exe", ".jpgx", ".%70ng%0a", "%2e"]
)
async def test_an_image_under_another_ending_is_not_found(
    here: World, stored: tuple[JSON, bytes], end: str
) -> None:
    """One extension of an image is all that may follow an id."""
    image, _ = stored
    refused(await here.stranger.get(image["url"] + end), 404)


async def test_an_erased_image_is_gone_under_its_extension_too(here: World) -> None:
    """The answer is 410, and 404 for an id that never was."""
    task = await submitted(here.client, UNTIL_DONE)
    assert (await here.client.delete(f"/v1/tasks/{task['id']}")).status_code == 204
    link = task["images"][0]["url"].removesuffix(".png")
    for extension in ("", ".png", ".webp"):
        refused(await here.stranger.get(link + extension), 410, "gone")
    refused(await here.stranger.get("/images/img_aaaaaaaaaaaaaaaaaaaaaaaaaa.png"), 404)


@pytest.mark.parametrize(
    "id", ["img_aaaaaaaaaaaaaaaaaaaaaaaaaa", "x", "%00", "..%2f..%2fdarkroom.db", "a" * 300]
)
async def test_an_unknown_image_is_not_found(here: World, id: str) -> None:
    """The answer is 404 in the common error form."""
    refused(await here.stranger.get(f"/images/{id}"), 404)


async def test_a_missing_or_short_image_is_an_error_not_a_broken_picture(here: World) -> None:
    """The service answers 503 before the first byte, so that no cache keeps half an image."""
    gone, short = (await submitted(here.client, UNTIL_DONE, n=2))["images"]
    paths = {path.name: path for path in here.settings.image_dir.rglob("*.png")}
    paths[f"0-{gone['sha256']}.png"].unlink()
    with paths[f"1-{short['sha256']}.png"].open("r+b") as file:
        file.truncate(10)
    for image in (gone, short):
        for headers in ({}, {"range": "bytes=0-5"}):
            refused(await here.stranger.get(image["url"], headers=headers), 503, "unavailable")
        answer = await here.stranger.head(image["url"])
        assert (answer.status_code, answer.content) == (503, b"")


@pytest.mark.slow
async def test_an_image_that_vanishes_while_it_is_sent_is_cut_off(tmp_path: Path) -> None:
    """The client sees that the image is incomplete, and the log has the cause."""
    upstream = Upstream({PROMPT: [document("pending", id="large")]})
    upstream.files["large"] = [
        served(noise(size=(3000, 2000), compress_level=0))
    ]  # 18 MB, more than the socket buffers hold
    async with world(tmp_path, upstream=upstream.app) as here:
        upstream.queries["large"] = [document("completed", f"{here.sandbox_url}/files/large")]
        task = await submitted(here.client, {}, prompt=PROMPT)
        await here.stranger.post(
            here.callback_url(task["id"]), json={"id": "large", "status": "completed"}
        )
        (image,) = (await here.ended(task["id"]))["images"]
        (path,) = here.settings.image_dir.rglob("*.png")
        with capture_logs() as lines:
            async with here.stranger.stream("GET", image["url"]) as answer:
                assert answer.status_code == 200
                path.unlink()
                with pytest.raises(httpx.RemoteProtocolError):
                    await answer.aread()
        assert [line["event"] for line in lines if line["log_level"] == "error"] == ["http.failed"]


async def test_images_are_served_after_the_upstream_is_gone(tmp_path: Path) -> None:
    """The service serves stored images from its own store."""
    async with AsyncExitStack() as upstream:
        options = SandboxOptions(networks=(ip_network(LOOPBACK),), delay_s=0.05)
        url = await upstream.enter_async_context(answering(create_sandbox(options)))
        async with world(tmp_path, evolink_base_url=url) as here:
            task = await submitted(here.client, UNTIL_DONE, n=2)
            await upstream.aclose()
            for image in task["images"]:
                content = (await here.stranger.get(image["url"])).content
                assert hashlib.sha256(content).hexdigest() == image["sha256"]


async def test_links_are_signed_and_expire_if_they_have_a_life(tmp_path: Path) -> None:
    """`IMAGE_LINK_TTL_S`: a link works for so long, under any extension, and for its image alone.
    Each answer and each event has a new one. Caches keep the image no longer than its link lives.
    """
    async with world(tmp_path, image_link_ttl_s=60) as here:
        one, other = [(await submitted(here.client, UNTIL_DONE))["images"][0] for _ in range(2)]
        link = httpx.URL(one["url"])
        answer = await here.stranger.get(link)
        assert hashlib.sha256(answer.content).hexdigest() == one["sha256"]
        seconds = re.fullmatch(r"public, max-age=(\d+), immutable", answer.headers["cache-control"])
        assert seconds is not None
        assert 0 < int(seconds[1]) <= 60
        (event,) = (await here.client.get("/v1/events?type=image.task.completed&limit=1")).json()[
            "data"
        ]
        assert (await here.stranger.get(event["data"]["results"][0])).status_code == 200
        bare = link.copy_with(path=f"/images/{one['id']}")
        assert (await here.stranger.get(bare)).status_code == 200

        expired = str(int(time.time()) - 5)
        signature = here.context.resources.keyring.sign_link(one["id"], expired)
        late = link.copy_with(params={"expires": expired, "signature": signature})
        wrong: dict[str, list[httpx.URL | str]] = {
            "link_expired": [late],
            "link_not_signed": [
                f"/images/{one['id']}",
                link.copy_set_param("expires", str(int(time.time()) + 6000)),
                link.copy_with(path=f"/images/{other['id']}.png"),
                link.copy_set_param("signature", "\u00e9"),
            ],
        }
        for code, links in wrong.items():
            for each in links:
                param = "expires" if code == "link_expired" else None
                refused(await here.stranger.get(each), 403, code, param=param)
