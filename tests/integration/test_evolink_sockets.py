"""EvoLink's adapter over real connections: its requests, and the outcome of every way in which an
answer can fail.
"""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import Literal

import pytest

from service.errors import CallTimedOut, ConnectionLost, NotConnected
from service.net.egress_client import Egress, Rules
from service.upstreams.base import (
    Accepted,
    Found,
    NoAnswer,
    NotCreated,
    Refused,
    Report,
    Status,
    Uncertain,
    UpstreamCall,
)
from service.upstreams.evolink import EvoLink

LOOPBACK = Rules("upstream", networks=(ip_network("127.0.0.0/8"),))
SUBMITTED = b'{"id": "task-unified-1", "status": "pending"}'
ACCEPTED = Accepted(Report(upstream_id="task-unified-1", status=Status.PENDING))
ODD = '{ "prompt":"雪",  "n" : 1.0 }\n'.encode()  # no JSON library writes it like this


@dataclass(frozen=True)
class Script:
    """The bytes that the server sends, and its next step: it closes, waits for the client to leave,
    or resets the connection.
    """

    data: bytes
    ending: Literal["close", "wait", "reset"] = "close"


def answer(status: int, body: bytes = b"", *headers: str) -> Script:
    fields = [f"HTTP/1.1 {status} X", f"content-length: {len(body)}", "connection: close", *headers]
    return Script("\r\n".join(fields).encode() + b"\r\n\r\n" + body)


HALF = b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n" + SUBMITTED[:-1]
HALF_CHUNKED = (
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    + f"{len(SUBMITTED):x}\r\n".encode()
    + SUBMITTED[:-1]
)
TLS = b"\x16"  # the first byte of a handshake
NO_HTTP = b"SSH-2.0-OpenSSH_9.2\r\n\r\n"


