"""Requests that offer to upgrade the connection are answered as without the offer (RFC 9110, 7.8).
Java's HttpClient and Spring's RestClient offer h2c on every plain connection.
"""

import asyncio
import json
from typing import Any

import pytest

from service.web import server_protocol
from tests.api import SUBMIT, got, order, submitted
from tests.callbacks import connected, judged
from tests.world import ADMIN_KEY, World

JSON = dict[str, Any]
JAVA = (
    "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    "HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"
)
OFFERS = {
    "java": JAVA,
    "small": "connection: upgrade,http2-settings\r\nupgrade: H2C\r\nhttp2-settings: AAMA\r\n",
    "two lines": "Connection: keep-alive\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n",
    "websocket": (
        "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    ),
    "tls": "Upgrade: TLS/1.0, HTTP/1.1\r\nConnection: Upgrade\r\n",
    "several": "Upgrade: h2c, websocket\r\nUpgrade: IRC/6.9\r\nConnection: x, UPGRADE\r\n",
}


def by_length(body: bytes) -> tuple[str, list[bytes]]:
    return f"Content-Length: {len(body)}\r\n", [body]


def in_chunks(body: bytes) -> tuple[str, list[bytes]]:
    chunks = [b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:7], body[7:])]
    return "Transfer-Encoding: chunked\r\n", [*chunks, b"0\r\n\r\n"]


def byte_by_byte(body: bytes) -> tuple[str, list[bytes]]:
    return f"Content-Length: {len(body)}\r\n", [body[at : at + 1] for at in range(len(body))]


def after_100(body: bytes) -> tuple[str, list[bytes]]:
    return f"Content-Length: {len(body)}\r\nExpect: 100-continue\r\n", [b"", body]


FRAMINGS = (by_length, in_chunks, byte_by_byte, after_100)


def head(method: str, path: str, *headers: str) -> bytes:
    lines = (f"{method} {path} HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer {ADMIN_KEY}\r\n",)
    return "".join((*lines, *headers, "\r\n")).encode()


