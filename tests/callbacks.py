"""Callbacks that tests send, and checks of their effects."""

import asyncio
import json
import socket
import tarfile
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.queue import worker
from service.tasks.callbacks import Callback, Verdict
from service.tasks.inbox_worker import InboxWorker
from tests.upstream import Upstream
from tests.waiting import wait_until
from tests.world import World, world

LIMIT = 256 * 1024
SUITE = Path(__file__).parent / "fixtures" / "json_test_suite.tar.xz"


@asynccontextmanager
async def quick_world(folder: Path, upstream: Upstream) -> AsyncIterator[World]:
    """A world in which only callbacks lead to queries. Workers look for due work sooner than in
    production.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "LOOK_S", 0.05)
        async with world(folder, upstream=upstream.app, reconcile_after_s=600) as made:
            yield made


@cache
def json_test_suite() -> dict[str, bytes]:
    """The public JSON test suite, by name. `y_` files are JSON and `n_` files are not. A parser may
    accept or reject `i_` files.

    The suite is by Nicolas Seriot (https://github.com/nst/JSONTestSuite, folder `test_parsing`),
    under the MIT licence in the archive.
    """
    with tarfile.open(SUITE) as archive:
        return {
            member.name.removeprefix("test_parsing/"): content(archive, member)
            for member in archive
            if "/" in member.name
        }


def content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None
    return file.read()


def said(task: dict[str, Any], status: str, **more: Any) -> bytes:
    return json.dumps({"id": task["upstream_id"], "status": status, **more}).encode()


# Verdicts of this process that no test has asked for yet, by task and digest of the body.
VERDICTS: dict[tuple[str, str], asyncio.Queue[str]] = defaultdict(asyncio.Queue)
_report = InboxWorker._report


def _record(inbox: InboxWorker, callback: Callback, verdict: Verdict) -> None:
    _report(inbox, callback, verdict)
    VERDICTS[callback.task_id, callback.digest].put_nowait(verdict.verdict)


setattr(InboxWorker, "_report", _record)  # noqa: B010


async def call(
    here: World, task: dict[str, Any] | str, body: bytes, **headers: str
) -> httpx.Response:
    """The answer to a callback, once a worker has judged it."""
    answer, _ = await _called(here, task, body, headers)
    return answer


async def verdict(here: World, task: dict[str, Any] | str, body: bytes, **headers: str) -> str:
    """The verdict on a callback that the service answers with 200."""
    answer, word = await _called(here, task, body, headers)
    assert answer.status_code == 200, answer.text
    assert answer.json() == {"status": "accepted"}
    return word


async def _called(
    here: World, task: dict[str, Any] | str, body: bytes, headers: dict[str, str]
) -> tuple[httpx.Response, str]:
    task_id = task if isinstance(task, str) else task["id"]
    url = here.callback_url(task_id)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    answer = await here.stranger.post(url, content=body, headers=headers)
    return answer, await judged(task_id, body) if answer.status_code == 200 else ""


async def judged(task_id: str, body: bytes) -> str:
    """The verdict on a callback that was accepted."""
    async with asyncio.timeout(30):
        return await VERDICTS[task_id, sha256(body).hexdigest()].get()


async def heard(here: World, task: dict[str, Any]) -> list[tuple[str, str | None, int]]:
    """The callbacks in the task's timeline, each with verdict, status and count."""
    steps = await here.steps(task["id"])
    return [
        (step["verdict"], step["status"], step["count"])
        for step in steps
        if step["step"] == "callback.received"
    ]


async def types(here: World, task: dict[str, Any]) -> list[str]:
    return [event["type"] for event in await here.events(task=task["id"])]


def counted(here: World, verdict: str) -> float:
    return (
        here.context.resources.metrics.registry.get_sample_value(
            "darkroom_callbacks_total", {"verdict": verdict}
        )
        or 0
    )


async def asked(upstream: Upstream, task: dict[str, Any], times: int = 1) -> None:
    await wait_until(lambda: upstream.asked[task["upstream_id"]] >= times)


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection that is aborted at the end of the block, with or without unsent bytes."""
    target = httpx.URL(url)
    reader, writer = await asyncio.open_connection(target.host, target.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        with suppress(OSError):
            await writer.wait_closed()


async def raw(
    url: str, *parts: bytes, method: str = "POST", headers: str = ""
) -> tuple[int, dict[str, str], bytes]:
    """Sends the parts of a body one after another and returns status, headers and body of the
    answer. The server may answer and close before it has read all parts: what it sent can be read
    although the rest of the body cannot be sent any more.
    """
    target, loop, received = httpx.URL(url), asyncio.get_running_loop(), b""
    path = target.raw_path.decode()
    start = f"{method} {path} HTTP/1.1\r\nhost: here\r\n{headers}\r\n".encode()
    with socket.create_connection((target.host, target.port)) as connection:
        connection.setblocking(False)

        async def send() -> None:
            for part in (start, *parts):
                await loop.sock_sendall(connection, part)

        async def receive() -> None:
            nonlocal received
            more = await loop.sock_recv(connection, 65536)
            assert more, f"the connection ended after {received!r}"
            received += more

        sending = asyncio.create_task(send())
        try:
            while b"\r\n\r\n" not in received:
                await receive()
            head, _, received = received.partition(b"\r\n\r\n")
            status, *lines = head.decode().lower().split("\r\n")
            named = dict(line.split(": ", 1) for line in lines)
            while len(received) < (length := int(named["content-length"])):
                await receive()
            return int(status.split()[1]), named, received[:length]
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)


def chunk(data: bytes) -> bytes:
    """A chunk of a chunked body. Empty data makes the last chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)
