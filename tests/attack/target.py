"""The service under attack: a real process with an upstream, an attacker's key and a victim's key.
Callbacks are measured beside those of a service that is not attacked.
"""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

import httpx
from starlette.responses import Response

from service.signing import Keyring
from tests.api import got, submitted
from tests.environment import ROOT, clean_environment
from tests.pictures import drawn
from tests.processes import ADMIN_KEY, Running, service_settings, started
from tests.upstream import Upstream, document
from tests.waiting import wait_until
from tests.world import answering

SECRET_KEY = "the secret key of the attack has 32 bytes or more"
MIB = 1 << 20
READERS, STALLED = 20, 40
BAD_HOSTS = ("xn--a", "xn--0", "xn--zzzzzzzz")
PAGES = ("/v1/tasks?limit=1000", "/v1/events?limit=1000")
POLL = "GET /v1/events?wait=60&after=99999"
ATTACK_S = 240
CALLBACKS = 150  # of one measurement
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Pulse:
    """Callbacks from a process of their own, to the service under attack and perhaps to a calm one
    in turns. Other work of the machine lengthens both, apart from the wait for a processor.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def p99(self, count: int = CALLBACKS) -> list[float]:
        """The milliseconds that the slowest hundredth takes, of each service."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"%d\n" % count)
        taken = json.loads(await self._process.stdout.readline())
        return [quantiles(times, n=100)[98] for times in zip(*taken, strict=True)]


@dataclass(slots=True)
class Target:
    """`upstream` runs in the process of the test."""

    running: Running
    folder: Path
    upstream: Upstream
    admin: httpx.AsyncClient
    attacker: httpx.AsyncClient
    victim: httpx.AsyncClient
    stranger: httpx.AsyncClient
    image: str = ""  # the path of a large one
    idle: int = 0  # resident memory before any attack

    @property
    def pid(self) -> int:
        return self.running.process.pid

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.running.address.removeprefix("http://").split(":")
        return host, int(port)

    def head(self, client: httpx.AsyncClient, request: str, *lines: str) -> bytes:
        key = client.headers.get("authorization")
        own = [f"authorization: {key}"] if key else []
        return "\r\n".join([f"{request} HTTP/1.1", "host: x", *own, *lines, "", ""]).encode()

    @asynccontextmanager
    async def connections(self, count: int, request: bytes) -> AsyncIterator[list[Streams]]:
        """So many connections on which this request was sent, and of which nothing is read."""
        async with AsyncExitStack() as stack:
            made = []
            for _ in range(count):
                reader, writer = await asyncio.open_connection(*self.address, limit=1 << 14)
                stack.callback(writer.close)
                writer.write(request)
                made.append((reader, writer))
            yield made

    @asynccontextmanager
    async def flood(self, count: int, *requests: bytes) -> AsyncIterator[None]:
        """So many connections, each of which asks again as soon as it has its answer. The block
        begins with the first answer.
        """
        begun = asyncio.Event()

        async def ask(request: bytes) -> None:
            while True:  # a connection that the service ends is opened again
                with suppress(OSError, asyncio.IncompleteReadError):
                    reader, writer = await asyncio.open_connection(*self.address)
                    try:
                        while True:
                            writer.write(request)
                            await whole_answer(reader)
                            begun.set()
                    finally:
                        writer.close()

        asking = [asyncio.create_task(ask(requests[i % len(requests)])) for i in range(count)]
        try:
            await begun.wait()
            yield
        finally:
            for each in asking:
                each.cancel()
            await asyncio.gather(*asking, return_exceptions=True)

    def above_idle(self) -> float:
        """The MiB of resident memory that the process has taken since it was idle."""
        return (self.resident() - self.idle) / MIB

    def resident(self) -> int:
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        return int(status.partition("VmRSS:")[2].split()[0]) * 1024

    def held(self, connections: Sequence[Streams]) -> int:
        """How many of these connections the service has not closed."""
        ours = {f"{writer.get_extra_info('sockname')[1]:04X}" for _, writer in connections}
        table = Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]
        rows = (line.split()[1:4] for line in table)
        mine = f":{self.address[1]:04X}"
        return sum(
            here.endswith(mine) and there.partition(":")[2] in ours and state == "01"
            for here, there, state in rows
        )

    def processor_s(self) -> float:
        """The processor time of the process so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii")
        return sum(map(int, fields.rpartition(") ")[2].split()[11:13])) / 100

    def callback_path(self, task_id: str) -> str:
        token = Keyring([SECRET_KEY.encode()]).callback_token("evolink", task_id)
        return f"/callbacks/evolink/{task_id}/{token}"

    async def waiting_task(self) -> tuple[str, str]:
        """A submitted task: its id and the upstream's."""
        task = await submitted(self.victim)
        return task["id"], await self.upstream_id(self.victim, task["id"])

    async def upstream_id(self, client: httpx.AsyncClient, task_id: str) -> str:
        async def known() -> Any:
            return got(await client.get(f"/v1/tasks/{task_id}"))["upstream_id"]

        return str(await wait_until(known))


