"""A reader that takes nothing is ended, and one that reads slowly is not."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from service.web import key_shares, server_protocol
from service.web.server import Server, bind, listening
from tests.waiting import wait_until

LENGTH = 30 << 20  # more than the kernel holds of a connection
KINDS = ("whole", "pieces", "endless")


async def answer(request: Request) -> Response:
    async def pieces() -> AsyncIterator[bytes]:
        sent = 0
        while kind == "endless" or sent < LENGTH:
            await asyncio.sleep(0)
            yield bytes(1 << 18)
            sent += 1 << 18

    kind = request.path_params["kind"]
    if kind == "whole":
        return Response(bytes(LENGTH))
    return StreamingResponse(pieces(), headers={"content-type": "text/event-stream"})


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[str, int, Server]]:
    bound = bind("127.0.0.1", 0)
    server = Server(Starlette(routes=[Route("/{kind}", answer)]), bound, 60)
    async with asyncio.timeout(60), listening(server, asyncio.Event()):
        yield *bound.getsockname(), server


@asynccontextmanager
async def asking(
    host: str, port: int, kind: str, *lines: str, source: str = "127.0.0.1"
) -> AsyncIterator[socket.socket]:
    """A connection with a small receive buffer on which this was asked for."""
    loop = asyncio.get_running_loop()
    with socket.socket() as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
        made.setblocking(False)
        made.bind((source, 0))
        await loop.sock_connect(made, (host, port))
        head = "\r\n".join([f"GET /{kind} HTTP/1.1", "host: x", *lines, "", ""])
        await loop.sock_sendall(made, head.encode())
        yield made


@pytest.mark.parametrize("lines", [(), ("connection: close",)], ids=["kept", "close"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_reader_that_takes_nothing_is_ended(
    kind: str, lines: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that has read a part. The connection and the request that it has are gone."""
    monkeypatch.setattr(server_protocol, "WRITE_S", 0.6)
    async with (
        serving() as (host, port, server),
        asking(host, port, kind, *lines),
        asking(host, port, kind, *lines) as reader,
    ):
        await asyncio.get_running_loop().sock_recv(reader, 1 << 20)
        await wait_until(lambda: not server.server_state.connections)
        await wait_until(lambda: not server.server_state.tasks)


async def test_readers_that_are_slow_get_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """They pause for less than the limit, and need several times the limit in all."""
    monkeypatch.setattr(server_protocol, "WRITE_S", 3.0)
    loop = asyncio.get_running_loop()

    async def read(host: str, port: int, kind: str) -> None:
        seen = 0
        async with asking(host, port, kind) as reader:
            for _ in range(8):
                for _ in range(8):
                    seen += len(await loop.sock_recv(reader, 1 << 18))
                await asyncio.sleep(0.5)
            while seen < LENGTH:
                data = await loop.sock_recv(reader, 1 << 20)
                assert data
                seen += len(data)

    async with serving() as (host, port, _):
        await asyncio.gather(*(read(host, port, kind) for kind in KINDS[:2]))


async def test_what_is_left_of_the_last_answer_keeps_no_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The end of an answer may be unsent although the answer is complete for the application."""
    monkeypatch.setattr(server_protocol, "WRITE_S", 0.4)

    class Unsent:
        """A transport whose reader takes nothing of the last bytes."""

        def __init__(self) -> None:
            self.aborted = False

        def __getattr__(self, name: str) -> object:
            answers = {"get_write_buffer_size": 100, "is_closing": False, "get_extra_info": reader}
            return lambda *_: answers[name]

        def abort(self) -> None:
            self.aborted = True

    async with serving() as (host, port, server), asking(host, port, "none") as reader:
        (connection,) = await wait_until(lambda: server.server_state.connections)
        assert await asyncio.get_running_loop().sock_recv(reader, 9) == b"HTTP/1.1 "
        real, connection.transport = connection.transport, Unsent()
        connection.on_response_complete()
        await wait_until(lambda: connection.transport.aborted)
        connection.transport = real


# --- the bytes of all connections
# --------------------------------------------------------------------------------------------------


async def stalled(
    stack: AsyncExitStack, host: str, port: int, kind: str, count: int, source: str = "127.0.0.1"
) -> list[socket.socket]:
    return [
        await stack.enter_async_context(asking(host, port, kind, source=source))
        for _ in range(count)
    ]


async def taken(reader: socket.socket, most: int = LENGTH) -> int:
    """The bytes that the reader gets before its connection ends, up to so many or a few more."""
    loop, seen = asyncio.get_running_loop(), 0
    with suppress(ConnectionError):
        while seen < most and (part := await loop.sock_recv(reader, 1 << 20)):
            seen += len(part)
    return seen


@pytest.mark.parametrize("kind", KINDS)
async def test_the_bytes_that_all_readers_leave_have_a_limit(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connections of the address that leaves the most end. A slow reader of another address, which
    came first, gets more of its answer.
    """
    monkeypatch.setattr(key_shares, "MAX_UNSENT", 2 * LENGTH if kind == "whole" else 1 << 18)
    ended, abort = list[str](), server_protocol.BoundedProtocol.abort

    def noted(self: server_protocol.BoundedProtocol) -> None:
        ended.append(self.address)
        abort(self)

    monkeypatch.setattr(server_protocol.BoundedProtocol, "abort", noted)
    async with serving() as (host, port, server), AsyncExitStack() as stack:
        held = server._unsent
        (other,) = await stalled(stack, host, port, kind, 1, "127.0.0.2")
        await wait_until(lambda: held.total)
        await stalled(stack, host, port, kind, 12)
        await wait_until(lambda: ended)
        assert held.total <= key_shares.MAX_UNSENT
        assert set(ended) == {"127.0.0.1"}
        assert await taken(other, 8 << 20) >= 8 << 20
    assert (held.total, held._sizes) == (0, {})


async def test_the_slowest_readers_of_an_address_end_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that takes its answer holds nothing."""
    monkeypatch.setattr(key_shares, "MAX_UNSENT", LENGTH * 5 // 2)
    async with serving() as (host, port, server), AsyncExitStack() as stack:
        (first,) = await stalled(stack, host, port, "whole", 1)
        await wait_until(lambda: len(server._unsent._sizes) == 1)
        (last, _) = await stalled(stack, host, port, "whole", 2)
        await wait_until(lambda: len(server.server_state.connections) == 2)
        assert await taken(last) >= LENGTH
        await wait_until(lambda: len(server._unsent._sizes) == 1)
        assert await taken(first) < LENGTH
