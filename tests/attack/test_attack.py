"""An attack on a running service: one owner's weight is no other owner's outage, every answer is
bounded, and what must stay inside stays inside. Each function is one line of attack against a real
process. `test_callbacks_meanwhile.py` sends callbacks during these attacks.
"""

import asyncio
import json
import stat
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from service.signing import Keyring
from service.web import server_protocol
from tests.api import ASYNC, SUBMIT, order, refused, submitted
from tests.attack.target import (
    BAD_HOSTS,
    PAGES,
    POLL,
    READERS,
    SECRET_KEY,
    STALLED,
    Streams,
    Target,
    in_time,
    stored_image,
    target,
    whole_answer,
)
from tests.processes import Running, service_settings
from tests.servers import free_port
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(240)

REQUESTS, STALLED_BYTES = 300, 20_000_000
SLOW, SLOW_OF_KEY = 500, 200
WAITING = 1000
STALL_S = 3.0  # instead of 30


@pytest.fixture(scope="module")
async def under(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Target]:
    quick = f"from service.web import server_protocol as it; it.WRITE_S = {STALL_S}"
    with in_time():
        async with target(tmp_path_factory.mktemp("attack"), quick) as made:
            yield made


async def status(reader: asyncio.StreamReader) -> int:
    line = await reader.readline()
    return int(line.split()[1]) if line else 0


# --- what must stay inside ---


async def test_the_store_is_private(under: Target) -> None:
    """Modes, and no callback token and no body of a task that is submitted."""
    task = await submitted(under.victim, prompt="a prompt", note="a body that was sent")
    await under.upstream_id(under.victim, task["id"])
    data = under.folder / "data"
    for path in (data, *data.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path
    token = Keyring([SECRET_KEY.encode()]).callback_token("evolink", task["id"])
    held = b"".join(path.read_bytes() for path in data.glob("darkroom.db*"))
    assert task["id"].encode() in held
    assert token.encode() not in held


@pytest.fixture(scope="module")
async def image(under: Target) -> str:
    """The path of a stored image of 20 MB."""
    return await stored_image(under)


@pytest.mark.usefixtures("image")
async def test_the_process_that_decodes_images_knows_nothing(under: Target) -> None:
    """No environment, no descriptor of the service, limits that it cannot raise."""
    pids = Path(f"/proc/{under.pid}/task/{under.pid}/children").read_text(encoding="ascii").split()
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids}
    ((pid, _),) = ((pid, text) for pid, text in commands.items() if b"validator_child" in text)
    process = Path(f"/proc/{pid}")
    environ = (process / "environ").read_bytes()
    assert all(part.startswith(b"LD_LIBRARY_PATH=") for part in environ.split(b"\0") if part)
    assert {path.name for path in (process / "fd").iterdir()} == {"0", "1", "2"}
    assert "NoNewPrivs:\t1\n" in (process / "status").read_text(encoding="ascii")
    for line in (process / "limits").read_text(encoding="ascii").splitlines()[1:]:
        name, limits = line[:26].strip(), line[26:].split()[:2]
        if name in ("Max address space", "Max cpu time", "Max file size", "Max open files"):
            assert limits[0] != "unlimited", name


async def test_no_message_tells_the_address_of_a_name(under: Target) -> None:
    """The log does, for the operator."""
    url = "https://localhost/hook"
    answer = await under.attacker.post(SUBMIT, json=order(callback_url=url), headers=ASYNC)
    refused(answer, 400, param="callback_url")
    assert "not globally routable" in answer.text
    assert "127.0.0.1" not in answer.text
    assert "::1" not in answer.text

    def told() -> bool:
        reasons = [line["reason"] for line in under.running.logged("egress.refused")]
        return any("127.0.0.1" in reason or "::1" in reason for reason in reasons)

    await wait_until(told)


async def test_sums_of_all_owners_are_the_operators(under: Target) -> None:
    for path in ("/metrics", "/v1/credits"):
        assert (await under.victim.get(path)).status_code == 403
        assert (await under.admin.get(path)).status_code == 200


async def test_a_terminal_is_sent_no_control_characters_of_a_client(tmp_path: Path) -> None:
    """In the log format `console`."""
    port = free_port()
    settings = service_settings(
        "http://127.0.0.1:9", tmp_path, LOG_FORMAT="console", LOG_PROMPTS="true"
    )
    settings |= {"DARKROOM_PORT": str(port), "DARKROOM_LOG_LEVEL": "debug"}
    running = Running("serve", folder=tmp_path, **settings)
    try:
        await wait_until(lambda: any("service.started" in line for line in running.lines))
        body = json.dumps(order(prompt="\x1b[2J\x9b31m\x07")).encode()
        lines = ["authorization: Bearer admin-key-of-the-tests", f"content-length: {len(body)}"]
        lines.append("prefer: respond-async")
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = "\r\n".join([f"POST {SUBMIT} HTTP/1.1", "host: x", *lines, "", ""])
        writer.write(head.encode() + body)
        assert (await whole_answer(reader))[0] == 200
        writer.close()
        await wait_until(lambda: any("task.queued" in line for line in running.lines))
    finally:
        running.process.kill()
        running.ended()
    text = "\n".join(running.lines)
    assert r"\x1b[2J\x9b31m\x07" in text
    assert all(char.isprintable() or char == "\n" for char in text)


# --- what must be bounded ---


async def test_an_endpoint_that_cannot_be_encoded_is_refused(under: Target) -> None:
    """As an endpoint and as a callback_url. No line of the log has a traceback."""
    for host in BAD_HOSTS:
        url = f"https://{host}/"
        answer = await under.attacker.post("/v1/endpoints", json={"url": url})
        assert host in refused(answer, 400, param="url")["message"]
        answer = await under.attacker.post(SUBMIT, json=order(callback_url=url), headers=ASYNC)
        assert host in refused(answer, 400, param="callback_url")["message"]
    assert not under.running.logged("http.failed")
    assert not under.running.logged("worker.failed")


