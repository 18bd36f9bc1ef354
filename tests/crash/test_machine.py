"""The disk, the database file or the file descriptors fail. The process keeps running, or says in
one line why it stops.
"""

import asyncio
import json
import os
import resource
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import httpx
import pytest

from service.signing import Keyring
from tests.api import JSON, got, order, refused, submitted
from tests.crash.load import bound
from tests.disks import empty, fill, remount, small_disk, unwritable
from tests.processes import ADMIN_KEY, Running, darkroom, sandbox, service_settings, started
from tests.waiting import wait_until

SECRET = "the secret key of a machine that a test knows too"
TOKEN = Keyring([SECRET.encode()]).callback_token
BULK = 200_000  # bytes of a callback, large enough to fill the disk quickly
PATIENCE_S = 90.0

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with sandbox("--delay", "0", folder=tmp_path_factory.mktemp("upstream")) as running:
        yield running


def settings(upstream: Running, folder: Path, **more: str) -> dict[str, str]:
    usual = {
        "SECRET_KEY": SECRET,
        "RECONCILE_AFTER_S": "600",
        "DOWNLOAD_SCHEDULE": "0.3",
        "STOP_S": "2",
    }
    return service_settings(upstream.address, folder, **(usual | more))


@asynccontextmanager
async def serving(
    folder: Path, environment: dict[str, str]
) -> AsyncIterator[tuple[Running, httpx.AsyncClient]]:
    async with AsyncExitStack() as stack:
        running = stack.enter_context(started("serve", folder=folder, **environment))
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        # An idle connection stays open for less time than at the service.
        limits = httpx.Limits(max_keepalive_connections=20, keepalive_expiry=60)
        client = httpx.AsyncClient(
            base_url=running.address, headers=headers, trust_env=False, timeout=60, limits=limits
        )
        yield running, await stack.enter_async_context(client)


async def silent(client: httpx.AsyncClient, count: int) -> list[JSON]:
    """Tasks that have failed at the upstream, which sends no callbacks for them."""
    sent = (
        submitted(client, {}, sandbox={"fail": "service_error", "drop_callback": True})
        for _ in range(count)
    )
    return [await bound(client, task) for task in await asyncio.gather(*sent)]


async def call_back(
    client: httpx.AsyncClient, task: JSON, bulk: int = 0, status: str = "failed"
) -> httpx.Response:
    body = {
        "id": task["upstream_id"],
        "status": status,
        "error": {"code": "service_error", "message": "no"},
        "padding": "x" * bulk,
    }
    return await client.post(
        f"/callbacks/evolink/{task['id']}/{TOKEN('evolink', task['id'])}", content=json.dumps(body)
    )


async def ready(client: httpx.AsyncClient) -> int:
    return (await client.get("/readyz")).status_code


async def ended(client: httpx.AsyncClient, tasks: list[JSON]) -> bool:
    return all(
        [got(await client.get(f"/v1/tasks/{task['id']}"))["state"] == "failed" for task in tasks]
    )


async def terminal_events(client: httpx.AsyncClient) -> Counter[str]:
    events = got(
        await client.get("/v1/events", params={"type": "image.task.failed", "limit": 1000})
    )["data"]
    return Counter(event["subject"] for event in events)


async def outlived(client: httpx.AsyncClient, tasks: list[JSON], running: Running) -> None:
    """Checks that the store commits again: the service accepts every refused callback, and every
    task ends once in the same process.
    """
    for task in tasks:
        assert (await call_back(client, task)).status_code == 200
    await wait_until(lambda: ended(client, tasks), PATIENCE_S)
    assert await terminal_events(client) == dict.fromkeys((task["id"] for task in tasks), 1)
    assert await ready(client) == 200
    assert not running.logged("http.failed")
    assert not running.logged("task.parked")


async def refusing(client: httpx.AsyncClient, tasks: list[JSON], bulk: int = 0) -> list[JSON]:
    """Sends callbacks until the service refuses one because it cannot store it. Returns the tasks
    of the accepted callbacks.
    """
    taken: list[JSON] = []
    for task in tasks:
        answer = await call_back(client, task, bulk)
        if answer.status_code != 200:
            refused(answer, 503, "unavailable")
            return taken
        taken.append(task)
    raise AssertionError("every callback was taken")


