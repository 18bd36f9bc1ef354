"""Limits on a request's head: a maximum size and a time limit. The rules for connections at a
stop.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from service.web import overload, server, server_protocol
from service.web.overload import PriorityGate
from service.web.server import Server, bind, listening
from tests.callbacks import connected
from tests.waiting import wait_until
from tests.world import World

REQUEST = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.mark.parametrize(
    "start",
    [b"POST /callbacks/", b"GET /healthz HTTP/1.1\r\nx: ", b"GET /healthz HTTP/1.1\r\nhost: x\r\n"],
)
async def test_a_head_without_end_is_no_request(start: bytes, still: World) -> None:
    """The server answers 400 or closes the connection on a path, a header or a list of headers
    without end.
    """
    more = b"x: y\r\n" * 1000 if start.endswith(b"host: x\r\n") else b"a" * 6000
    written = 0
    async with connected(still.url) as (reader, writer):
        writer.write(start)
        for _ in range(10_000):
            writer.write(more)
            written += len(more)
            try:
                await writer.drain()
            except ConnectionError:
                break
            if reader.at_eof():
                break
    assert written < 30_000_000


async def test_a_long_head_that_ends_is_a_request(still: World) -> None:
    """A head of about 50 KiB in many pieces is accepted, several times on one connection."""
    async with connected(still.url) as (reader, writer):
        for _ in range(3):
            writer.write(b"GET /healthz HTTP/1.1\r\nhost: x\r\n")
            for number in range(50):
                writer.write(b"x-%d: %s\r\n" % (number, b"y" * 1000))
                await writer.drain()
            writer.write(b"\r\n")
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
            await reader.readuntil(b"}")


async def test_a_head_that_does_not_come_ends_the_connection(
    still: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time limit runs from the first byte of a head. A complete request has all the time that
    its answer needs.
    """
    monkeypatch.setattr(server_protocol, "HEAD_S", 0.05)
    async with connected(still.url) as (reader, writer):
        writer.write(b"GET /healthz HT")
        assert await reader.read() == b""
    after = (await still.client.get("/v1/events")).json()["next_after"]
    async with connected(still.url) as (reader, writer):
        key = still.client.headers["authorization"]
        writer.write(
            (
                f"GET /v1/events?wait=0.3&after={after} HTTP/1.1\r\nhost: x\r\nauthorization:"
                f" {key}\r\n\r\nGET /hea"
            ).encode()
        )
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")


# --- at a stop
# --------------------------------------------------------------------------------------------------


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[str, Server]]:
    """Yields a server's address and the server, which stops within the block."""
    bound = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    server = Server(Starlette(routes=[Route("/", lambda _: PlainTextResponse("ok"))]), bound, 60)
    async with asyncio.timeout(30), listening(server, asyncio.Event()):
        yield url, server


async def answer(reader: asyncio.StreamReader) -> str:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    assert head.startswith("http/1.1 200 ")
    assert await reader.readexactly(2) == b"ok"
    return head


@pytest.mark.parametrize("begun", [0, 10], ids=["not begun", "begun"])
async def test_the_request_of_a_connection_is_answered_though_it_comes_after_the_stop(
    begun: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection from before the stop may still send its request, because a callback has few
    tries. The answer closes the connection.
    """
    monkeypatch.setattr(server_protocol, "FIRST_S", 60)
    async with serving() as (url, server), connected(url) as (reader, writer):
        (connection,) = await wait_until(lambda: server.server_state.connections)
        writer.write(REQUEST[:begun])
        server.should_exit = True
        await wait_until(lambda: connection._stopping)
        writer.write(REQUEST[begun:])
        assert "connection: close" in await answer(reader)
        assert await reader.read() == b""


async def test_a_connection_that_says_nothing_does_not_hold_up_the_stop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server closes a silent connection after `FIRST_S`, here 0.1 s."""
    monkeypatch.setattr(server_protocol, "FIRST_S", 0.1)
    async with serving() as (url, server), connected(url) as (reader, _):
        await wait_until(lambda: server.server_state.connections)
        server.should_exit = True
        assert await reader.read() == b""


async def test_an_idle_connection_ends_with_the_stop_but_for_a_request_that_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server answers a request that has arrived before the stop. It closes an idle connection
    at once.
    """
    monkeypatch.setattr(server_protocol, "FIRST_S", 60)
    async with (
        serving() as (url, server),
        connected(url) as (reader, writer),
        connected(url) as (idle, asking),
    ):
        for each in (writer, asking):
            each.write(REQUEST)
        for stream in (reader, idle):
            assert "connection: close" not in await answer(stream)
        writer.write(REQUEST)
        for connection in list(server.server_state.connections):
            connection.shutdown()
        assert "connection: close" in await answer(reader)
        assert (await reader.read(), await idle.read()) == (b"", b"")


async def test_a_request_that_waits_in_the_line_is_answered_though_the_stop_comes_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The request arrived before the stop, so the server does not treat its connection as
    silent.
    """
    monkeypatch.setattr(server_protocol, "FIRST_S", 0.01)
    monkeypatch.setattr(overload, "BEGIN_PER_TURN", 0)
    async with serving() as (url, served), connected(url) as (reader, writer):
        gate = served._gate
        (connection,) = await wait_until(lambda: served.server_state.connections)
        writer.write(REQUEST)
        await wait_until(lambda: len(gate._queues[False]) == 1)
        served.should_exit = True
        await wait_until(lambda: connection._stopping)
        await asyncio.sleep(0.1)
        monkeypatch.setattr(overload, "BEGIN_PER_TURN", 100)
        gate._next_turn()
        assert "connection: close" in await answer(reader)
    assert not gate._queues[False]


# --- connections without a request
# ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (b"", b"\r\n"),
        (REQUEST, b"\r\n"),
        (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n", b"rest"),
    ],
    ids=["an empty line", "one after a request", "a body that nobody reads"],
)
async def test_bytes_that_begin_no_request_hold_no_connection(
    first: bytes, then: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that begin no request keep a connection open only as long as an idle one, so they hold
    no descriptor for ever.
    """
    monkeypatch.setattr(server, "KEEP_ALIVE_S", 0.5)
    async with serving() as (url, _), connected(url) as (reader, writer):
        writer.write(first)
        if first:
            await reader.readuntil(b"\r\n\r\n")
        writer.write(then)
        async with asyncio.timeout(10):
            await reader.read()


async def test_a_request_that_fails_to_start_stops_no_request_behind_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The gate starts the queued requests although one of them raised an error while it started."""
    monkeypatch.setattr(overload, "BEGIN_PER_TURN", 1)
    gate, begun = PriorityGate(), list[int]()

    def waiting(number: int) -> Callable[[], None]:
        def begin() -> None:
            begun.append(number)
            if number == 1:
                raise MemoryError

        return begin

    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    passed = [gate.admit(waiting(number), callback=False) for number in range(4)]
    assert passed == [True, False, False, False]
    await wait_until(lambda: begun == [1, 2, 3])
    await asyncio.sleep(0)
    assert gate.admit(waiting(4), callback=False)
