"""The vocabulary in which `faults.py` describes an upstream's faults: documents, answers, files,
images.

This module imports nothing from the service. The wire format is that of the upstream's own docs.
"""

import asyncio
import io
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from tests.untidy import Shape

JSON = dict[str, Any]
MAX_BYTES, MAX_PIXELS = 600_000, 500_000  # the service's limits in these tests
LARGE = 300  # pixels a side, large enough to be cut in two


@dataclass(frozen=True, slots=True)
class Answer:
    """A `status` of 0 means no answer. `announced` is a content-length that differs from the
    body's. The connection ends after either.

    An answer that `stalls` sends no more bytes and keeps the connection open until the client
    closes it. A `shape` writes an answer of status 200 in its own way.
    """

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    announced: int | None = None
    stalls: bool = False
    shape: Shape | None = None


@dataclass(slots=True)
class Task:
    """A task of the upstream. `number` tells the tasks of one behaviour apart. `forbidden` is a
    link that the service must not follow.
    """

    id: str
    number: int
    base: str
    forbidden: str
    behaviour: "Behaviour"
    pictures: tuple[bytes, bytes]
    exists: bool = False
    callback_url: str = ""
    asked: int = 0
    stale: int | None = None  # the version of the first link that was followed
    fetched: Counter[str] = field(default_factory=Counter)
    # whether the application knows of the task
    submitted: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def link(self, position: int, version: object = 0) -> str:
        return f"{self.base}/files/{self.id}/{position}-{version}.png"


Truth = Callable[[Task], JSON]
Body = Callable[[Task], bytes]
Step = Answer | Callable[[Task], Answer]
# for a version of a link, or None for the image
File = Answer | Callable[[Task, str], Answer | None]


# --- pictures
# --------------------------------------------------------------------------------------------------


def noise(number: int, position: int, side: int = 48, format: str = "") -> bytes:
    """A unique image. Its format may differ from the extension in its link."""
    size, made = (side, side + number % 7), io.BytesIO()
    pixels = random.Random(f"{number} {position}").randbytes(size[0] * size[1] * 3)
    Image.frombytes("RGB", size, pixels).save(made, format or ("PNG", "JPEG", "WEBP")[number % 3])
    return made.getvalue()


def large(number: int, format: str) -> bytes:
    """An image large enough for a resumed download. All JPEGs have one length, so that halves of
    two images would fit together.
    """
    whole = noise(number, 0, LARGE, format)
    return whole.ljust(90_000, b"\0") if format == "JPEG" else whole


def moving(number: int, position: int, side: int = 48, frames: int = 3) -> bytes:
    shades = [
        Image.new("RGB", (side, side), (number % 256, position, 60 * frame % 256))
        for frame in range(frames)
    ]
    made = io.BytesIO()
    shades[0].save(
        made,
        ("GIF", "WEBP", "PNG")[number % 3],
        save_all=True,
        append_images=shades[1:],
        duration=100,
    )
    return made.getvalue()


# --- documents
# --------------------------------------------------------------------------------------------------


def document(task: Task, status: str, **more: Any) -> JSON:
    names = {
        "id": task.id,
        "created": 1757165031,
        "model": "wan2.5-text-to-image",
        "object": "image.generation.task",
        "type": "image",
    }
    return {**names, "status": status, "progress": 100, "task_info": {"can_cancel": False}} | more


def completed(task: Task) -> JSON:
    usage = {
        "billing_rule": "per_call",
        "credits_reserved": 2,
        "credits_used": 1.5,
        "user_group": "default",
    }
    return document(task, "completed", results=[task.link(0), task.link(1)], usage=usage)


def accepted(task: Task) -> Answer:
    usage = {"billing_rule": "per_call", "credits_reserved": 2, "user_group": "default"}
    return ok(
        document(
            task,
            "pending",
            progress=0,
            task_info={"can_cancel": True, "estimated_time": 45},
            usage=usage,
        )
    )


def failed(code: str) -> Truth:
    return lambda task: document(
        task, "failed", error={"code": code, "message": f"it was {code}", "type": "task_error"}
    )


def with_(**more: Any) -> Truth:
    return lambda task: completed(task) | more


def linked(make: Callable[[Task], JSON]) -> Truth:
    """A completed task, except for fields made of the task's links."""
    return lambda task: completed(task) | make(task)


def foreign(task: Task) -> JSON:
    return completed(task) | {"id": f"{task.id}-of-somebody-else"}


def told(truth: Truth) -> Body:
    return lambda task: json.dumps(truth(task)).encode()


def true(task: Task) -> bytes:
    return told(task.behaviour.truth)(task)


def raw(body: bytes) -> Body:
    return lambda _: body


def twice(task: Task) -> bytes:
    """A document with two statuses."""
    return told(completed)(task)[:-1] + b', "status": "failed"}'


