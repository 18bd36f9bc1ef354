"""An upstream that shows every faulty behaviour of a table at once, byte by byte over sockets, and
records every request.
"""

import asyncio
import json
import re
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from tests.e2e.behaviours import (
    Answer,
    Behaviour,
    Step,
    Task,
    accepted,
    error,
    large,
    noise,
    ok,
    page,
    true,
)
from tests.processes import UPSTREAM_KEY

Headers = Mapping[str, str]
FORBIDDEN = (
    "127.0.0.2",
    "[::ffff:127.0.0.2]",
    "2130706434",
)  # outside the networks, the same in IPv6, and an odd notation
CALLERS = 8  # callbacks under way at a time


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str
    headers: Headers
    body: bytes


@dataclass(frozen=True, slots=True)
class Called:
    """A callback and its answer. `status` is 0 if there was no answer. `seconds` run from the
    connection's start to the status.
    """

    task: Task
    status: int
    seconds: float


@dataclass(slots=True)
class Upstream:
    """`tasks` and `submissions` are by prompt, which is a behaviour's name and a number.
    `trespasses` are calls to forbidden addresses.
    """

    behaviours: Mapping[str, Behaviour]
    group: asyncio.TaskGroup
    base: str = ""
    forbidden_port: int = 0
    tasks: dict[str, Task] = field(default_factory=dict)
    submissions: defaultdict[str, list[Request]] = field(default_factory=lambda: defaultdict(list))
    called: list[Called] = field(default_factory=list)
    trespasses: list[str] = field(default_factory=list)
    keys_given_away: list[str] = field(default_factory=list)
    probes: int = 0
    callers: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(CALLERS))
    at_work: set[asyncio.Task[None]] = field(default_factory=set)

    def order(self, prompt: str) -> Task:
        """The task that this upstream makes for a prompt."""
        name, _, number = prompt.partition(" ")
        behaviour, serial = self.behaviours[name], 1000 + len(self.tasks)
        first = large(serial, behaviour.large) if behaviour.files else behaviour.makes(serial, 0)
        host = FORBIDDEN[int(number) % len(FORBIDDEN)]
        forbidden = f"http://{host}:{self.forbidden_port}/secret.png"
        made = Task(
            f"task-unified-1757165031-{serial}",
            serial,
            self.base,
            forbidden,
            behaviour,
            (first, behaviour.makes(serial, 1)),
        )
        self.tasks[prompt] = made
        return made

    # --- answering
    # ----------------------------------------------------------------------------------------------

    async def answer(self, request: Request) -> Answer:
        if request.path.startswith("/files/"):
            if "authorization" in request.headers:
                self.keys_given_away.append(request.path)
            return self._file(request)
        if request.headers.get("authorization") != f"Bearer {UPSTREAM_KEY}":
            return error(401, "unauthorized")
        if (request.method, request.path) == ("POST", "/v1/images/generations"):
            return await self._submit(request)
        if request.path == "/v1/credits":
            self.probes += 1
            credits = {
                "success": True,
                "data": {"token": {"remaining_credits": 100}, "user": {"remaining_credits": 100}},
            }
            return ok(credits) if self.probes > 1 else error(401, "unauthorized")
        if found := re.fullmatch(r"/v1/tasks/([\w-]+)", request.path):
            task = next(
                (task for task in self.tasks.values() if task.id == found[1] and task.exists), None
            )
            return error(404, "task_not_found") if task is None else self._query(task)
        return error(404, "not_found")

    async def _submit(self, request: Request) -> Answer:
        order = json.loads(request.body)
        known, task = self.submissions[order["prompt"]], self.tasks[order["prompt"]]
        known.append(request)
        submits = task.behaviour.submits
        step = submits[min(len(known), len(submits)) - 1]
        if task.behaviour.created and len(known) >= len(submits) and not task.exists:
            task.exists, task.callback_url = True, order["callback_url"]
            if task.behaviour.when == "before":
                await self._callbacks(task)
            else:
                work = self.group.create_task(self._callbacks(task))
                self.at_work.add(work)
                work.add_done_callback(self.at_work.discard)
        return accepted(task) if step is None else taken(step, task)

    def _query(self, task: Task) -> Answer:
        task.asked += 1
        queries = task.behaviour.queries
        return (
            taken(queries[task.asked - 1], task)
            if task.asked <= len(queries)
            else ok(task.behaviour.truth(task))
        )

    def _file(self, request: Request) -> Answer:
        found = re.fullmatch(r"/files/([\w-]+)/(\d)-(\w+)\.png", request.path)
        task = next((task for task in self.tasks.values() if found and task.id == found[1]), None)
        if found is None or task is None:
            return page(404)
        position, files, special = int(found[2]), task.behaviour.files, None
        if position == 0 and files:
            number = task.fetched[request.path]
            task.fetched[request.path] += 1
            if number < len(files) or task.behaviour.for_ever:
                step = files[min(number, len(files) - 1)]
                special = step if isinstance(step, Answer) else step(task, found[3])
        whole = task.pictures[position] if position < 2 else noise(task.number, position)
        return special or part(whole, request.headers, task.behaviour.etag)

    # --- calling
    # ----------------------------------------------------------------------------------------------

    async def _callbacks(self, task: Task) -> None:
        waits = {"submitted": task.submitted, "ended": task.ended}
        if task.behaviour.when in waits:
            await waits[task.behaviour.when].wait()
        if task.behaviour.at_once:
            await asyncio.gather(
                *(self._call(task, body(task)) for body in task.behaviour.callbacks)
            )
        else:
            for body in task.behaviour.callbacks:
                await self._call(task, body(task))

    async def repeat(self) -> None:
        """Sends the true callback of every task once more."""
        await asyncio.gather(
            *(self._call(task, true(task)) for task in self.tasks.values() if task.exists)
        )

    async def _call(self, task: Task, body: bytes) -> None:
        url, status = urlsplit(task.callback_url), 0
        async with self.callers:
            started = time.perf_counter()
            with suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
                async with asyncio.timeout(30):
                    reader, writer = await asyncio.open_connection(url.hostname, url.port)
                    head = (
                        f"POST {url.path} HTTP/1.1\r\nhost: {url.netloc}\r\ncontent-type:"
                        " application/json\r\nconnection: close\r\n"
                    )
                    writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
                    status = int((await reader.readuntil(b"\r\n")).split()[1])
                    writer.close()
            self.called.append(Called(task, status, time.perf_counter() - started))

    # --- sockets
    # ----------------------------------------------------------------------------------------------

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open = True
        with closing(writer), suppress(ConnectionError, asyncio.IncompleteReadError):
            while open:
                answer = await self.answer(await read(reader))
                writer.write(written(answer))
                await writer.drain()
                if answer.stalls:
                    await reader.read()  # until the client closes the connection
                ends = answer.shape is not None and answer.shape.ends
                open = answer.status != 0 and answer.announced is None and not ends

    async def trespass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.trespasses.append(repr(writer.get_extra_info("sockname")))
        writer.close()