async def whole_answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """The status and the body of an answer whose head names its length."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = head.partition(b"content-length: ")[2].partition(b"\r\n")[0]
    return int(head.split()[1]), await reader.readexactly(int(length or 0))


@contextmanager
def in_time() -> Iterator[None]:
    """Around all tests of a file: each is a part of an attack that takes at most `ATTACK_S`."""
    began = time.monotonic()
    yield
    took = time.monotonic() - began
    assert took < ATTACK_S, f"this part of the attack took {took:.0f} s"


async def stored_image(under: Target) -> str:
    """The path of a stored image of 20 MB."""
    content = drawn("PNG", size=(2600, 2600), compress_level=0)
    under.upstream.files["large"] = [Response(content, media_type="image/png")]
    task = await submitted(under.victim, prompt="large")
    upstream_id = await under.upstream_id(under.victim, task["id"])
    link = under.running.announcement["settings"]["evolink_base_url"] + "/files/large"
    under.upstream.queries[upstream_id] = [document("completed", link, id=upstream_id)]
    said = {"id": upstream_id, "status": "completed", "results": [link]}
    got(await under.stranger.post(under.callback_path(task["id"]), json=said))

    async def stored() -> str | None:
        found = got(await under.victim.get(f"/v1/tasks/{task['id']}"))
        return found["images"][0]["id"] if found["state"] == "completed" else None

    return f"/images/{await wait_until(stored, 90)}"


@asynccontextmanager
async def target(folder: Path, prelude: str = "", **settings: str) -> AsyncIterator[Target]:
    async with AsyncExitStack() as stack:
        upstream = Upstream()
        theirs = await stack.enter_async_context(answering(upstream.app))
        usual = {"SECRET_KEY": SECRET_KEY, "TASK_CALLBACK_NETWORKS": "", **settings}
        environment = service_settings(theirs, folder, **usual)
        running = stack.enter_context(
            started("serve", folder=folder, prelude=prelude, **environment)
        )

        async def client(key: str | None) -> httpx.AsyncClient:
            headers = {"authorization": f"Bearer {key}"} if key else {}
            made = httpx.AsyncClient(
                base_url=running.address, headers=headers, timeout=60, trust_env=False
            )
            return await stack.enter_async_context(made)

        admin, keys = await client(ADMIN_KEY), []
        for owner in ("attacker", "victim"):
            asked = {"owner": owner, "scopes": ["submit", "read", "subscribe"]}
            keys.append((await admin.post("/v1/keys", json=asked)).json()["key"])
        attacker, victim, stranger = [await client(key) for key in (*keys, None)]
        made = Target(running, folder, upstream, admin, attacker, victim, stranger)
        await made.waiting_task()
        made.idle = made.resident()
        yield made


@asynccontextmanager
async def pulse(*targets: Target, at_once: int = 1) -> AsyncIterator[Pulse]:
    """Callbacks to these services, so many at once to each."""
    arguments = [str(at_once)]
    for each in targets:
        task_id, upstream_id = await each.waiting_task()
        body = json.dumps({"id": upstream_id, "status": "processing"})
        arguments += [str(each.pid), str(each.address[1]), each.callback_path(task_id), body]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.attack.pulse", *arguments),
        cwd=ROOT,
        env=clean_environment({}),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 20,
    )
    try:
        made = Pulse(process)
        await made.p99()
        yield made
    finally:
        process.kill()
        await process.wait()