async def test_a_full_disk_promises_nothing_and_is_outlived(
    tmp_path: Path, upstream: Running
) -> None:
    """Callbacks and `/readyz` get 503, callbacks with `Retry-After`. A callback that got 200
    survives a kill. The service recovers when the disk has room again.
    """
    with small_disk(tmp_path / "disk", 16) as disk:
        environment = settings(upstream, tmp_path, DATA_DIR=str(disk))
        async with serving(tmp_path, environment) as (running, client):
            tasks = await silent(client, 40)
            fill(disk)
            taken = await refusing(client, tasks, BULK)
            await wait_until(lambda: not_ready(client), PATIENCE_S)
            refused(await client.post("/v1/images/generations", json=order()), 503)
            running.signal(signal.SIGKILL)
            running.ended()
        empty(disk)
        async with serving(tmp_path, environment) as (running, client):
            for task in taken:
                assert (await call_back(client, task, BULK)).status_code == 200
            ids = {task["id"] for task in taken}
            await wait_until(lambda: again(running) >= ids, PATIENCE_S)
            fill(disk)
            await refusing(client, [task for task in tasks if task not in taken] * 2, BULK)
            empty(disk)
            await outlived(client, tasks, running)


def again(running: Running) -> set[str]:
    """The tasks whose callbacks this process judged as repeated."""
    lines = running.logged("callback.received")
    return {line["task_id"] for line in lines if line["verdict"] == "duplicate"}


async def not_ready(client: httpx.AsyncClient) -> bool:
    return await ready(client) == 503


async def test_images_wait_for_room(tmp_path: Path, upstream: Running) -> None:
    """Only the disk for images is full. The service accepts callbacks, retries downloads and
    refuses new submissions with 503. Every task completes once there is room.
    """
    with small_disk(tmp_path / "disk", 4) as disk:
        environment = settings(
            upstream, tmp_path, BLOB_URL=f"file://{disk}/images", MIN_FREE_BYTES="100000"
        )
        async with serving(tmp_path, environment) as (running, client):
            fill(disk)
            refused(await client.post("/v1/images/generations", json=order()), 503, "no_space")
            empty(disk)

            async def accepted() -> JSON | None:  # a look at the disk counts for 0.1 s
                body = order(sandbox={"drop_callback": True})
                answer = await client.post("/v1/images/generations", json=body)
                return answer.json() if answer.status_code == 200 else None

            task = await bound(client, await wait_until(accepted))
            fill(disk)
            assert (await call_back(client, task, status="completed")).status_code == 200
            await wait_until(lambda: running.logged("image.retry"), PATIENCE_S)
            assert "No space left" in running.logged("image.retry")[0]["reason"]
            answer = await client.get("/readyz")
            assert (answer.status_code, answer.json()["causes"]) == (200, ["blobs"])
            (told,) = await wait_until(lambda: running.logged("callback.received"))
            assert told["verdict"] == "accepted"
            empty(disk)

            async def state() -> bool:
                return bool(
                    got(await client.get(f"/v1/tasks/{task['id']}"))["state"] == "completed"
                )

            await wait_until(state, PATIENCE_S)
            (image,) = got(await client.get(f"/v1/tasks/{task['id']}"))["images"]
            assert len((await client.get(image["url"])).content) == image["bytes"]
            assert not running.logged("worker.failed")


async def test_a_disk_that_turns_read_only_is_outlived(tmp_path: Path, upstream: Running) -> None:
    """While every write fails, callbacks and `/readyz` get 503. When writes succeed again, the same
    process continues its work.
    """
    async with serving(tmp_path, settings(upstream, tmp_path)) as (running, client):
        tasks = await silent(client, 3)
        with unwritable(running.process.pid):
            assert await refusing(client, tasks) == []
            assert await ready(client) == 503
            assert got(await client.get(f"/v1/tasks/{tasks[0]['id']}"))["state"] == "submitted"
        await outlived(client, tasks, running)


