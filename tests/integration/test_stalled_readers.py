"""A reader that takes nothing is ended by the kernel."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from service.web import server
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
    served = Server(Starlette(routes=[Route("/{kind}", answer)]), bound, 60)
    async with asyncio.timeout(60), listening(served, asyncio.Event()):
        yield *bound.getsockname(), served


@asynccontextmanager
async def asking(host: str, port: int, kind: str, *lines: str) -> AsyncIterator[socket.socket]:
    """A connection with a small receive buffer on which this was asked for."""
    loop = asyncio.get_running_loop()
    with socket.socket() as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
        made.setblocking(False)
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
    monkeypatch.setattr(server, "LOST_MS", 600)
    async with (
        serving() as (host, port, served),
        asking(host, port, kind, *lines),
        asking(host, port, kind, *lines) as reader,
    ):
        await asyncio.get_running_loop().sock_recv(reader, 1 << 20)
        await wait_until(lambda: not served.server_state.connections)
        await wait_until(lambda: not served.server_state.tasks)
