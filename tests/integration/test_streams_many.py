"""Streams of real processes: a thousand at once, readers that do not read, and several processes on
one PostgreSQL.
"""

import asyncio
import re
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api import SUBMIT, got, order
from tests.crash.group import WEB, groups
from tests.processes import ADMIN_KEY, Running, sandbox, service_settings, started
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(180)

MIB = 1 << 20
PATIENCE_S = 90.0
STREAMS, ALLOWED = 1000, 150 * MIB  # above the memory of the idle process
SLOW, LARGE, TASKS = 40, 15_000, 40  # readers, characters per request, requests
SEQUENCE = re.compile(rb"^id: (\d{20})$", re.MULTILINE)


def resident(service: Running) -> int:
    """The resident memory in bytes."""
    (line,) = [
        line
        for line in Path(f"/proc/{service.process.pid}/status").read_text().splitlines()
        if line.startswith("VmRSS")
    ]
    return int(line.split()[1]) * 1024


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[tuple[Running, httpx.AsyncClient]]:
    """An idle service with a sandbox upstream, and a client whose key may have all the streams."""
    with ExitStack() as stack:
        upstream = stack.enter_context(sandbox(folder=folder))
        settings = service_settings(upstream.address, folder, KEY_WAITS=str(STREAMS))
        service = stack.enter_context(started("serve", folder=folder, **settings))
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        async with httpx.AsyncClient(
            base_url=service.address, headers=headers, timeout=60, trust_env=False
        ) as client:
            await ended(client, [await submitted(client)])
            yield service, client


async def submitted(client: httpx.AsyncClient, **fields: Any) -> str:
    task: dict[str, Any] = got(
        await client.post(
            SUBMIT, json=order(size="768x768", **fields), headers={"prefer": "respond-async"}
        )
    )
    return str(task["id"])


async def ended(client: httpx.AsyncClient, ids: list[str]) -> None:
    async def over() -> bool:
        page = got(await client.get("/v1/tasks", params={"state": "completed", "limit": 1000}))
        return {task["id"] for task in page["data"]} >= set(ids)

    await wait_until(over, PATIENCE_S)


async def opened(
    address: str, after: str, receive: int | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A stream on a socket with a receive buffer of `receive` bytes, or of the system's default."""
    host, _, port = address.removeprefix("http://").partition(":")
    made = socket.socket()
    if receive is not None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    made.setblocking(False)
    await asyncio.get_running_loop().sock_connect(made, (host, int(port)))
    reader, writer = await asyncio.open_connection(sock=made, limit=1 << 16)
    head = (
        f"GET /v1/events?after={after} HTTP/1.1\r\nhost: x\r\naccept:"
        f" text/event-stream\r\nauthorization: Bearer {ADMIN_KEY}\r\n\r\n"
    )
    writer.write(head.encode())
    return reader, writer


async def numbers(reader: asyncio.StreamReader, count: int) -> list[bytes]:
    """The sequences of the next `count` events."""
    found: list[bytes] = []
    rest = b""
    while len(found) < count:
        data = await reader.read(1 << 16)
        assert data, "the stream ended"
        rest += data
        found += SEQUENCE.findall(rest)
        rest = rest[rest.rfind(b"\n") + 1 :] if not rest.endswith(b"\n") else b""
    return found


async def test_a_thousand_streams_fit(tmp_path: Path) -> None:
    """1,000 open streams on one process take less than 150 MiB above idle, and each reader gets
    every event.
    """
    async with serving(tmp_path) as (service, client), AsyncExitStack() as stack:
        idle = resident(service)
        readers = []
        for _ in range(STREAMS):
            reader, writer = await opened(service.address, "0" * 20)
            stack.callback(writer.close)
            readers.append(reader)
        following = asyncio.gather(*(numbers(reader, 2 + 2 * 5) for reader in readers))
        await ended(client, [await submitted(client) for _ in range(5)])
        async with asyncio.timeout(PATIENCE_S):
            shown = await following
        took = resident(service) - idle
        assert {tuple(each) for each in shown} == {tuple(shown[0])}
        assert shown[0] == sorted(set(shown[0]))
        print(f"{STREAMS} streams: {took / MIB:.0f} MiB above idle")
        assert took < ALLOWED


async def test_readers_that_do_not_read_hold_no_memory_and_nobody_up(tmp_path: Path) -> None:
    """Requests have 15,000 characters. A reader that reads gets all events at once. A reader that
    does not read costs little memory and gets all events later, in sequence.
    """
    async with serving(tmp_path) as (service, client), AsyncExitStack() as stack:
        await ended(client, [await submitted(client, note="x" * LARGE) for _ in range(TASKS)])
        before, slow = resident(service), []
        for _ in range(SLOW):
            reader, writer = await opened(service.address, "0" * 20, receive=1 << 14)
            stack.callback(writer.close)
            slow.append(reader)
        # The service has begun to send to the slow readers.
        await wait_until(lambda: all(reader._buffer for reader in slow), PATIENCE_S)  # type: ignore[attr-defined]
        quick, writer = await opened(service.address, "0" * 20)
        stack.callback(writer.close)
        async with asyncio.timeout(PATIENCE_S):
            shown = await numbers(quick, 2 + 2 * TASKS)
        took = resident(service) - before
        print(f"{SLOW} readers that do not read: {took / MIB:.0f} MiB")
        assert took < SLOW * TASKS * 2 * LARGE / 2
        async with asyncio.timeout(PATIENCE_S):
            assert (
                await asyncio.gather(*(numbers(reader, len(shown)) for reader in slow[:2]))
                == [shown] * 2
            )


async def test_a_reader_at_one_process_sees_what_others_wrote(
    tmp_path: Path, postgres_server: str
) -> None:
    """On PostgreSQL a reader sees the events of other processes within a second, and misses none
    while two processes write.
    """
    async with groups(tmp_path, postgres_server) as group:
        web, *others = [await group.start(arguments) for arguments in (WEB, ("serve",), ("serve",))]
        reader, writer = await opened(str(web.client.base_url).rstrip("/"), "0" * 20)
        shown: list[tuple[str, float]] = []

        async def read() -> None:
            while True:
                arrived = await numbers(reader, 1)
                shown.extend((each.decode(), time.time()) for each in arrived)

        reading = asyncio.create_task(read())
        for number in range(8):  # one after another, to measure the latency without load
            await group.order(others[number % 2], number)
            await group.ended(web)
        apart = len(shown)
        await asyncio.gather(
            *(group.order(others[number % 2], 100 + number) for number in range(60))
        )
        await group.ended(web)
        stored = got(await web.client.get("/v1/events", params={"limit": 1000}))["data"]
        await wait_until(lambda: len(shown) >= len(stored), PATIENCE_S)
        reading.cancel()
        writer.close()
        assert [sequence for sequence, _ in shown] == [event["sequence"] for event in stored]
        waits = sorted(
            at - datetime.fromisoformat(event["time"]).timestamp()
            for event, (_, at) in zip(stored[:apart], shown, strict=False)
        )
        print("seconds:", [round(wait, 3) for wait in waits])
        assert (
            waits[len(waits) // 2] < 1
        )  # the median, because a loaded machine may pause for longer
        group.alive()
