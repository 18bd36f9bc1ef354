"""Final and temporary failures of a download, and the order of downloads."""

import asyncio
import gzip
import io
import socket
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sqlalchemy import update
from starlette.responses import RedirectResponse, Response
from structlog.testing import capture_logs

from service.db.tables import images
from service.db.transaction import Transaction
from service.images import downloads
from service.images.validator_child import FRAMES
from tests.downloads import (
    MAX_BYTES,
    MAX_PIXELS,
    Part,
    bytes_of,
    called,
    downloading,
    link,
    lost,
    made,
    noise,
    saved,
    served,
    steps,
)
from tests.upstream import After, Upstream, document, error, page, picture
from tests.waiting import wait_until
from tests.world import World

WORLD = downloading

pytestmark = pytest.mark.slow


def animation(frames: int) -> bytes:
    """An animation with this number of one-pixel frames."""
    made = io.BytesIO()
    shades = [Image.new("L", (1, 1), number % 2 * 255) for number in range(frames)]
    shades[0].save(made, "GIF", save_all=True, append_images=shades[1:])
    return made.getvalue()


PASSING = {
    "server error": error(500, "internal_error"),
    "too many requests": error(429, "rate_limit_exceeded"),
    "a gateway's page": page(524),
    "html with 200": page(200),
    "svg with 200": served(
        b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "image/svg+xml"
    ),
    "an empty body": served(b""),
    "no content": Response(status_code=204),
    "a redirect to nowhere": Response(status_code=302),
    "a redirect to a forbidden address": RedirectResponse("http://10.0.0.2/x.png"),
    "a redirect to a page": RedirectResponse("https://127.0.0.1:25/"),
    "a part nobody asked for": Part(
        picture(), 206, headers={"content-range": f"bytes 0-{len(picture()) - 1}/{len(picture())}"}
    ),
    "broken off at once": Part(picture(), cut=0),
    "broken off in the middle": Part(noise(), cut=50_000, headers={"etag": '"one"'}),
    "cut short, and said to be whole": served(picture()[:-1]),
    "another format": served(b"BM" + picture()),
}


@pytest.mark.parametrize("name", PASSING)
async def test_a_passing_failure_is_tried_again(name: str, here: World, upstream: Upstream) -> None:
    """An error, a broken body, and a body that is no image are retried. The saved image is the one
    that arrived whole.
    """
    upstream.files[name] = [PASSING[name], served(picture())]
    task = await here.ended((await made(here, upstream, link(here, name)))["id"])
    assert task["state"] == "completed"
    assert await bytes_of(here, task["images"][0]) == picture()
    assert [step for step, _ in await steps(here, task)] == ["image.retry", "image.stored"]


@pytest.mark.parametrize("status", [201, 203])
async def test_a_whole_body_under_another_status_is_stored(
    status: int, here: World, upstream: Upstream
) -> None:
    """A proxy that changed the response says 203."""
    image = await saved(here, upstream, f"whole-{status}", Part(picture(), status))
    assert await bytes_of(here, image) == picture()


def swelling() -> Response:
    """A compressed body of 500 blocks, each of which is too long alone."""
    packer = zlib.compressobj(wbits=31)
    first, other = [
        packer.compress(bytes(MAX_BYTES)) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2)
    ]
    return Part(first + 499 * other, headers={"content-encoding": "gzip"})


# Each answer is made when its test runs.
FINAL: dict[str, tuple[Callable[[], Response], str]] = {
    "bytes": (lambda: served(picture() + b"\0" * MAX_BYTES), f"over {MAX_BYTES} bytes"),
    "bytes without end": (
        lambda: Part(picture() + b"\0" * MAX_BYTES, length=False),
        f"over {MAX_BYTES} bytes",
    ),
    "bytes when unpacked": (swelling, f"over {MAX_BYTES} bytes"),
    "pixels": (lambda: served(picture(size=(401, 250))), f"over {MAX_PIXELS} pixels"),
    "frames": (lambda: served(animation(FRAMES + 1)), f"over {FRAMES} frames"),
}


