"""Saving results over real sockets: what counts as saved, what is tried again, and what is lost."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import RedirectResponse, Response
from structlog.testing import capture_logs

from service.blobs import CHUNK
from service.pipeline import reconcile, worker
from tests.upstream import After, Cut, Upstream, document, error, failed, page, picture
from tests.waiting import wait_until
from tests.world import World, world

MAX_BYTES, MAX_PIXELS = 600_000, 100_000


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Due work is looked for, and questions are asked again, more often than in earnest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "LOOK_S", 0.05)
        patch.setattr(reconcile, "confirm_wait", lambda _: 0.05)
        yield


@pytest.fixture(scope="module")
def upstream() -> Upstream:
    return Upstream()


@pytest.fixture(scope="module")
async def here(upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    folder = tmp_path_factory.mktemp("download")
    limits: dict[str, Any] = {"max_image_bytes": MAX_BYTES, "max_image_pixels": MAX_PIXELS}
    async with world(folder, upstream=upstream.app, reconcile_after_s=600, **limits) as made:
        yield made


def served(body: bytes, media_type: str = "image/png") -> Response:
    return Response(body, media_type=media_type)


def link(here: World, name: str) -> str:
    return f"{here.sandbox_url}/files/{name}"


async def called(here: World, task: dict[str, Any], status: str, *results: str) -> None:
    body = json.dumps({"id": task["upstream_id"], "status": status, "results": results})
    assert (await here.stranger.post(here.callback_url(task["id"]), content=body)).status_code == 200


async def made(here: World, upstream: Upstream, *results: str) -> dict[str, Any]:
    """A task that the upstream has completed with these results."""
    task = await here.submit()
    upstream.queries[task["upstream_id"]] = [document("completed", *results)]
    await called(here, task, "completed", *results)
    return task


async def steps(here: World, task: dict[str, Any]) -> list[tuple[str, Any]]:
    """The image steps of the timeline, each with its reason."""
    found = await here.steps(task["id"])
    return [(step["step"], step.get("reason")) for step in found if step["step"].startswith("image.")]


async def bytes_of(here: World, image: dict[str, Any]) -> bytes:
    answer = await here.stranger.get(image["url"])
    assert answer.status_code == 200
    assert answer.headers["content-type"] == image["media_type"]
    return answer.content


@pytest.mark.parametrize(
    ("format", "media_type"), [("PNG", "image/png"), ("JPEG", "image/jpeg"), ("WEBP", "image/webp"), ("GIF", "image/gif")]
)
async def test_a_result_is_kept_byte_for_byte(format: str, media_type: str, here: World, upstream: Upstream) -> None:
    """Type and size by content, whatever name and header say; equal bytes are served, with their hash, in the upstream's order."""
    bodies = [picture(format, (64, 48), shade) for shade in (10, 200)]
    names = [f"{format}-{number}.bin" for number in range(2)]
    upstream.files |= {name: [served(body, "text/plain")] for name, body in zip(names, bodies, strict=True)}
    task = await here.ended((await made(here, upstream, *(link(here, name) for name in names)))["id"])
    assert task["state"] == "completed"
    assert task["results"] == [image["url"] for image in task["images"]]
    for index, (image, body) in enumerate(zip(task["images"], bodies, strict=True)):
        figures = {"index": index, "media_type": media_type, "bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}
        assert image | figures | {"width": 64, "height": 48} == image
        assert await bytes_of(here, image) == body


async def test_a_large_result_is_kept_whole(here: World, upstream: Upstream) -> None:
    """One that is written in several pieces is the same in the end."""
    body = picture("BMP", (300, 310))
    upstream.files["large.bmp"] = [served(body)]
    task = await here.ended((await made(here, upstream, link(here, "large.bmp")))["id"])
    assert len(body) > CHUNK
    assert await bytes_of(here, task["images"][0]) == body


PASSING = {
    "server error": error(500, "internal_error"),
    "gateway": page(524),
    "cut short": Cut(picture()[:50]),
    "html with 200": page(200),
    "other html": served(b"<html>another page each time</html>", "text/html"),
}


@pytest.mark.parametrize("name", PASSING)
async def test_a_passing_failure_is_tried_again(name: str, here: World, upstream: Upstream) -> None:
    """An error, a broken body, a page instead of a picture: tried again, and the picture is the one that came whole."""
    upstream.files[name] = [PASSING[name], served(picture())]
    task = await here.ended((await made(here, upstream, link(here, name)))["id"])
    assert task["state"] == "completed"
    assert await bytes_of(here, task["images"][0]) == picture()
    assert [step for step, _ in await steps(here, task)] == ["image.retry", "image.stored"]


def first_retries(lines: list[Any]) -> dict[str, Any]:
    """The line of each task's first `image.retry`."""
    return {line["task_id"]: line for line in lines if line["event"] == "image.retry" and line["attempt"] == 1}


async def test_a_result_nobody_serves_is_tried_again(here: World, upstream: Upstream) -> None:
    """No connection is a passing failure too, and Retry-After may lengthen the schedule."""
    upstream.files["later"] = [error(503, "service_unavailable", retry_after="700")]
    with capture_logs() as lines:
        tasks = [await made(here, upstream, url) for url in ("http://127.0.0.1:9/nobody.png", link(here, "later"))]
        await wait_until(lambda: len(first_retries(lines)) == 2)
    for task in tasks:
        await here.client.post(f"/v1/tasks/{task['id']}/cancel")
    first, second = (first_retries(lines)[task["id"]] for task in tasks)
    assert first["reason"].startswith("NotConnected: 127.0.0.1")
    assert 0.05 <= first["wait_s"] <= 0.06
    assert (second["reason"], second["wait_s"]) == ("answered 503", 700)


@pytest.mark.parametrize("status", [403, 404, 410])
async def test_a_dead_link_is_replaced_by_a_fresh_one(status: int, here: World, upstream: Upstream) -> None:
    """403, 404, 410: the upstream is asked again, and the link it gives then is fetched."""
    old, new = f"old-{status}.png", f"new-{status}.png"
    upstream.files |= {old: [error(status, "not_found")], new: [served(picture())]}
    task = await here.submit()
    upstream.queries[task["upstream_id"]] = [document("completed", link(here, old)), document("completed", link(here, new))]
    await called(here, task, "completed", link(here, old))
    ended = await here.ended(task["id"])
    assert (ended["state"], len(ended["images"])) == ("completed", 1)
    assert upstream.asked[task["upstream_id"]] >= 2


async def lost(here: World, upstream: Upstream, url: str) -> str:
    """Why a result was lost, of a task whose other result was saved; the task is failed and lists what was stored."""
    upstream.files["good.png"] = [served(picture())]
    task = await here.ended((await made(here, upstream, link(here, "good.png"), url))["id"])
    assert (task["state"], task["error"]["code"], task["results"]) == ("failed", "results_lost", [])
    assert [image["index"] for image in task["images"]] == [0]
    assert await bytes_of(here, task["images"][0]) == picture()
    event = (await here.events(task=task["id"], type="image.task.failed"))[0]["data"]
    assert [image["index"] for image in event["images"]] == [0]
    reason: str = dict(await steps(here, task))["image.lost"]
    assert f"1: {reason}" in task["error"]["message"]
    return reason


async def test_the_same_wrong_bytes_three_times_are_final(here: World, upstream: Upstream) -> None:
    """What comes a third time won't become a picture."""
    upstream.files["wrong.png"] = [page(200)]
    assert await lost(here, upstream, link(here, "wrong.png")) == "the bytes are no picture"
    assert upstream.asked["wrong.png"] == 3


async def test_different_wrong_bytes_are_not_final(here: World, upstream: Upstream) -> None:
    """As long as something else comes each time, the picture may still come."""
    answers = [served(f"page {number}".encode()) for number in (1, 2, 1, 2)]
    upstream.files["odd.png"] = [*answers, served(picture())]
    task = await here.ended((await made(here, upstream, link(here, "odd.png")))["id"])
    assert task["state"] == "completed"


async def test_too_many_bytes_are_final(here: World, upstream: Upstream) -> None:
    """Over `MAX_IMAGE_BYTES` the download stops, and isn't tried again."""
    upstream.files["big.png"] = [served(picture() + b"\0" * MAX_BYTES)]
    assert await lost(here, upstream, link(here, "big.png")) == f"over {MAX_BYTES} bytes"
    assert upstream.asked["big.png"] == 1


async def test_too_many_pixels_are_final(here: World, upstream: Upstream) -> None:
    """Over `MAX_IMAGE_PIXELS` nothing is decoded, and nothing tried again."""
    upstream.files["wide.png"] = [served(picture(size=(401, 250)))]
    assert f"over {MAX_PIXELS} pixels" in await lost(here, upstream, link(here, "wide.png"))
    assert upstream.asked["wide.png"] == 1


async def test_a_host_that_is_not_allowed_is_final(here: World, upstream: Upstream) -> None:
    """The guard's refusal is final at once: nobody is connected to, not by a redirect either."""
    elsewhere = link(here, "elsewhere.png").replace("127.0.0.1", "127.0.0.2")
    upstream.files["redirect.png"] = [RedirectResponse(elsewhere)]
    for url in (elsewhere, link(here, "redirect.png"), "ftp://127.0.0.1/x.png", ""):
        reason = await lost(here, upstream, url)
        assert "allowed" in reason or "http and https" in reason
    assert (upstream.asked["redirect.png"], upstream.asked["elsewhere.png"]) == (1, 0)


async def test_a_redirect_to_an_allowed_host_is_followed(here: World, upstream: Upstream) -> None:
    """At most five, each checked anew; the API key goes to no result host."""
    seen: list[str] = []

    class Looked(Response):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            seen.extend(name.decode() for name, _ in scope["headers"])
            await super().__call__(scope, receive, send)

    hops: dict[str, list[Response]] = {f"hop-{number}": [RedirectResponse(f"/files/hop-{number + 1}")] for number in range(5)}
    upstream.files |= {**hops, "hop-5": [Looked(picture())], "ring": [RedirectResponse("/files/ring")]}
    task = await here.ended((await made(here, upstream, link(here, "hop-0")))["id"])
    assert task["state"] == "completed"
    assert "authorization" not in seen
    assert await lost(here, upstream, link(here, "ring")) == "127.0.0.1: more than 5 redirects"


def no_incoming(images: Path, _: str) -> Path:
    return images / ".incoming"


def no_folder(images: Path, task_id: str) -> Path:
    return images / task_id


@pytest.mark.parametrize("place", [no_incoming, no_folder], ids=["where it is written", "where it is kept"])
async def test_a_blob_store_that_fails_is_tried_again(place: Callable[[Path, str], Path], here: World, upstream: Upstream) -> None:
    """A blob store's failure is nobody's fault: the result is fetched again, and saved once the store works."""
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
    faults = here.context.resources.metrics.registry.get_sample_value("darkroom_worker_faults_total", {"stage": "download"})
    assert not faults  # it was foreseen


async def test_what_a_callback_names_is_fetched_at_once_and_counts_later(here: World, upstream: Upstream) -> None:
    """The picture is saved while the confirmation runs; the task shows it only once the upstream agrees."""
    agreed = asyncio.Event()
    upstream.files["early.png"] = [served(picture())]
    task = await here.submit()
    upstream.queries[task["upstream_id"]] = [After(agreed.wait, document("completed", link(here, "early.png")))]
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
    """A picture that was fetched for a callback counts for nothing when the upstream says that the task failed."""
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
    """A download whose address was replaced while it ran is thrown away; the confirmed address is fetched."""
    gate = asyncio.Event()
    upstream.files |= {"callback.png": [After(gate.wait, served(picture(shade=1)))], "query.png": [served(picture(shade=2))]}
    task = await here.submit()
    upstream.queries[task["upstream_id"]] = [document("completed", link(here, "query.png"))]
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
    assert here.context.resources.metrics.registry.get_sample_value(metric, {"outcome": "superseded"}) == 1


async def test_a_download_is_tried_until_its_link_has_died(tmp_path: Path) -> None:
    """A passing failure becomes final when the link's time is up."""
    upstream = Upstream()
    upstream.files["dying.png"] = [error(500, "internal_error")]
    async with world(tmp_path, upstream=upstream.app, evolink_result_ttl_s=0.4) as here:
        task = await here.ended((await made(here, upstream, link(here, "dying.png")))["id"])
        assert (task["state"], task["error"]["code"]) == ("failed", "results_lost")
        assert upstream.asked["dying.png"] >= 2