# --- answers
# --------------------------------------------------------------------------------------------------

CUT, HANGS = Answer(0), Answer(0, stalls=True)
NOTHING = Answer(body=b"")


def ok(body: JSON) -> Answer:
    return Answer(body=json.dumps(body).encode(), headers={"content-type": "application/json"})


def error(status: int, code: object, **headers: str) -> Answer:
    body = {"error": {"code": code, "message": f"that was {code}", "type": "some_error"}}
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, json.dumps(body).encode(), {"content-type": "application/json", **names})


def page(status: int) -> Answer:
    body = f"<!DOCTYPE html><html><body><h1>Error {status}</h1>{'<p>cdn</p>' * 400}</body></html>"
    return Answer(status, body.encode(), {"content-type": "text/html"})


def redirected(status: int) -> Step:
    return lambda task: Answer(status, headers={"location": task.forbidden})


def half(step: Callable[[Task], Answer]) -> Step:
    """An answer whose connection ends in the middle."""

    def cut(task: Task) -> Answer:
        whole = step(task)
        return Answer(
            whole.status,
            whole.body[: len(whole.body) // 2],
            whole.headers,
            announced=len(whole.body),
        )

    return cut


def shaped(shape: Shape, step: Callable[[Task], Answer]) -> Step:
    """The same answer in other bytes."""
    return lambda task: replace(step(task), shape=shape)


def asked(truth: Truth) -> Callable[[Task], Answer]:
    return lambda task: ok(truth(task))


# --- files: the faults concern the first result, and the second is always correct
# ------------------------------------------------------


def picture(
    position: int = 0,
    *,
    part: float = 1,
    stalls: bool = False,
    honest: bool = False,
    **headers: str,
) -> File:
    """A part of the image. If `honest`, the content-length is that of the part."""

    def answer(task: Task, _: str) -> Answer:
        whole = task.pictures[position]
        sent = whole[: int(len(whole) * part)]
        names = {
            "content-type": "image/png",
            "etag": '"v1"',
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        return Answer(200, sent, names, None if honest else len(whole), stalls)

    return answer


def shaped_picture(shape: Shape) -> File:
    return lambda task, _: Answer(body=task.pictures[0], shape=shape)


def another(etag: str) -> File:
    """The start of an image that the upstream replaces before the client asks for the rest."""

    def answer(task: Task, _: str) -> Answer:
        old = large(task.number + 7000, task.behaviour.large)  # of the same size in pixels
        return Answer(
            200,
            old[: len(old) // 2],
            {"content-type": "image/png"} | ({"etag": etag} if etag else {}),
            announced=len(old),
        )

    return answer


def misplaced(task: Task, _: str) -> Answer:
    """The whole file, announced as a part."""
    whole = task.pictures[0]
    return Answer(
        206,
        whole,
        {
            "content-type": "image/png",
            "content-range": f"bytes 0-{len(whole) - 1}/{len(whole)}",
            "etag": '"v1"',
        },
    )


def short(task: Task, _: str) -> Answer:
    return Answer(
        200, task.pictures[0], {"content-type": "image/png"}, announced=len(task.pictures[0]) // 2
    )


def leads(where: Callable[[Task], str]) -> File:
    return lambda task, version: (
        None if version == "moved" else Answer(302, headers={"location": where(task)})
    )


def gone(task: Task, version: str) -> Answer | None:
    """No file until the service has queried the upstream again."""
    task.stale = int(version) if task.stale is None else task.stale
    return page(404) if int(version) <= task.stale else None


@dataclass(frozen=True, slots=True)
class Behaviour:
    """A faulty behaviour and its required outcome. Each request gets the next entry of its list.

    `submits` are the answers to submissions, None if accepted. The last one creates the task if it
    is `created`. `when` says when the `callbacks` arrive: `before` the submission's answer, with it
    (`now`), or once the application knows of the task (`submitted`) or of its end (`ended`).
    Queries get `truth` after `queries`. `files` replace the first result, a `large` one, the last
    of them `for_ever`. `status` is that of the answer to a client. `images` says which results are
    kept. `tells` are log lines and operators' events with the task's id.
    """

    submits: tuple[Step | None, ...] = (None,)
    created: bool = True
    when: str = "submitted"
    callbacks: tuple[Body, ...] = (true,)
    at_once: bool = False
    truth: Truth = completed
    queries: tuple[Step, ...] = ()
    files: tuple[File, ...] = ()
    for_ever: bool = False
    makes: Callable[[int, int], bytes] = noise
    large: str = "PNG"
    etag: str = '"v1"'
    state: str = "completed"
    code: str | None = None
    status: int = 200
    images: tuple[int, ...] = (0, 1)
    credits: float | None = 1.5
    tells: tuple[str, ...] = ()
