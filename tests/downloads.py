"""Helpers for tests of saved results: an upstream that serves results, and checks of the saved
images.
"""

import io
import json
import random
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from PIL import Image
from sqlalchemy import update
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.db.tables import images
from service.db.transaction import Transaction
from service.queue import worker
from service.tasks import confirm_worker
from tests.upstream import Upstream, document, picture
from tests.world import JSON, World, world

MAX_BYTES, MAX_PIXELS = 600_000, 100_000
NOTHING: Mapping[str, str] = MappingProxyType({})


@contextmanager
def quick() -> Iterator[None]:
    """Workers look for due work and repeat queries sooner than in production."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "LOOK_S", 0.05)
        patch.setattr(confirm_worker, "confirm_wait", lambda _: 0.05)
        yield


@asynccontextmanager
async def downloading(folder: Path, upstream: Upstream, **settings: Any) -> AsyncIterator[World]:
    """A quick world with small limits."""
    usual: JSON = {"max_image_bytes": MAX_BYTES, "max_image_pixels": MAX_PIXELS}
    usual |= {"reconcile_after_s": 600, "no_results_after_s": 0.2}
    with quick():
        async with world(folder, upstream=upstream.app, **(usual | settings)) as made:
            yield made


class Part(Response):
    """An answer that breaks off after `cut` bytes of its body, if `cut` is given. With
    `length=False` it has no content-length.

    `seen` collects the headers of each request.
    """

    def __init__(
        self,
        body: bytes,
        status: int = 200,
        *,
        cut: int | None = None,
        length: bool = True,
        seen: list[dict[str, str]] | None = None,
        headers: Mapping[str, str] = NOTHING,
    ) -> None:
        super().__init__(body, status, headers, "image/png")
        if not length:
            del self.headers["content-length"]
        self._cut, self._seen = cut, seen

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._seen is not None:
            self._seen.append({name.decode(): value.decode() for name, value in scope["headers"]})
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        await send(
            {
                "type": "http.response.body",
                "body": self.body[: self._cut],
                "more_body": self._cut is not None,
            }
        )


def validator_children(pid: int) -> list[int]:
    """The child processes of `pid` that validate images. Linux only."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread or a child has ended
            for child in (task / "children").read_text(encoding="ascii").split():
                program = Path(f"/proc/{child}/cmdline").read_bytes()
                found += [int(child)] * (b"service.images.validator_child" in program)
    return found


def served(body: bytes, media_type: str = "image/png") -> Response:
    return Response(body, media_type=media_type)


@cache
def noise(format: str = "PNG", size: tuple[int, int] = (200, 150), **how: Any) -> bytes:
    """A picture of noise, which no format compresses. Always the same bytes."""
    made = io.BytesIO()
    Image.frombytes("RGB", size, random.Random(1).randbytes(size[0] * size[1] * 3)).save(
        made, format, **how
    )
    return made.getvalue()


def link(here: World, name: str) -> str:
    return f"{here.sandbox_url}/files/{name}"


async def called(here: World, task: JSON, status: str, *results: str) -> None:
    body = json.dumps({"id": task["upstream_id"], "status": status, "results": results})
    assert (
        await here.stranger.post(here.callback_url(task["id"]), content=body)
    ).status_code == 200


async def made(here: World, upstream: Upstream, *results: str) -> JSON:
    """A task that the upstream has completed with these results."""
    task = await here.submit()
    upstream.queries[task["upstream_id"]] = [document("completed", *results)]
    await called(here, task, "completed", *results)
    return task


async def saved(here: World, upstream: Upstream, name: str, *answers: Response) -> JSON:
    """The image of a task with one result, which the upstream serves with `answers`. AssertionError
    if the task does not complete.
    """
    upstream.files[name] = list(answers) or upstream.files[name]
    task = await here.ended((await made(here, upstream, link(here, name)))["id"])
    assert task["state"] == "completed", await steps(here, task)
    image: JSON = task["images"][0]
    return image


def end_links(tx: Transaction, task_ids: Sequence[str]) -> list[None]:
    links = update(images).where(images.c.task_id.in_(task_ids))
    tx.connection.execute(links.values(link_dies_at=tx.now))
    return [None] * len(task_ids)


async def links_die(here: World, task: JSON) -> None:
    """The time of the task's links is up from now on."""
    await here.context.resources.store.write(end_links, task["id"])


async def steps(here: World, task: JSON) -> list[tuple[str, Any]]:
    """The image steps of the timeline with their reasons."""
    found = await here.steps(task["id"])
    return [
        (step["step"], step.get("reason")) for step in found if step["step"].startswith("image.")
    ]


async def bytes_of(here: World, image: JSON) -> bytes:
    """The image as a client without a key gets it, with headers that disable active content."""
    answer = await here.stranger.get(image["url"])
    assert answer.status_code == 200
    assert answer.headers["content-type"] == image["media_type"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-security-policy"].startswith("sandbox")
    return answer.content


async def lost(here: World, upstream: Upstream, url: str) -> str:
    """The reason for the loss of a result. The task's other result is saved, and the failed task
    lists the saved image.
    """
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