@pytest.mark.parametrize("name", FINAL)
async def test_over_a_limit_is_final(name: str, here: World, upstream: Upstream) -> None:
    """An exceeded limit is final at once, without a retry."""
    answer, reason = FINAL[name]
    upstream.files[name] = [answer()]
    assert reason in await lost(here, upstream, link(here, name))
    assert upstream.asked[name] == 1


async def test_a_link_the_guard_refuses_is_final(here: World, upstream: Upstream) -> None:
    """The service opens no connection. What is no link may still become one for a while."""
    for url in ("https://10.0.0.2/x.png", "ftp://127.0.0.1/x.png", ""):
        reason = await lost(here, upstream, url)
        assert "not globally routable" in reason or "http and https" in reason


WRONG = {
    "html": page(200),
    "a picture cut by its length": Response(picture()[:40]),
    "half of an animation": Response(noise("GIF")[:-900]),
}


@pytest.mark.parametrize("name", WRONG)
async def test_the_same_wrong_bytes_for_long_are_final(
    name: str, here: World, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three times are not enough. They have to spread over ten minutes, here until the fourth
    answer.
    """

    async def for_long() -> None:
        monkeypatch.setattr(downloads, "WRONG_MS", 1)

    upstream.files[name] = [*[WRONG[name]] * 3, After(for_long, WRONG[name])]
    assert "picture" in await lost(here, upstream, link(here, name))
    assert upstream.asked[name] == 4


@pytest.mark.parametrize("name", WRONG)
async def test_the_same_wrong_bytes_for_a_while_are_not_final(
    name: str, here: World, upstream: Upstream
) -> None:
    await saved(here, upstream, f"{name} for a while", *[WRONG[name]] * 9, served(picture()))


async def test_different_wrong_bytes_are_not_final(here: World, upstream: Upstream) -> None:
    """While the bytes differ each time, a retry may still bring an image."""
    answers = [served(f"page {number}".encode()) for number in (1, 2, 1, 2)]
    await saved(here, upstream, "odd.png", *answers, served(picture()))


@pytest.mark.parametrize("coding", ["gzip", "x-gzip", "GZIP"])
async def test_a_compressed_image_is_decompressed(
    coding: str, here: World, upstream: Upstream
) -> None:
    """Some servers compress a body although the client asked for identity. The length limit applies
    to the compressed body, and the image is saved decompressed.
    """
    packed = gzip.compress(noise(), mtime=0)
    image = await saved(here, upstream, coding, Part(packed, headers={"content-encoding": coding}))
    assert await bytes_of(here, image) == noise()
    assert image["bytes"] == len(noise())


async def test_a_coding_that_is_a_lie_changes_nothing(here: World, upstream: Upstream) -> None:
    """The content decides whether a body is an image."""
    image = await saved(
        here, upstream, "lie", Part(picture(), headers={"content-encoding": "gzip"})
    )
    assert await bytes_of(here, image) == picture()


def first_retries(lines: list[Any]) -> dict[str, Any]:
    """The log line of each task's first `image.retry`."""
    return {
        line["task_id"]: line
        for line in lines
        if line["event"] == "image.retry" and line["attempt"] == 1
    }


async def test_a_result_nobody_serves_is_tried_again(here: World, upstream: Upstream) -> None:
    """A refused connection is temporary too, and Retry-After may lengthen the schedule."""
    upstream.files["later"] = [error(503, "service_unavailable", retry_after="700")]
    with socket.socket() as silent, capture_logs() as lines:
        silent.bind(("127.0.0.1", 0))  # no server listens here
        nobody = f"http://127.0.0.1:{silent.getsockname()[1]}/nobody.png"
        tasks = [await made(here, upstream, url) for url in (nobody, link(here, "later"))]
        ids = {task["id"] for task in tasks}
        await wait_until(lambda: first_retries(lines).keys() >= ids)
    for task in tasks:
        await here.client.post(f"/v1/tasks/{task['id']}/cancel")
    first, second = (first_retries(lines)[task["id"]] for task in tasks)
    assert first["reason"].startswith("NotConnected: 127.0.0.1")
    assert 0.05 <= first["wait_s"] <= 0.06
    assert (second["reason"], second["wait_s"]) == ("answered 503", 700)


@pytest.mark.parametrize("status", [403, 404, 410])
async def test_a_dead_link_is_replaced_by_a_fresh_one(
    status: int, here: World, upstream: Upstream
) -> None:
    """After 403, 404 or 410 the service queries the upstream again and fetches the new link."""
    old, new = f"old-{status}.png", f"new-{status}.png"
    upstream.files |= {old: [error(status, "not_found")], new: [served(picture())]}
    task = await here.submit()
    upstream.queries[task["upstream_id"]] = [
        document("completed", link(here, old)),
        document("completed", link(here, new)),
    ]
    await called(here, task, "completed", link(here, old))
    ended = await here.ended(task["id"])
    assert (ended["state"], len(ended["images"])) == ("completed", 1)
    assert upstream.asked[task["upstream_id"]] >= 2


async def test_a_redirect_to_an_allowed_host_is_followed(here: World, upstream: Upstream) -> None:
    """The service follows at most five redirects and checks each. It sends the API key to no result
    host.
    """
    seen: list[dict[str, str]] = []
    hops: dict[str, list[Response]] = {
        f"hop-{number}": [RedirectResponse(f"/files/hop-{number + 1}")] for number in range(5)
    }
    upstream.files |= {**hops, "hop-5": [Part(picture(), seen=seen)]}
    await saved(here, upstream, "hop-0")
    assert seen
    assert "authorization" not in seen[0]


def expire_links(tx: Transaction, items: Sequence[None]) -> list[None]:
    """A store operation that ends the life of every link now."""
    tx.connection.execute(update(images).values(link_dies_at=tx.now))
    return [None] * len(items)


async def test_a_download_is_tried_until_its_link_has_died(tmp_path: Path) -> None:
    """A temporary failure becomes final when the link expires, here during the third attempt."""
    upstream = Upstream()

    async def expire() -> None:
        await here.context.resources.store.write(expire_links, None)

    failure = error(500, "internal_error")
    upstream.files["dying.png"] = [failure, failure, After(expire, failure)]
    async with downloading(tmp_path, upstream) as here:
        task = await here.ended((await made(here, upstream, link(here, "dying.png")))["id"])
        assert (task["state"], task["error"]["code"]) == ("failed", "results_lost")
        assert upstream.asked["dying.png"] == 3


async def test_the_link_that_dies_first_is_fetched_first(tmp_path: Path) -> None:
    """With fewer slots than due images, the link's expiry decides the order, not how long an image
    has been due.
    """
    upstream, begin, gate = Upstream(), asyncio.Event(), asyncio.Event()
    order: list[str] = []

    def seen(name: str) -> Response:
        async def now() -> None:
            order.append(name)

        return After(now, served(picture()))

    upstream.files = {
        "oldest": [After(begin.wait, error(500, "internal_error")), seen("oldest")],
        "gate": [After(gate.wait, served(picture()))],
    }
    names = [f"younger-{number}" for number in range(5)]
    upstream.files |= {name: [seen(name)] for name in names}
    async with downloading(
        tmp_path, upstream, download_concurrency=1, download_schedule="1"
    ) as here:
        clock = asyncio.get_running_loop().time
        tasks = [await made(here, upstream, link(here, "oldest"))]
        await wait_until(lambda: upstream.asked["oldest"])  # it holds the slot until `begin`
        tasks += [await made(here, upstream, link(here, name)) for name in ("gate", *names)]

        async def due() -> bool:  # a new image would take a slot that is just free
            return {(await here.task(each["id"]))["state"] for each in tasks} == {"storing"}

        await wait_until(due)
        begin.set()
        await wait_until(lambda: upstream.asked["gate"])
        again = clock() + 1.3
        await wait_until(lambda: clock() > again)
        assert order == []
        gate.set()
        for task in tasks:
            assert (await here.ended(task["id"]))["state"] == "completed"
    assert order == ["oldest", *names]
