"""Callback bodies that are late, long, or in pieces. A callback with the right token always gets an
answer.
"""

import asyncio
import json
from contextlib import closing
from typing import Any

import httpx
import pytest

from service.web.routes import callback_route
from tests.callbacks import (
    LIMIT,
    asked,
    call,
    chunk,
    counted,
    heard,
    quick_world,
    raw,
    said,
    verdict,
)
from tests.upstream import Upstream, document, failed
from tests.waiting import wait_until
from tests.world import World

WORLD = quick_world

JSON = dict[str, Any]


async def test_too_large_a_body_gets_the_upstream_asked(
    here: World, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A body over 256 KiB is 413, as soon as it is there. With the right token the service still
    queries the upstream. A body at the limit is read.
    """
    monkeypatch.setattr(callback_route, "DISCARD_S", 600)
    task = await here.submit()
    upstream.queries[task["upstream_id"]] = [document("processing"), failed("service_error")]
    filled = said(task, "processing", padding="")
    assert (
        await verdict(here, task, filled.replace(b'""', b'"' + b"x" * (LIMIT - len(filled)) + b'"'))
        == "accepted"
    )
    answer = await call(here, task, said(task, "failed", padding="x" * LIMIT))
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    await asked(upstream, task)


async def partial(
    here: World, task: dict[str, Any]
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Opens a callback request and sends half of its body."""
    url = httpx.URL(here.callback_url(task["id"]))
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(
        f"POST {url.path} HTTP/1.1\r\nhost: here\r\ncontent-length: 100\r\n\r\n".encode()
        + b'{"status": "completed"'
    )
    await writer.drain()
    return reader, writer


async def test_a_body_that_does_not_come_is_not_waited_for(
    here: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer is 408 after the time limit (5 s, shorter here), and nothing is stored."""
    monkeypatch.setattr(callback_route, "BODY_S", 0.05)
    task = await here.submit()
    before = counted(here, "incomplete")
    reader, writer = await partial(here, task)
    with closing(writer):
        assert await reader.readuntil(b"\r\n") == b"HTTP/1.1 408 Request Timeout\r\n"
    assert counted(here, "incomplete") == before + 1
    assert await heard(here, task) == []


async def test_a_caller_that_leaves_in_the_middle_is_not_heard(here: World) -> None:
    """The upstream sends the callback again, so nothing is stored. The refusal is counted."""
    task = await here.submit()
    before = counted(here, "disconnected")
    _, writer = await partial(here, task)
    writer.close()
    await wait_until(lambda: counted(here, "disconnected") == before + 1)
    assert await heard(here, task) == []


@pytest.mark.parametrize(
    ("headers", "parts"),
    [
        ("transfer-encoding: chunked\r\n", [chunk(b"x" * LIMIT), chunk(b"x"), chunk(b"")]),
        ("transfer-encoding: chunked\r\n", [chunk(b"x" * 65536)] * 4000),
        ("content-length: 10000000000\r\n", [b"x" * 65536] * 4000),
        (f"content-length: {LIMIT + 1}\r\nexpect: 100-continue\r\n", [b"x" * (LIMIT + 1)]),
    ],
    ids=["one byte over", "no end", "no end with a length", "on demand"],
)
async def test_a_body_over_the_limit_is_413_however_it_is_sent(
    headers: str, parts: list[bytes], here: World, upstream: Upstream
) -> None:
    """This holds with and without a content length. The service buffers no more than the limit,
    answers before the body ends, and queries the upstream.
    """
    task = await here.submit()
    upstream.queries[task["upstream_id"]] = [failed("service_error")]
    if "expect" in headers:
        answer = await here.stranger.post(
            here.callback_url(task["id"]), content=parts[0], headers={"expect": "100-continue"}
        )
        assert answer.status_code == 413
    else:
        status, answered, body = await raw(here.callback_url(task["id"]), *parts, headers=headers)
        assert (status, json.loads(body)["error"]["code"]) == (413, "body_too_large")
        assert answered.get("connection") == ("close" if len(parts) > 3 else None)
    await here.ended(task["id"])
    assert await heard(here, task) == [("unreadable", None, 1)]


async def test_a_chunked_body_is_read_like_any_other(here: World, upstream: Upstream) -> None:
    """The number of chunks does not matter up to the size limit."""
    task = await here.submit()
    upstream.queries[task["upstream_id"]] = [failed("service_error")]
    body = said(task, "failed", padding="x" * 1000)
    pieces = [chunk(body[place : place + 100]) for place in range(0, len(body), 100)]
    status, _, answer = await raw(
        here.callback_url(task["id"]), *pieces, chunk(b""), headers="transfer-encoding: chunked\r\n"
    )
    assert (status, json.loads(answer)) == (200, {"status": "accepted"})
    await here.ended(task["id"])


async def test_bytes_beyond_the_content_length_are_no_callback(
    here: World, upstream: Upstream
) -> None:
    """The surplus bytes are not a valid request, and their 400 may arrive before the answer. The
    sender's next attempt finds the correct state.
    """
    task = await here.submit()
    upstream.queries[task["upstream_id"]] = [failed("service_error")]
    body = said(task, "failed")
    status, _, _ = await raw(
        here.callback_url(task["id"]),
        body + b"x" * 100_000,
        headers=f"content-length: {len(body)}\r\n",
    )
    assert status in (200, 400)
    assert await verdict(here, task, body) in ("accepted", "duplicate")
    await here.ended(task["id"])
    assert [(verdict, status) for verdict, status, _ in await heard(here, task)] == [
        ("accepted", "failed")
    ]


@pytest.mark.parametrize(
    "headers",
    [
        "content-length: -1\r\n",
        "content-length: many\r\n",
        "content-length: 2\r\ncontent-length: 3\r\n",
        "content-length: 9" + "9" * 40 + "\r\n",
    ],
    ids=["negative", "no number", "two of them", "beyond any"],
)
async def test_a_length_that_is_none_is_no_request(headers: str, here: World) -> None:
    """The server itself answers 400, because the end of such a body is unknown."""
    task = await here.submit()
    assert (await raw(here.callback_url(task["id"]), b"{}", headers=headers))[0] == 400
    assert await heard(here, task) == []


async def test_a_body_that_comes_a_byte_at_a_time_has_one_time_limit(
    here: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time limit runs from the first byte to the last, not between bytes. The connection closes
    after the 408.
    """
    monkeypatch.setattr(callback_route, "BODY_S", 0.1)
    task = await here.submit()
    url = httpx.URL(here.callback_url(task["id"]))
    reader, writer = await asyncio.open_connection(url.host, url.port)
    with closing(writer):
        writer.write(
            f"POST {url.path} HTTP/1.1\r\nhost: here\r\ncontent-length: 100000\r\n\r\n".encode()
        )

        def answered() -> bytes:
            writer.write(b"x")
            # # returns the bytes that have arrived, without waiting for more
            return bytes(reader._buffer)  # type: ignore[attr-defined]

        head = await wait_until(answered)
        assert head.startswith(b"HTTP/1.1 408 ")
        assert b"connection: close" in head
    assert await heard(here, task) == []
