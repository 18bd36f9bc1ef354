"""Responses of the upstream, of result hosts and of receivers that break a rule or a usual limit.
Raw bytes over real sockets: what is paid for is stored, and what was received is delivered.
"""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from ipaddress import ip_network
from typing import Any

import pytest

from service.errors import ConnectionLost
from service.images import download_worker
from service.net.egress_client import Egress, Rules
from tests.downloads import bytes_of, quick, steps
from tests.untidy import (
    CODINGS,
    FRAMING,
    LENGTH,
    LIMITS,
    PLAIN,
    RECEIVERS,
    Scripted,
    Shape,
    behind,
    chunks,
    cut,
    packed,
    response,
    scripted,
)
from tests.upstream import picture
from tests.waiting import wait_until
from tests.world import World, world

JSON = dict[str, Any]
ALL = {**LIMITS, **CODINGS, **FRAMING}
LOOPBACK = Rules("sandbox", networks=(ip_network("127.0.0.0/8"),))
SECOND = response(LENGTH)(b'{"id": "smuggled"}')


@pytest.fixture(scope="module")
async def server() -> AsyncIterator[Scripted]:
    async with scripted(Scripted(picture())) as made:
        yield made


@pytest.fixture(scope="module")
async def here(server: Scripted, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    folder = tmp_path_factory.mktemp("untidy")
    settings: JSON = {
        "evolink_base_url": server.url,
        "reconcile_after_s": 600,
        "submit_timeout_s": 2,
        "query_timeout_s": 2,
        "delivery_schedule": "600",
    }
    with quick():
        async with world(folder, **settings) as made:
            yield made


def named(kind: str) -> str:
    """A prompt, which is also a part of a URL."""
    return re.sub("[^a-zA-Z0-9]", "-", kind)


async def completed(here: World, server: Scripted, name: str) -> JSON:
    """A task in its end, after its submission, a callback, a query, and a download."""
    task = await here.submit(prompt=name, callback_url=f"{server.url}/hooks/{name}")
    assert task["state"] == "submitted", await here.steps(task["id"])
    body = {"id": task["upstream_id"], "status": "completed"}
    said = await here.stranger.post(here.callback_url(task["id"]), json=body)
    assert said.status_code == 200
    return await here.ended(task["id"])


async def delivery(here: World, task: JSON) -> JSON:
    """The delivery of a task's terminal event, after its first attempt."""

    listed = await here.client.get("/v1/deliveries", params={"task": task["id"]})
    url = f"/v1/deliveries/{listed.json()['data'][0]['id']}"

    async def attempted() -> bool:
        return bool((await here.client.get(url)).json()["attempts"])

    await wait_until(attempted)
    found: JSON = (await here.client.get(url)).json()  # the first may be of two moments
    return found


@pytest.mark.parametrize("kind", ALL)
async def test_an_untidy_response_is_read(kind: str, here: World, server: Scripted) -> None:
    """The submission is accepted, the first query settles the task, the first download stores the
    image, and the first attempt delivers the event. An untidy response leaves no connection.
    """
    name, reused = named(kind), len(server.reused)
    for place in ("submission", "query", "picture", "receiver"):
        server.shapes[place, name] = ALL[kind]
    task = await completed(here, server, name)
    assert task["state"] == "completed", await here.steps(task["id"])
    assert await bytes_of(here, task["images"][0]) == picture()
    assert [step for step, _ in await steps(here, task)] == ["image.stored"]
    assert (await delivery(here, task))["state"] == "delivered"
    for place in ("submission", "query", "picture", "receiver"):
        assert server.asked.count((place, name)) == 1, place
    assert server.reused[reused:] == []


@pytest.mark.parametrize("kind", RECEIVERS)
async def test_the_status_line_decides_a_delivery(kind: str, here: World, server: Scripted) -> None:
    """A 2xx is delivered at once, whatever follows its status line. No more than 2 KiB and one
    second of its body are waited for.
    """
    name, reused, started = named(kind), len(server.reused), time.monotonic()
    server.shapes["receiver", name] = RECEIVERS[kind]
    found = await delivery(here, await completed(here, server, name))
    assert (found["state"], server.asked.count(("receiver", name))) == ("delivered", 1)
    (attempt,) = found["attempts"]
    assert (attempt["status"] // 100, attempt["error"]) == (2, None)
    assert attempt["duration_ms"] < 8000
    assert len(attempt["answer"]) <= 2048
    assert time.monotonic() - started < 30
    assert server.reused[reused:] == []


@pytest.mark.parametrize(
    ("status", "state"), [("500 No", "pending"), ("302 Found", "pending"), ("410 Gone", "dead")]
)
async def test_a_status_that_is_no_success_still_fails(
    status: str, state: str, here: World, server: Scripted
) -> None:
    """An untidy failure is a failure, with its status and the beginning of its body."""
    name = named(status)
    server.shapes["receiver", name] = Shape(cut(response(LENGTH, LENGTH, status=status)), ends=True)
    found = await delivery(here, await completed(here, server, name))
    assert found["state"] == state
    assert [attempt["status"] for attempt in found["attempts"]] == [int(status[:3])]


@pytest.mark.parametrize(
    "shape",
    {
        "closed": Shape(cut(PLAIN), ends=True),
        "open": Shape(cut(PLAIN)),
        "chunked": Shape(packed(chunks(last=b"9\r\n"), response("Transfer-Encoding: chunked"))),
    }.items(),
    ids=lambda case: case[0],
)
async def test_a_whole_object_in_a_cut_response_counts(
    shape: tuple[str, Shape], here: World, server: Scripted
) -> None:
    """A JSON object ends with its last bracket. The submission is accepted and the query settles
    the task, although the connection ended, or fell silent, before the announced end.
    """
    name = f"whole-{shape[0]}"
    for place in ("submission", "query"):
        server.shapes[place, name] = shape[1]
    task = await completed(here, server, name)
    assert task["state"] == "completed", await here.steps(task["id"])
    assert [server.asked.count((place, name)) for place in ("submission", "query")] == [1, 1]


@pytest.mark.parametrize("ends", [True, False])
async def test_an_image_whose_length_is_always_wrong_is_stored(
    ends: bool, here: World, server: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two downloads that break off are repeated. The third is stored if its bytes are a whole
    image.
    """
    monkeypatch.setattr(download_worker, "IDLE_S", 0.6)
    server.shapes["picture", f"long-{ends}"] = Shape(cut(PLAIN), ends=ends)
    task = await completed(here, server, f"long-{ends}")
    assert task["state"] == "completed", await here.steps(task["id"])
    assert await bytes_of(here, task["images"][0]) == picture()
    assert [step for step, _ in await steps(here, task)] == ["image.retry"] * 2 + ["image.stored"]


async def test_an_image_that_is_always_cut_is_asked_for_again(
    here: World, server: Scripted
) -> None:
    """A part of an image is never stored, and never final: the rest may come later."""
    whole = picture()
    name, tries = "half", 0

    def write(body: bytes) -> bytes:
        nonlocal tries
        tries += 1
        return PLAIN(body)[: -len(whole) // 2] if tries < 6 else PLAIN(body)

    server.shapes["picture", name] = Shape(write, ends=True)
    task = await completed(here, server, name)
    assert (task["state"], tries) == ("completed", 6)
    assert await bytes_of(here, task["images"][0]) == whole


@pytest.mark.parametrize(
    "lines",
    [
        ("Content-Length: 2", "Content-Length: 3"),
        ("Content-Length: 2, 3",),
        ("Content-Length: +2",),
        ("Content-Length: 2 3",),
        ("Content-Length:",),
        ("Content-Length: " + "9" * 5000,),
    ],
)
async def test_a_body_without_one_reading_is_not_read(
    lines: tuple[str, ...], server: Scripted
) -> None:
    """The response has its status and no body. Its connection is closed."""
    server.shapes["receiver", "two"] = Shape(response(*lines))
    async with Egress(LOOPBACK, keep_alive=60) as egress:
        for _ in range(2):
            before = server.connections
            got = await egress.request("POST", f"{server.url}/hooks/two", timeout=5)
            assert (got.status, got.body, type(got.failure)) == (200, b"", ConnectionLost)
            assert server.connections == before + 1
    assert server.reused == []


@pytest.mark.parametrize(
    "shape",
    [
        Shape(behind(PLAIN, SECOND)),
        Shape(behind(response(LENGTH, status="204 No"), SECOND)),
        Shape(behind(packed(chunks(), response("Transfer-Encoding: chunked")), SECOND)),
        Shape(behind(packed(chunks(), response("Transfer-Encoding: chunked", LENGTH)), SECOND)),
        Shape(behind(response(LENGTH, LENGTH), SECOND)),
        Shape(behind(response(LENGTH, "a b: c\r\n d"), SECOND)),
        Shape(behind(response(LENGTH, status="101 Switching"), SECOND)),
    ],
)
async def test_a_smuggled_response_answers_no_request(shape: Shape, server: Scripted) -> None:
    """Bytes behind a response are dropped with their connection. The next request goes over another
    one and gets its own response.
    """
    server.shapes["receiver", "first"] = shape
    async with Egress(LOOPBACK, keep_alive=60) as egress:
        for _ in range(3):
            before = server.connections
            try:
                await egress.request("POST", f"{server.url}/hooks/first", timeout=5)
            except ConnectionLost:
                assert b" 101 " in shape.write(b"")
            got = await egress.request("POST", f"{server.url}/hooks/second", timeout=5)
            assert (got.status, got.body, got.failure) == (200, b"ok", None)
            assert server.connections > before
    assert server.reused == []


async def test_bytes_that_come_later_close_an_idle_connection() -> None:
    """The response was tidy, so its connection is kept. Then the server sends another one that was
    not asked for.
    """
    late = asyncio.Event()
    left = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(PLAIN(b"ok"))
        await late.wait()
        writer.write(SECOND)
        assert await reader.read() == b""
        left.set()
        writer.close()

    made = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = "http://127.0.0.1:{1}".format(*made.sockets[0].getsockname())
    async with made, Egress(LOOPBACK, keep_alive=60) as egress:
        assert (await egress.request("POST", url, timeout=5)).body == b"ok"
        late.set()
        await asyncio.wait_for(left.wait(), 30)


@pytest.mark.parametrize("kind", [kind for kind in ALL if ALL[kind].tidy])
async def test_a_tidy_response_keeps_its_connection(kind: str) -> None:
    """A limit that is only usual costs no connection."""
    async with scripted(Scripted(picture())) as server, Egress(LOOPBACK, keep_alive=60) as egress:
        server.shapes["receiver", "tidy"] = ALL[kind]
        for _ in range(3):
            got = await egress.request("POST", f"{server.url}/hooks/tidy", timeout=30)
            assert (got.status, got.failure) == (200, None)
        assert server.connections == 1


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
@pytest.mark.parametrize("kind", [*FRAMING, "a chunk's extension of 9,000 bytes"])
async def test_a_response_may_come_in_pieces_of_any_size(kind: str, size: int) -> None:
    """The borders of packets change nothing."""
    wire = ALL[kind].write(b'{"id": "x", "of": "some bytes"}')

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for at in range(0, len(wire), size):
            writer.write(wire[at : at + size])
            await asyncio.sleep(0)
        writer.close()

    made = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = "http://127.0.0.1:{1}".format(*made.sockets[0].getsockname())
    async with made, Egress(LOOPBACK) as egress:
        got = await egress.request("GET", url, timeout=5)
    assert (got.status, json.loads(got.body)["id"], got.failure) == (200, "x", None)


@pytest.mark.parametrize(
    "hostile",
    [b"HTTP/1.1 200 OK\r\n", b"", b"X: 1\r\n" * 400, b"HTTP/1.1 100\r\n\r\n"],
    ids=["a head", "no status line", "lines", "interim responses"],
)
async def test_an_endless_head_is_left_at_its_limit(hostile: bytes) -> None:
    """The client keeps at most a mebibyte and a thousand lines of the heads of a response, and
    closes the connection.
    """
    sent = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        try:
            writer.write(hostile)
            while True:
                piece = hostile * 1000 if b"100" in hostile else b"X: " + b"x" * 65_000
                writer.write(piece)
                sent += len(piece)
                await writer.drain()
        except ConnectionError:
            writer.close()

    made = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = "http://127.0.0.1:{1}".format(*made.sockets[0].getsockname())
    async with made, Egress(LOOPBACK) as egress:
        started = time.monotonic()
        try:
            got = await egress.request("GET", url, timeout=10)
        except ConnectionLost:
            assert not hostile.startswith(b"HTTP/1.1 200")
        else:
            assert (got.status, got.body, type(got.failure)) == (200, b"", ConnectionLost)
        assert time.monotonic() - started < 8
        assert sent < 20 << 20  # most of it is in the kernel's buffers
