"""What may be sent before there is a request: the head has an end, in bytes and in seconds."""

import pytest

from service.web import protocol
from tests.callbacks import connected
from tests.world import World


@pytest.mark.parametrize("start", [b"POST /callbacks/", b"GET /healthz HTTP/1.1\r\nx: ", b"GET /healthz HTTP/1.1\r\nhost: x\r\n"])
async def test_a_head_without_end_is_no_request(start: bytes, still: World) -> None:
    """A path, a header or headers that go on and on: 400 or the end of the connection, after some hundred kilobytes at most."""
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
    """Up to 64 KiB, however it is cut, and as often as a connection is used."""
    async with connected(still.url) as (reader, writer):
        for _ in range(3):
            writer.write(b"GET /healthz HTTP/1.1\r\nhost: x\r\n")
            for number in range(50):
                writer.write(b"x-%d: %s\r\n" % (number, b"y" * 1000))
                await writer.drain()
            writer.write(b"\r\n")
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
            await reader.readuntil(b"}")


async def test_a_head_that_does_not_come_ends_the_connection(still: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time counts from its first byte; a request that came whole has all the time its answer needs."""
    monkeypatch.setattr(protocol, "HEAD_S", 0.05)
    async with connected(still.url) as (reader, writer):
        writer.write(b"GET /healthz HT")
        assert await reader.read() == b""
    after = (await still.client.get("/v1/events")).json()["next_after"]
    async with connected(still.url) as (reader, writer):
        key = still.client.headers["authorization"]
        writer.write(f"GET /v1/events?wait=0.3&after={after} HTTP/1.1\r\nhost: x\r\nauthorization: {key}\r\n\r\nGET /hea".encode())
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