@dataclass
class Wire:
    """A server that keeps each request unchanged and answers by its script."""

    script: Script
    port: int = 0
    requests: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            first = await reader.readexactly(1)
            if first == TLS:
                raise ConnectionError("no TLS is spoken here")
            head = (first + await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            line, *fields = head.strip().split("\r\n")
            headers = {
                name.lower(): value for name, value in (each.split(": ", 1) for each in fields)
            }
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            self.requests.append((line, headers, body))
            writer.write(self.script.data)
            await writer.drain()
            if self.script.ending == "wait":
                await reader.read()
            elif self.script.ending == "reset":
                writer.transport.abort()
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


@asynccontextmanager
async def wired(script: Script) -> AsyncIterator[Wire]:
    wire = Wire(script)
    server = await asyncio.start_server(wire.serve, "127.0.0.1", 0)
    wire.port = server.sockets[0].getsockname()[1]
    async with server:
        yield wire


@asynccontextmanager
async def evolink(
    base_url: str,
    calls: list[UpstreamCall] | None = None,
    rules: Rules = LOOPBACK,
    timeout: float = 10,
) -> AsyncIterator[EvoLink]:
    async with Egress(rules) as egress:
        yield EvoLink(
            egress,
            base_url,
            "sk-test",
            timeout,
            timeout,
            calls.append if calls is not None else None,
            now=lambda: 0.0,
        )


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address without a listener. A bound socket holds the port, so that no other process takes
    it.
    """
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


async def test_a_submission_is_sent_byte_for_byte() -> None:
    """The request has the stored body, the task's id as idempotency key and the service's upstream
    key. The answer's request id is recorded for the call.
    """
    calls: list[UpstreamCall] = []
    async with (
        wired(answer(200, SUBMITTED, "X-Request-Id: r-1")) as wire,
        evolink(wire.url + "/", calls) as upstream,
    ):
        assert await upstream.submit(ODD, "task_abc") == ACCEPTED
    ((line, headers, body),) = wire.requests
    assert line == "POST /v1/images/generations HTTP/1.1"
    assert body == ODD
    assert headers["authorization"] == "Bearer sk-test"
    assert headers["idempotency-key"] == "task_abc"
    assert headers["content-type"] == "application/json"
    assert [(call.kind, call.status, call.outcome, call.request_id) for call in calls] == [
        ("submit", 200, "accepted", "r-1")
    ]
    assert 0 < calls[0].duration < 10


async def test_a_query_asks_for_one_path_segment() -> None:
    """Every upstream id stays within one path segment. The request has no body and no idempotency
    key.
    """
    calls: list[UpstreamCall] = []
    found = json.dumps(
        {"id": "a/../b?c%2f", "status": "completed", "results": ["https://files.evolink.ai/1.png"]}
    ).encode()
    async with wired(answer(200, found)) as wire, evolink(wire.url, calls) as upstream:
        outcome = await upstream.query("a/../b?c%2f")
    assert outcome == Found(
        Report(
            upstream_id="a/../b?c%2f",
            status=Status.COMPLETED,
            results=("https://files.evolink.ai/1.png",),
        )
    )
    ((line, headers, body),) = wire.requests
    assert (line, body) == ("GET /v1/tasks/a%2F..%2Fb%3Fc%252f HTTP/1.1", b"")
    assert headers["authorization"] == "Bearer sk-test"
    assert "idempotency-key" not in headers
    assert [(call.kind, call.status, call.outcome, call.request_id) for call in calls] == [
        ("query", 200, "found", None)
    ]


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/v1/credits", "credits"),
        ("/v1/models", "models"),
        ("/v1/tasks/task-unified-9", "passthrough"),
    ],
)
@pytest.mark.parametrize("status", [200, 401, 503])
async def test_a_passed_through_answer_is_the_upstreams_own(
    path: str, kind: str, status: int
) -> None:
    """The adapter returns status and body unchanged."""
    calls: list[UpstreamCall] = []
    async with (
        wired(answer(status, b'{"success": true}')) as wire,
        evolink(wire.url, calls) as upstream,
    ):
        response = await upstream.passthrough("GET", path)
    assert (response.status, response.body) == (status, b'{"success": true}')
    assert wire.requests[0][0] == f"GET {path} HTTP/1.1"
    assert [(call.kind, call.status, call.outcome) for call in calls] == [
        (kind, status, "answered")
    ]


@pytest.mark.parametrize("path", ["@evil.example/", ".evil.example", "", "v1/credits"])
async def test_a_path_cannot_become_a_host(path: str) -> None:
    """The path after the base address must begin with a slash. Otherwise the adapter sends
    nothing.
    """
    async with wired(answer(200)) as wire, evolink(wire.url) as upstream:
        with pytest.raises(ValueError, match="begins with /"):
            await upstream.passthrough("GET", path)
    assert wire.requests == []


async def test_nobody_listening_created_nothing(nobody: str) -> None:
    calls: list[UpstreamCall] = []
    async with evolink(nobody, calls) as upstream:
        assert await upstream.submit(ODD, "task_abc") == NotCreated("not connected")
        assert await upstream.query("task-unified-1") == NoAnswer("not connected")
        with pytest.raises(NotConnected):
            await upstream.passthrough("GET", "/v1/credits")
    assert [(call.kind, call.status, call.outcome) for call in calls] == [
        ("submit", None, "not_created"),
        ("query", None, "no_answer"),
        ("credits", None, "no_answer"),
    ]


async def test_a_failed_handshake_created_nothing() -> None:
    """Without TLS no byte of the request has left."""
    async with (
        wired(Script(NO_HTTP)) as wire,
        evolink(wire.url.replace("http:", "https:")) as upstream,
    ):
        assert await upstream.submit(ODD, "task_abc") == NotCreated("not connected")
    assert wire.requests == []


@pytest.mark.parametrize(
    "script",
    [Script(b""), Script(HALF), Script(HALF_CHUNKED), Script(HALF, "reset"), Script(NO_HTTP)],
)
async def test_a_broken_connection_leaves_a_submission_uncertain(script: Script) -> None:
    """The upstream has seen the submission, so the adapter sends it once and does not retry by
    itself.
    """
    calls: list[UpstreamCall] = []
    async with wired(script) as wire, evolink(wire.url, calls) as upstream:
        assert await upstream.submit(ODD, "task_abc") == Uncertain("connection lost")
        assert len(wire.requests) == 1
        assert await upstream.query("task-unified-1") == NoAnswer("connection lost")
        with pytest.raises(ConnectionLost):
            await upstream.passthrough("GET", "/v1/models")
    assert [(call.status, call.outcome) for call in calls] == [
        (None, "uncertain"),
        (None, "no_answer"),
        (None, "no_answer"),
    ]


@pytest.mark.parametrize("script", [Script(b"", "wait"), Script(HALF, "wait")])
async def test_no_answer_in_time_leaves_a_submission_uncertain(script: Script) -> None:
    """The limit applies to the whole answer, not only to its beginning."""
    async with wired(script) as wire, evolink(wire.url, timeout=1.5) as upstream:
        submitted, queried, passed = await asyncio.gather(
            upstream.submit(ODD, "task_abc"),
            upstream.query("task-unified-1"),
            upstream.passthrough("GET", "/v1/models"),
            return_exceptions=True,
        )
    assert submitted == Uncertain("timed out")
    assert queried == NoAnswer("timed out")
    assert isinstance(passed, CallTimedOut)


async def test_an_endless_answer_is_cut_and_proves_nothing() -> None:
    """The adapter reads at most one mebibyte. The truncated answer is unreadable and proves
    nothing.
    """
    endless = SUBMITTED[:-1] + b', "x": "' + b"x" * (1 << 20) + b'"}'
    async with wired(answer(200, endless)) as wire, evolink(wire.url) as upstream:
        assert await upstream.submit(ODD, "task_abc") == Uncertain("200 without an id")
        assert await upstream.query("task-unified-1") == NoAnswer("200 unreadable")


async def test_answers_over_the_wire_are_judged_by_the_table() -> None:
    """Status, headers and body reach the parser unchanged, and each outcome has its name in the
    log.
    """
    calls: list[UpstreamCall] = []
    refusal = (
        b'{"error": {"code": "content_filter", "message": "no", "type":'
        b' "invalid_request_error", "param": "prompt"}}'
    )
    refused = Refused(
        400,
        {
            "code": "content_filter",
            "message": "no",
            "type": "invalid_request_error",
            "param": "prompt",
        },
    )
    table = [
        (
            answer(429, b"", "Retry-After: 7"),
            NotCreated("429 without an error of its own", 7.0, throttled=True),
        ),
        (
            answer(429, b"", "Retry-After: Thu, 01 Jan 1970 00:01:00 GMT"),
            NotCreated("429 without an error of its own", 60.0, throttled=True),
        ),
        (answer(400, refusal), refused),
        (answer(502, b"<html>"), Uncertain("502 without an error of its own")),
    ]
    for script, outcome in table:
        async with wired(script) as wire, evolink(wire.url, calls) as upstream:
            assert await upstream.submit(ODD, "task_abc") == outcome
    assert [(call.status, call.outcome) for call in calls] == [
        (429, "not_created"),
        (429, "not_created"),
        (400, "refused"),
        (502, "uncertain"),
    ]