async def test_a_data_directory_that_cannot_be_written_stops_the_start(
    tmp_path: Path, upstream: Running
) -> None:
    """The start logs one line that names the directory, exits with 1 and changes nothing. With
    write permission it succeeds.
    """
    with small_disk(tmp_path / "disk", 16) as disk:
        environment = settings(upstream, tmp_path, DATA_DIR=str(disk))
        async with serving(tmp_path, environment) as (running, client):
            tasks = await silent(client, 1)
            running.signal(signal.SIGTERM)
            assert running.ended() == 0
        remount(disk, "ro")
        said = await asyncio.to_thread(darkroom, "serve", folder=tmp_path, **environment)
        remount(disk, "rw")
        assert (said.returncode, said.stderr.count("\n")) == (1, 1), said.stderr
        assert str(disk) in said.stderr
        assert "Read-only file system" in said.stderr
        async with serving(tmp_path, environment) as (running, client):
            await outlived(client, tasks, running)


async def test_a_file_that_breaks_under_the_service_is_not_written_any_more(
    tmp_path: Path, upstream: Running
) -> None:
    """A read finds the damage. Every request gets 503, the log has one line for all of them, and a
    metric counts it. The service writes no byte any more, and the next start says why it stops.
    """
    environment, file = settings(upstream, tmp_path), tmp_path / "data" / "darkroom.db"
    async with serving(tmp_path, environment) as (running, client):
        tasks = await silent(client, 30)
        running.signal(signal.SIGTERM)
        assert running.ended() == 0
    async with serving(tmp_path, environment) as (running, client):
        size = file.stat().st_size
        with file.open("r+b") as broken:
            broken.seek(4096)
            broken.write(os.urandom(size - 4096))
        before = file.read_bytes()
        answers = [await client.get("/v1/tasks", params={"limit": 50}) for _ in range(5)]
        assert {answer.status_code for answer in answers} == {503}
        refused(await call_back(client, tasks[0]), 503, "unavailable")
        assert await ready(client) == 503
        running.signal(signal.SIGTERM)
        running.ended()
        assert len(running.logged("store.damaged")) == 1
    assert file.read_bytes() == before
    said = await asyncio.to_thread(darkroom, "serve", folder=tmp_path, **environment)
    assert (said.returncode, said.stderr.count("\n")) == (1, 1), said.stderr
    assert "damaged" in said.stderr
    assert file.read_bytes() == before


def processor_s(pid: int) -> float:
    """The processor time that the process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def opened(pid: int) -> int:
    """Its open descriptors."""
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


async def test_a_process_without_descriptors_lives_on(tmp_path: Path, upstream: Running) -> None:
    """Idle connections use up all descriptors. The service still answers the open connections, does
    not spin, and logs few lines. It recovers when the idle connections close.
    """
    async with (
        serving(tmp_path, settings(upstream, tmp_path)) as (running, client),
        AsyncExitStack() as stack,
    ):
        pid = running.process.pid
        tasks = await silent(client, 2)
        assert await ready(client) == 200
        await client.get("/v1/tasks")
        used = opened(pid)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 20, used + 20))
        idle = []
        for _ in range(100):
            host, port = running.address.removeprefix("http://").split(":")
            with suppress(OSError):
                idle.append((await asyncio.open_connection(host, int(port)))[1])
        await wait_until(lambda: opened(pid) >= used + 18, PATIENCE_S)
        assert (await call_back(client, tasks[0])).status_code == 200
        assert await ready(client) == 200
        began, before = asyncio.get_running_loop().time(), processor_s(pid)
        await wait_until(lambda: asyncio.get_running_loop().time() > began + 1)
        assert processor_s(pid) - before < 0.6 * (asyncio.get_running_loop().time() - began)
        assert len(running.lines) < 200
        for writer in idle:
            writer.transport.abort()
        fresh = await stack.enter_async_context(
            httpx.AsyncClient(base_url=running.address, headers=client.headers, timeout=60)
        )

        async def answered() -> bool:
            with suppress(httpx.HTTPError):
                return (await call_back(fresh, tasks[1])).status_code == 200
            return False

        await wait_until(answered, PATIENCE_S)
        await wait_until(lambda: ended(fresh, tasks), PATIENCE_S)
        assert not running.logged("store.damaged")