async def answer(reader: asyncio.StreamReader, method: str = "GET") -> tuple[int, bytes]:
    """Status and body of the next answer, behind any `100 Continue`."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
    status = int(lines[0].split()[1])
    if status == 100:
        return await answer(reader, method)
    headers = dict(line.split(": ", 1) for line in lines[1:] if line)
    assert "upgrade" not in headers
    length = 0 if method == "HEAD" else int(headers["content-length"])
    return status, await reader.readexactly(length)


async def write(writer: asyncio.StreamWriter, *parts: bytes) -> None:
    """Each part arrives by itself."""
    for part in parts:
        writer.write(part)
        await writer.drain()
        await asyncio.sleep(0)


@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS.keys())
async def test_a_submission_with_an_offer_is_accepted_and_the_connection_goes_on(
    still: World, offer: str, framing: Any
) -> None:
    """The body is read by its length and in chunks. A second submission and a read follow on the
    same connection.
    """
    task: JSON = {}
    async with connected(still.url) as (reader, writer):
        for prompt in ("one", "two"):
            framed, parts = framing(json.dumps(order(prompt=prompt)).encode())
            more = f"Content-Type: application/json\r\nPrefer: respond-async\r\n{framed}"
            await write(writer, head("POST", SUBMIT, offer, more), *parts)
            status, body = await answer(reader)
            task = json.loads(body)
            assert (status, task["prompt"]) == (200, prompt)
        await write(writer, head("GET", f"/v1/tasks/{task['id']}"))
        status, body = await answer(reader)
        assert (status, json.loads(body)["prompt"]) == (200, "two")


@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS.keys())
async def test_a_callback_with_an_offer_is_accepted_and_the_connection_goes_on(
    still: World, offer: str, framing: Any
) -> None:
    """The callback is committed with its whole body. A second one is found to be the same."""
    task = await submitted(still.client)
    path = still.callback_url(task["id"]).removeprefix(still.url)
    body = json.dumps({"id": task["id"][5:], "status": "failed"}).encode()
    framed, parts = framing(body)
    async with connected(still.url) as (reader, writer):
        for verdict in ("accepted", "duplicate"):
            await write(writer, head("POST", path, offer, framed), *parts)
            assert await answer(reader) == (200, b'{"status":"accepted"}')
            assert await still.context.inbox.judge(task["id"])
            assert await judged(task["id"], body) == verdict
        await write(writer, head("GET", "/healthz"))
        assert (await answer(reader))[0] == 200


@pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS.keys())
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_request_without_a_body_is_answered_despite_its_offer(
    still: World, method: str, offer: str
) -> None:
    """GET and HEAD have their usual answers, also behind one another on one connection."""
    async with connected(still.url) as (reader, writer):
        for path, status in (("/v1/tasks?limit=1", 200), ("/v1/nothing", 404), ("/healthz", 200)):
            await write(writer, head(method, path, offer))
            assert (await answer(reader, method))[0] == status


@pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS.keys())
async def test_a_stream_with_an_offer_is_a_stream(still: World, offer: str) -> None:
    """The reader gets server-sent events."""
    async with connected(still.url) as (reader, writer):
        await write(writer, head("GET", "/v1/events", offer, "Accept: text/event-stream\r\n"))
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        assert lines.startswith("http/1.1 200 ")
        assert "content-type: text/event-stream" in lines
        await reader.readuntil(b"retry: 1000\n")


async def test_offers_in_one_packet_are_answered_in_order(still: World) -> None:
    """A client may send its next requests before the first answer comes. Each makes its offer."""
    tasks = [(await submitted(still.client, prompt=f"number {n}"))["id"] for n in range(3)]
    body = b'{"id": "task-unified-1", "status": "processing"}'
    callback = still.callback_url(tasks[0]).removeprefix(still.url)
    requests = [head("GET", f"/v1/tasks/{task}", JAVA) for task in tasks]
    requests.insert(1, head("POST", callback, JAVA, f"Content-Length: {len(body)}\r\n") + body)
    async with connected(still.url) as (reader, writer):
        writer.write(b"".join(requests) + head("GET", "/healthz") * 300)
        answers = [await answer(reader) for _ in range(304)]
    assert {status for status, _ in answers} == {200}
    shown = [json.loads(body) for _, body in answers]
    assert [one.get("prompt") for one in shown[:4]] == ["number 0", None, "number 1", "number 2"]
    assert shown[1:2] == [{"status": "accepted"}]
    assert shown[4:] == [{"status": "ok"}] * 300


async def test_an_offer_has_the_limits_of_every_head(
    still: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head without an end closes the connection. A whole one has all the time that its answer
    needs.
    """
    monkeypatch.setattr(server_protocol, "HEAD_S", 0.05)
    after = got(await still.client.get("/v1/events"))["next_after"]
    async with connected(still.url) as (reader, writer):
        await write(writer, head("GET", f"/v1/events?after={after}&wait=0.3", JAVA))
        assert (await answer(reader))[0] == 200
        await write(writer, head("GET", "/healthz", JAVA)[:-2])
        assert await reader.read() == b""


@pytest.mark.parametrize(
    "request_",
    [
        head("CONNECT", "here:443"),
        head("CONNECT", "here:443", JAVA),
        head("POST", SUBMIT, JAVA, "Content-Length: 2\r\nContent-Length: 3\r\n") + b"{}",
        head("POST", SUBMIT, JAVA, "Content-Length: 2\r\nTransfer-Encoding: chunked\r\n") + b"{}",
        head("POST", SUBMIT, JAVA, "Content-Length: two\r\n") + b"{}",
        head("GET", "/healthz", JAVA, "X y: z\r\n"),
    ],
    ids=["tunnel", "tunnel with offer", "two lengths", "both framings", "no number", "blank"],
)
async def test_an_offer_makes_no_bad_request_good(still: World, request_: bytes) -> None:
    """The answer is 400 and the connection ends, as without the offer."""
    async with connected(still.url) as (reader, writer):
        await write(writer, request_)
        assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
