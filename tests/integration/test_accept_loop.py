"""The accept loop resets no connection, and a stop answers every request that arrived before it."""

import asyncio
import errno
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from service.web import server as servers
from service.web.server import Server, bind, listening
from tests.callbacks import connected
from tests.waiting import wait_until

REQUEST = b"GET /%d HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
MANY = 50


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[str, Server, list[int]]]:
    """Yields an address, its server, and the numbers in the paths of the requests that arrived."""
    seen = list[int]()

    async def answer(request: Request) -> PlainTextResponse:
        seen.append(request.path_params["number"])
        return PlainTextResponse("yes")

    bound = bind("127.0.0.1", 0)
    server = Server(Starlette(routes=[Route("/{number:int}", answer)]), bound, 60)
    async with asyncio.timeout(60), listening(server, asyncio.Event()):
        await wait_until(lambda: server.started and hasattr(server, "_accept_loop"))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}", server, seen


def sent(stack: AsyncExitStack, url: str, request: bytes) -> socket.socket:
    """Opens a connection and sends the request before the event loop of this test sees either."""
    host, port = url.removeprefix("http://").split(":")
    made = stack.enter_context(socket.create_connection((host, int(port))))
    made.sendall(request)
    made.setblocking(False)
    return made


async def answered(connection: socket.socket) -> bool:
    loop, got = asyncio.get_running_loop(), b""
    while more := await loop.sock_recv(connection, 65536):
        got += more
    return got.startswith(b"HTTP/1.1 200 ") and got.endswith(b"yes")


async def test_all_of_a_burst_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The burst is larger than the number of connections that the loop accepts in one turn."""
    monkeypatch.setattr(servers, "ACCEPT_PER_TURN", 20)
    async with serving() as (url, _, seen), AsyncExitStack() as stack:
        connections = [sent(stack, url, REQUEST % number) for number in range(MANY)]
        assert (
            await asyncio.gather(*(answered(connection) for connection in connections))
            == [True] * MANY
        )
        assert sorted(seen) == list(range(MANY))


async def test_a_request_sent_before_the_stop_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stop comes before the server has accepted the connection."""
    monkeypatch.setattr(servers, "ACCEPT_PER_TURN", 20)
    async with serving() as (url, server, seen), AsyncExitStack() as stack:
        connections = [sent(stack, url, REQUEST % number) for number in range(MANY)]
        await server._accept_loop.close()
        server.should_exit = True
        assert (
            await asyncio.gather(*(answered(connection) for connection in connections))
            == [True] * MANY
        )
        assert sorted(seen) == list(range(MANY))


async def test_more_connections_than_the_process_may_hold_wait_with_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel resets no connection. The server accepts the waiting one when another ends."""
    monkeypatch.setattr(servers, "max_connections", lambda: 2)
    async with serving() as (url, server, _), AsyncExitStack() as stack:
        async with connected(url), connected(url):
            await wait_until(lambda: len(server.server_state.connections) == 2)
            third = sent(stack, url, REQUEST % 3)
            await wait_until(lambda: server._accept_loop._retry)
            assert len(server.server_state.connections) == 2
        assert await answered(third)


class Short:
    """A listening socket whose process has no free descriptor for the given number of calls."""

    def __init__(self, bound: socket.socket, times: int) -> None:
        self.bound, self.times = bound, times

    def fileno(self) -> int:
        return self.bound.fileno()

    def accept(self) -> tuple[socket.socket, object]:
        if self.times:
            self.times -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return self.bound.accept()


async def test_when_descriptors_are_used_up_it_looks_again() -> None:
    """A stop still works while the loop waits for a free descriptor."""
    async with serving() as (url, server, _), AsyncExitStack() as stack:
        accept_loop = server._accept_loop
        accept_loop._bound = short = Short(accept_loop._bound, 2)  # type: ignore[assignment]
        assert await answered(sent(stack, url, REQUEST % 1))
        assert short.times == 0
        short.times = 1
        connected = sent(stack, url, REQUEST % 2)
        await wait_until(lambda: not short.times)
        assert await answered(connected)
        short.times = 1000
        sent(stack, url, REQUEST % 3)
        await wait_until(lambda: short.times < 1000)


async def test_a_connection_that_has_gone_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client closes the connection after the accept and before the transport is ready."""
    async with serving() as (url, server, _), AsyncExitStack() as stack:
        loop = asyncio.get_running_loop()
        opened, failed = loop.connect_accepted_socket, list[socket.socket]()

        async def gone(make: object, taken: socket.socket) -> object:
            if not failed:
                failed.append(taken)
                raise OSError(errno.ENOTCONN, "not connected")
            return await opened(make, taken)  # type: ignore[arg-type]

        monkeypatch.setattr(server._accept_loop._loop, "connect_accepted_socket", gone)
        sent(stack, url, REQUEST % 1)
        await wait_until(lambda: failed and failed[0].fileno() == -1)
        assert await answered(sent(stack, url, REQUEST % 2))
