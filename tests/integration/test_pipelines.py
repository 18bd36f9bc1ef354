"""Requests that a client sends without waiting for the answers before. A connection holds few of
them at a time, and each of them passes the gate.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from service.web import server_protocol
from service.web.overload import PriorityGate
from service.web.server import Server, bind, listening
from service.web.server_protocol import MAX_HEADERS, SLICE
from tests.callbacks import connected
from tests.waiting import wait_until

GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


@asynccontextmanager
async def serving(release: asyncio.Event | None = None) -> AsyncIterator[tuple[str, Server]]:
    """A server that answers with the body of the request, and with `/slow` after the release."""

    async def echo(request: Request) -> Response:
        if request.url.path == "/slow" and release:
            await release.wait()
        return Response(await request.body() or b"none")

    async def unread(_: Request) -> Response:
        return PlainTextResponse("unread")

    routes = [Route("/unread", unread, methods=["POST"])]
    routes.append(Route("/{path:path}", echo, methods=["GET", "POST"]))
    bound = bind("127.0.0.1", 0)
    made = Server(Starlette(routes=routes), bound, 60)
    async with asyncio.timeout(60), listening(made, asyncio.Event()):
        yield f"http://127.0.0.1:{bound.getsockname()[1]}", made


async def answers(reader: asyncio.StreamReader, count: int) -> list[bytes]:
    found = []
    for _ in range(count):
        head = await reader.readuntil(b"\r\n\r\n")
        length = head.partition(b"content-length: ")[2].partition(b"\r\n")[0]
        found.append(await reader.readexactly(int(length)))
    return found


async def test_a_connection_holds_few_requests_that_wait() -> None:
    """The rest stays unparsed, and then in the kernel. All are answered in the end."""
    count, release = 3_000, asyncio.Event()
    large = GET[:-2] + b"padding: %s\r\n\r\n" % (b"x" * 250)
    async with serving(release) as (url, served), connected(url) as (reader, writer):
        writer.write(GET.replace(b"/ ", b"/slow ") + large * count)
        (connection,) = await wait_until(lambda: served.server_state.connections)
        await wait_until(lambda: connection.pipeline)
        await asyncio.sleep(0.1)
        assert 0 < len(connection.pipeline) <= SLICE // len(large) + 1
        assert len(connection._behind) < 1 << 19
        release.set()
        for _ in range(count // 100):
            assert len(await answers(reader, 100)) == 100
            assert len(connection.pipeline) <= SLICE // len(large) + 1
            assert len(connection._behind) < 1 << 19
        assert await answers(reader, 1) == [b"none"]


async def test_every_request_of_a_connection_passes_the_gate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A callback as one."""
    asked, admit = list[bool](), PriorityGate.admit

    def counted(gate: PriorityGate, begin: object, *, callback: bool) -> bool:
        asked.append(callback)
        return admit(gate, begin, callback=callback)  # type: ignore[arg-type]

    monkeypatch.setattr(PriorityGate, "admit", counted)
    call = b"POST /callbacks/a/b/c HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n\r\n1"
    async with serving() as (url, _), connected(url) as (reader, writer):
        writer.write(GET * 3 + call + GET)
        assert await answers(reader, 5) == [b"none"] * 3 + [b"1", b"none"]
    assert asked == [False] * 3 + [True, False]


@pytest.mark.parametrize("slice", [1, 7, 100, 4096])
async def test_bodies_between_requests_arrive_whole(
    slice: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a body or a head is cut, and where the application reads no body."""
    monkeypatch.setattr(server_protocol, "SLICE", slice)
    bodies = [b"a", b"b" * 5000, b"", b"c" * 100_000, b"d"]

    def post(path: bytes, body: bytes) -> bytes:
        return b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (
            path,
            len(body),
            body,
        )

    chunked = (
        b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
    )
    async with serving() as (url, _), connected(url) as (reader, writer):
        writer.write(b"".join(post(b"/", body) + post(b"/unread", body) for body in bodies))
        writer.write(chunked + GET)
        expected = [each for body in bodies for each in (body or b"none", b"unread")]
        assert await answers(reader, 12) == [*expected, b"ok", b"none"]


async def test_a_client_that_leaves_takes_its_requests_along() -> None:
    release = asyncio.Event()
    async with serving(release) as (url, served):
        async with connected(url) as (_, writer):
            writer.write(GET.replace(b"/ ", b"/slow ") + GET * 5000)
            (connection,) = await wait_until(lambda: served.server_state.connections)
            await wait_until(lambda: connection.pipeline)
        release.set()
        await wait_until(lambda: not served.server_state.connections)
        await wait_until(lambda: not served.server_state.tasks)


@pytest.mark.parametrize("name", [b"a", b"x-forwarded-for", b"cookie"])
async def test_a_request_has_a_limited_number_of_headers(name: bytes) -> None:
    """Each look for a header would walk through all of them."""
    async with serving() as (url, _):
        for count, expected in ((MAX_HEADERS, b"200"), (MAX_HEADERS + 1, b"400")):
            async with connected(url) as (reader, writer):
                lines = b"".join(b"%s: 1\r\n" % name for _ in range(count - 1))
                writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n" + lines + b"\r\n")
                answer = await reader.readuntil(b"\r\n\r\n")
                assert answer.split()[1] == expected
                if expected == b"400":
                    error = json.loads(await reader.read())["error"]
                    assert error["message"] == "The request has more than 100 headers."


async def test_a_request_that_cannot_be_parsed_gets_an_error_with_its_id() -> None:
    async with serving() as (url, _), connected(url) as (reader, writer):
        writer.write(b"FOO / HTTP/1.1\r\nhost: x\r\n\r\n")
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        error = json.loads(await reader.read())["error"]
    assert head.startswith("HTTP/1.1 400 ")
    assert f"x-request-id: {error['request_id']}\r\n" in head
    assert error["code"] == "invalid_request"
    assert {"type", "param", "task_id"} <= error.keys()