def taken(step: Step, task: Task) -> Answer:
    return step if isinstance(step, Answer) else step(task)


def part(whole: bytes, headers: Headers, etag: str) -> Answer:
    """Answers by RFC 9110: the rest of the file if the client asks for it and the file did not
    change, else the whole file.
    """
    names = {"content-type": "image/png", "accept-ranges": "bytes"} | (
        {"etag": etag} if etag else {}
    )
    found = re.fullmatch(r"bytes=(\d+)-", headers.get("range", ""))
    if found is None or headers.get("if-range", etag) != etag:
        return Answer(200, whole, names)
    start = int(found[1])
    if start >= len(whole):
        return Answer(416, b"", {**names, "content-range": f"bytes */{len(whole)}"})
    return Answer(
        206,
        whole[start:],
        {**names, "content-range": f"bytes {start}-{len(whole) - 1}/{len(whole)}"},
    )


async def read(reader: asyncio.StreamReader) -> Request:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    method, path, _ = lines[0].split(" ")
    path = path.partition("?")[0]
    headers = {
        name.lower(): value.strip()
        for name, _, value in (line.partition(":") for line in lines[1:] if line)
    }
    return Request(
        method, path, headers, await reader.readexactly(int(headers.get("content-length", 0)))
    )


def written(answer: Answer) -> bytes:
    if answer.status == 0:
        return b""
    if answer.shape is not None:
        return answer.shape.write(answer.body)
    length = len(answer.body) if answer.announced is None else answer.announced
    headers = {"content-length": str(length), **answer.headers}
    lines = (
        f"HTTP/1.1 {answer.status} Said",
        *(f"{name}: {value}" for name, value in headers.items()),
        "",
        "",
    )
    return "\r\n".join(lines).encode() + answer.body


@asynccontextmanager
async def misbehaving(behaviours: Mapping[str, Behaviour]) -> AsyncIterator[Upstream]:
    """Runs the upstream on 127.0.0.1, with forbidden addresses around it."""
    async with asyncio.TaskGroup() as group:
        upstream = Upstream(behaviours, group)
        server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0)
        canary = await asyncio.start_server(upstream.trespass, "127.0.0.2", 0)
        upstream.base = "http://127.0.0.1:{1}".format(*server.sockets[0].getsockname())
        upstream.forbidden_port = canary.sockets[0].getsockname()[1]
        try:
            yield upstream
        finally:
            for work in upstream.at_work:
                work.cancel()
            for each in (server, canary):
                each.close()
