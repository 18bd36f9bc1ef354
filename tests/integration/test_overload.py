"""A burst beyond a process's capacity: it answers callbacks in time and tells clients to retry
(docs/overload.md).
"""

import asyncio
import json
import os
import resource
import shutil
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.api import SUBMIT, order
from tests.bench.acknowledgement import SECRET_KEY, prepare
from tests.environment import clean_environment
from tests.overload import callback, starved
from tests.processes import ADMIN_KEY, Running, service_settings, started
from tests.waiting import wait_until
from tests.world import answering

# A manual run sets 20000, the most that the processor can do. The suite uses a smaller number.
FULL = "DARKROOM_TEST_CALLBACKS" in os.environ
CALLBACKS = int(os.environ.get("DARKROOM_TEST_CALLBACKS", "2000"))
# connections, within the process's limit of descriptors
ALL = min(CALLBACKS - 100, resource.getrlimit(resource.RLIMIT_NOFILE)[1] - 500)
UPSTREAMS_PATIENCE_S = 10.0
SENDERS_PATIENCE_S = UPSTREAMS_PATIENCE_S if FULL else 90.0  # the suite shares its machine
AT_ONCE = 300  # connections
# Callbacks by connections. The smaller burst has three on each connection.
BURSTS = {AT_ONCE: CALLBACKS if FULL else 3 * AT_ONCE, ALL: CALLBACKS}
ACCEPTED, AGAIN = ('200 {"status":"accepted"}', "503")
ENDED_S = 60.0 + CALLBACKS / 50

pytestmark = pytest.mark.timeout(120 + CALLBACKS / 25)


async def failed(request: Request) -> Response:
    """The upstream's answer to a query."""
    error = {"code": "service_error", "message": "no", "type": "task_error"}
    return JSONResponse({"id": request.path_params["task_id"], "status": "failed", "error": error})


@pytest.fixture(scope="module")
def waiting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store of `CALLBACKS` tasks that wait for their callbacks, and the callbacks
    in `requests`.
    """
    folder = tmp_path_factory.mktemp("waiting")
    asyncio.run(prepare(folder, "http://upstream.invalid", CALLBACKS))
    lines = (
        json.loads(line)["path"].split("/")[3]
        for line in (folder / "requests").read_text().splitlines()
    )
    (folder / "requests").write_text("\n".join(json.dumps(callback(task_id)) for task_id in lines))
    return folder


@asynccontextmanager
async def burdened(folder: Path, waiting: Path) -> AsyncIterator[Running]:
    """A process with a copy of that store."""
    await asyncio.to_thread(shutil.copytree, waiting / "template", folder / "data")
    async with answering(Starlette(routes=[Route("/v1/tasks/{task_id}", failed)])) as url:
        with started(
            "serve", folder=folder, **service_settings(url, folder, SECRET_KEY=SECRET_KEY)
        ) as running:
            yield running


async def burst(address: str, file: Path, connections: int, begun: asyncio.Event) -> dict[str, Any]:
    arguments = address, str(file), str(connections), str(SENDERS_PATIENCE_S)
    command = (sys.executable, "-m", "tests.overload", *arguments)
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, env=clean_environment({})
    )
    assert process.stdout is not None
    await process.stdout.readline()
    begun.set()
    output, _ = await process.communicate()
    assert process.returncode == 0
    told: dict[str, Any] = json.loads(output)
    print({"connections": connections, **told})
    return told


async def keep_asking(
    client: httpx.AsyncClient, begun: asyncio.Event, over: asyncio.Event, seen: Counter[str]
) -> None:
    await begun.wait()
    while not over.is_set():
        answer = await client.post(SUBMIT, json=order(), headers={"prefer": "respond-async"})
        seen[f"{answer.status_code} {answer.headers.get('retry-after', '')}".strip()] += 1


@pytest.mark.parametrize(("connections", "callbacks"), BURSTS.items())
async def test_a_burst_of_callbacks_is_answered_in_time(
    connections: int, callbacks: int, tmp_path: Path, waiting: Path
) -> None:
    """The process accepts each callback within the upstream's time limit, or answers 503 in time
    and accepts the repeated callback. Clients' requests continue meanwhile.

    No connection is reset, none ends without an answer, and each task ends once. The seconds in
    which another program of the machine had the processor do not count.
    """
    requests = tmp_path / "requests"
    lines = (waiting / "requests").read_text().splitlines()
    requests.write_text("\n".join(lines[:callbacks]))
    async with burdened(tmp_path, waiting) as running:
        begun, over, seen = asyncio.Event(), asyncio.Event(), Counter[str]()
        async with httpx.AsyncClient(
            base_url=running.address, headers={"authorization": f"Bearer {ADMIN_KEY}"}, timeout=60
        ) as client:
            asking = [asyncio.create_task(keep_asking(client, begun, over, seen)) for _ in range(4)]
            starved_s = -starved(running.process.pid)
            told = await burst(running.address, requests, connections, begun)
            starved_s += starved(running.process.pid) + told["starved"]
            over.set()
            await asyncio.gather(*asking)
            print(dict(seen))
            assert told["lost"] == 0
            assert told["seen"].keys() <= {ACCEPTED, AGAIN}
            assert told["seen"][ACCEPTED] == callbacks
            assert told["max"] < UPSTREAMS_PATIENCE_S + (0 if FULL else starved_s)
            assert seen.keys() <= {"200", "404", "503 1"}  # its upstream answers 404 to submissions
            own = seen["200"] + seen["404"]
            assert seen
            if not FULL:  # settling needs two minutes for 20,000
                await wait_until(
                    lambda: len(running.logged("task.settled")) >= callbacks + own, ENDED_S
                )
    taken = [
        line["task_id"]
        for line in running.logged("callback.received")
        if line["verdict"] == "accepted"
    ]
    assert len(set(taken)) == len(taken) == callbacks
    settled = Counter(line["task_id"] for line in running.logged("task.settled"))
    assert set(settled.values()) == {1}
    assert FULL or len(settled) == callbacks + own
    assert not running.logged("http.failed")
    assert not running.logged("worker.failed")