async def test_filters_without_number_are_refused(under: Target) -> None:
    names = "&".join(f"metadata.{number}=" for number in range(4000))
    for path in (f"/v1/tasks?{names}", "/v1/events?type=" + ",".join(["*"] * 20_000)):
        assert (await under.victim.get(path)).status_code == 400
    assert not under.running.logged("store.failed")


@pytest.mark.parametrize(
    "path", ["/openapi.json", "/asyncapi.json", "/readyz", "/nothing", "/images/img_x"]
)
async def test_a_route_without_a_key_costs_little(under: Target, path: str) -> None:
    """It takes at most eight times the processor time of `/healthz` in the same run. A document
    that is built for each request takes twenty times as much.
    """

    async def cost(path: str) -> float:
        request = under.head(under.stranger, f"GET {path}")
        async with under.connections(1, request) as ((reader, writer),):
            await whole_answer(reader)
            before = under.processor_s()
            for _ in range(REQUESTS):
                writer.write(request)
                await whole_answer(reader)
            return under.processor_s() - before

    usual, took = await cost("/healthz"), await cost(path)
    print(f"{path}: {took / usual:.1f} times /healthz")
    assert took < 8 * usual


@pytest.fixture(scope="module")
async def large(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Target]:
    """A service that no other test attacks. It has tasks with 0.9 MB of unknown fields, each with
    its event: 20 readers of all would take 900 MB without a limit.
    """
    async with target(tmp_path_factory.mktemp("large")) as made:
        for number in range(0, 50, 5):
            notes = [f"{number + more}" + "x" * 900_000 for more in range(5)]
            await asyncio.gather(*(submitted(made.attacker, note=note) for note in notes))
        yield made


READ = [*PAGES, "/v1/deliveries?limit=1000", "/v1/events?after=0"]


@pytest.mark.parametrize("path", READ)
async def test_readers_of_large_pages_take_little_memory(large: Target, path: str) -> None:
    """20 readers at once that read slowly, of lists and of a stream. Idle is the memory before
    anything was submitted.
    """
    stream = ["accept: text/event-stream"] if "after=0" in path else []
    request = large.head(large.attacker, f"GET {path}", *stream)
    peak = large.above_idle()
    async with large.connections(READERS, request) as made:
        for _ in range(10):
            await asyncio.gather(*map(take, made))
            peak = max(peak, large.above_idle())
    print(f"{path}: {peak:.0f} MiB above idle")
    assert peak < 150


async def take(streams: Streams) -> None:
    """Reads a little, if there is something."""
    with suppress(TimeoutError):
        async with asyncio.timeout(0.05):
            await streams[0].read(1 << 14)


# --- other owners ---


async def test_slow_bodies_of_one_key_leave_others_alone(under: Target) -> None:
    """A key has 200 bodies that do not arrive. The service ends the others at once."""
    head = under.head(under.attacker, f"POST {SUBMIT}", "content-length: 9000")
    async with under.connections(SLOW, head + b"{") as made:
        answers = [asyncio.create_task(status(reader)) for reader, _ in made]
        await wait_until(lambda: sum(each.done() for each in answers) >= SLOW - SLOW_OF_KEY, 20)
        for _ in range(20):
            assert (await under.victim.get("/v1/tasks?limit=1")).status_code == 200
        assert {each.result() for each in answers if each.done()} <= {408, 429}
        for each in answers:
            each.cancel()


async def test_made_up_keys_leave_others_alone(under: Target) -> None:
    """They take no place of a valid key, although they come from the same address."""

    async def served() -> None:
        for _ in range(4):
            assert (await under.victim.get("/v1/tasks?limit=1")).status_code == 200
            await submitted(under.victim)

    requests = [
        under.head(under.stranger, "GET /v1/tasks", f"authorization: Bearer dk_{number}")
        for number in range(600)
    ]
    async with under.flood(100, *requests):
        await asyncio.gather(*(served() for _ in range(5)))


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
async def test_polls_and_streams_of_one_key_leave_others_alone(under: Target, accept: str) -> None:
    head = under.head(under.attacker, POLL, f"accept: {accept}")
    async with under.connections(WAITING, head) as made:
        answers = [await status(reader) for reader, _ in made[WAITING // 4 :]]
        assert answers.count(429) >= WAITING * 0.7
        poll = await under.victim.get("/v1/events?wait=0.1&limit=1")
        assert poll.status_code == 200


def test_the_limit_of_a_reader_that_stops_is_the_documented_one() -> None:
    assert server_protocol.WRITE_S == 30.0


async def test_readers_that_stop_are_ended(under: Target, image: str) -> None:
    """After `STALL_S` without progress, with most of the image unsent. Until then they take little
    memory.
    """
    request = under.head(under.stranger, f"GET {image}")
    async with under.connections(STALLED, request) as made:
        readers: list[Any] = [reader for reader, _ in made]
        await wait_until(lambda: all(reader._buffer for reader in readers))
        began, peak = time.monotonic(), under.above_idle()
        print(f"{peak:.0f} MiB above idle")
        assert peak < 100
        # After 30 s the kernel would end them, as connections whose network is gone.
        await wait_until(lambda: under.held(made) < STALLED, 20)
        assert time.monotonic() - began >= STALL_S - 1  # they stalled before `began`
        await wait_until(lambda: not under.held(made), 20)
        for reader in readers[:3]:
            size = 0
            with suppress(ConnectionError):
                while part := await reader.read(1 << 20):
                    size += len(part)
            assert size < STALLED_BYTES
