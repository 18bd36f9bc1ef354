"""Processes are killed or paused while they store, upload or erase an input image. On both stores
the task is paid once, or fails without being paid.
"""

import asyncio
import signal
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest

from tests.api import SUBMIT, got, refused
from tests.checkpoints import INPUT_CHECKPOINTS
from tests.crash.bench import Bench, benches
from tests.crash.life import LEASE_MS, PATIENCE_S, SETTINGS
from tests.crash.lives import lease_over
from tests.inputs import photo, upload, uploaded
from tests.launcher import Launched
from tests.processes import ADMIN_KEY, UPSTREAM_KEY, service_settings
from tests.servers import kept_port
from tests.waiting import wait_until

JSON = dict[str, Any]
UPLOADS = ("file.begun", "file.saved", "file.stored")
COPIES = ("input.started", "input.uploaded", "input.recorded")
STORES = ("sqlite", "postgres")
AT_ONCE, CASE_S = 12, 200.0
Story = Callable[..., Awaitable[None]]
CASES: dict[str, tuple[str, Story]] = {}
pytestmark = pytest.mark.timeout(480)


class Mortal:
    """A service that dies at a checkpoint and is started again on the same store."""

    def __init__(
        self, bench: Bench, folder: Path, environment: JSON, stack: AsyncExitStack
    ) -> None:
        self.bench, self.folder, self.environment = bench, folder, environment
        self.port, self.stack = kept_port(stack), stack
        self.process: Launched | None = None
        self.processes: list[Launched] = []

    @property
    def shared(self) -> bool:
        """Whether a second process can serve the same store."""
        return "DARKROOM_DATABASE_URL" in self.environment

    async def start(self, port: int = 0, **more: str) -> httpx.AsyncClient:
        """With a port it is a further process."""
        environment = self.environment | more | {"DARKROOM_PORT": str(port or self.port)}
        process = Launched(self.bench.launcher, self.folder, environment)
        self.processes.append(process)
        if not port:
            self.process = process
        await wait_until(lambda: "service.started" in process.printed, PATIENCE_S)
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        url = f"http://127.0.0.1:{port or self.port}"
        client = httpx.AsyncClient(base_url=url, headers=headers, trust_env=False, timeout=100)
        return await self.stack.enter_async_context(client)

    async def died(self) -> None:
        process = self.process
        assert process is not None
        await wait_until(lambda: process.code is not None, PATIENCE_S)
        assert process.code == -signal.SIGKILL
        if self.shared:
            await lease_over()

    async def paused(self) -> httpx.AsyncClient | None:
        """Waits until the process has stopped and its lease is over. The client of another process,
        if one can serve the store.
        """
        process = self.process
        assert process is not None
        await wait_until(lambda: process.stopped, PATIENCE_S)
        if self.shared:
            # The callbacks go to the paused process.
            return await self.start(kept_port(self.stack), DARKROOM_RECONCILE_AFTER_S="1")
        await lease_over()
        return None

    def goes_on(self) -> None:
        assert self.process is not None
        self.process.signal(signal.SIGCONT)

    async def write(self, statement: str) -> None:
        """Changes the store while no process serves it."""
        if self.shared:
            connection = await asyncpg.connect(self.environment["DARKROOM_DATABASE_URL"])
            await connection.execute(statement)
            await connection.close()
            return
        (path,) = (self.folder / "data").glob("*.db")
        with closing(sqlite3.connect(path)) as embedded:
            embedded.execute(statement)
            embedded.commit()

    def blobs(self) -> list[str]:
        return [path.name for path in (self.folder / "data" / "images").rglob("file_*")]

    async def copies(self, file_id: str) -> int:
        """How many files the upstream has of an input image."""
        headers = {"authorization": f"Bearer {UPSTREAM_KEY}"}
        async with httpx.AsyncClient(base_url=self.bench.upstream_url, headers=headers) as client:
            answer = await client.get("/api/v1/files/list", params={"pageSize": 100})
        return sum(file["file_name"].startswith(file_id) for file in answer.json()["data"]["files"])


@asynccontextmanager
async def mortal_on(store: str, bench: Bench, folder: Path) -> AsyncIterator[Mortal]:
    folder.mkdir()
    more = SETTINGS | {"SUBMIT_TIMEOUT_S": "20"}  # a slow machine repeats no upload
    async with AsyncExitStack() as stack:
        if store == "postgres":
            more["DATABASE_URL"] = await stack.enter_async_context(bench.database())
        environment = service_settings(bench.upstream_url, folder, **more)
        environment |= {"DARKROOM_TEST_LEASE_MS": str(LEASE_MS)}
        made = Mortal(bench, folder, environment, stack)
        try:
            yield made
        finally:
            for process in made.processes:
                if process.code is None:
                    process.signal(signal.SIGKILL)


def case(
    *points: str | tuple[str, ...], stores: tuple[str, ...] = STORES
) -> Callable[[Story], Story]:
    """Makes a story a case for each of these arguments, on each of the stores."""

    def register(story: Story) -> Story:
        for point in points:
            words = "-".join([point] if isinstance(point, str) else point)
            for store in stores:
                CASES[f"{story.__name__}-{words}-{store}"] = store, partial(story, point=point)
        return story

    return register


def edit(prompt: str, file: JSON) -> JSON:
    fields = {"model": "wan2.5-image-to-image", "size": "768x768", "image_urls": [file["id"]]}
    return {"prompt": prompt, **fields}


@case(UPLOADS)
async def an_upload_that_got_no_response_is_whole_or_never_shown(
    mortal: Mortal, point: Sequence[str]
) -> None:
    """The process dies at one place after the other. Only the last upload was committed."""
    for number, place in enumerate(point):
        client = await mortal.start(DARKROOM_TEST_KILL=place)
        assert got(await client.get("/v1/files"))["data"] == []
        with suppress(httpx.TransportError):
            await upload(client, photo())
        await mortal.died()
        assert len(mortal.blobs()) == number, place
    client = await mortal.start()
    (kept,) = got(await client.get("/v1/files"))["data"]
    file = await uploaded(client)
    assert got(await client.get("/v1/files"))["data"] == [file, kept]
    for each in (file, kept):
        assert (await client.get(f"/v1/files/{each['id']}/content")).content == photo()


@case(COPIES)
async def a_task_whose_upload_was_cut_is_submitted_once(
    mortal: Mortal, point: Sequence[str]
) -> None:
    """The next worker uploads again, under a name of its own, unless the copy was recorded. It pays
    for one task.
    """
    body: JSON = {}
    key, prompt = {"idempotency-key": "once"}, mortal.folder.name
    for place in point:
        client = await mortal.start(DARKROOM_TEST_KILL=place)
        with suppress(httpx.TransportError):
            body = body or edit(prompt, await uploaded(client))
            await client.post(SUBMIT, json=body, headers=key | {"prefer": "wait=20"})
        await mortal.died()
        assert mortal.bench.upstream.posts[prompt] == []
    client = await mortal.start()
    task = got(await client.post(SUBMIT, json=body, headers=key | {"prefer": "wait=90"}))
    assert task["state"] == "completed", task
    assert mortal.bench.upstream.posts[prompt] == [task["id"]]
    assert await mortal.copies(body["image_urls"][0]) == 2


@case("file.erased")
async def a_task_that_waits_with_an_erased_file_fails_unpaid(mortal: Mortal, point: str) -> None:
    """The file API is away, so the task waits. Then the process dies right after the erasure."""
    away = {"DARKROOM_EVOLINK_FILES_URL": "http://127.0.0.1:9"}
    client = await mortal.start(0, DARKROOM_TEST_KILL=point, **away)
    file, prompt = await uploaded(client), mortal.folder.name
    key = {"idempotency-key": "once"}
    task = got(await client.post(SUBMIT, json=edit(prompt, file), headers=key))
    assert task["state"] == "queued"
    with suppress(httpx.TransportError):
        await client.delete(f"/v1/files/{file['id']}")
    await mortal.died()
    client = await mortal.start()
    refused(await client.get(f"/v1/files/{file['id']}"), 404)
    headers = key | {"prefer": "wait=60"}
    task = got(await client.post(SUBMIT, json=edit(prompt, file), headers=headers))
    assert (task["state"], task["error"]["code"]) == ("failed", "input_gone")
    assert mortal.bench.upstream.posts[prompt] == []


@case("input.uploaded")
async def a_copy_that_expired_between_two_tries_is_made_anew(mortal: Mortal, point: str) -> None:
    """The upstream creates nothing at first, and the process dies. The copy expires meanwhile. The
    next process dies with the next copy.
    """
    client = await mortal.start(DARKROOM_TEST_KILL="submission.recorded")
    file, prompt = await uploaded(client), mortal.folder.name
    body, key = edit(prompt, file), {"idempotency-key": "once"}
    body["sandbox"] = {"submit_status": {"status": 503, "times": 1}}
    with suppress(httpx.TransportError):
        await client.post(SUBMIT, json=body, headers=key | {"prefer": "wait=20"})
    await mortal.died()
    assert await mortal.copies(file["id"]) == 1
    await mortal.write("UPDATE copies SET expires_at = 1")
    await mortal.start(DARKROOM_TEST_KILL=point)
    await mortal.died()
    client = await mortal.start()
    task = got(await client.post(SUBMIT, json=body, headers=key | {"prefer": "wait=90"}))
    assert task["state"] == "completed", task
    assert mortal.bench.upstream.posts[prompt] == [task["id"]] * 2
    assert await mortal.copies(file["id"]) == 3


@case("input.forgotten")
async def room_that_was_made_and_not_used_loses_no_copy(mortal: Mortal, point: str) -> None:
    """The row of a copy goes before the copy, so a later task makes another one."""
    client = await mortal.start(DARKROOM_TEST_KILL=point)
    prompt, key = mortal.folder.name, {"idempotency-key": "once"}
    files = [await uploaded(client, photo("PNG", (400, side))) for side in (400, 401)]
    wait = {"prefer": "wait=60"}
    for _ in range(2):
        done = got(await client.post(SUBMIT, json=edit(prompt, files[0]), headers=wait))
        assert done["state"] == "completed", done
    full = files[1]["id"].encode()
    mortal.bench.upstream.full.add(full)
    with suppress(httpx.TransportError):
        await client.post(SUBMIT, json=edit(prompt, files[1]), headers=key | wait)
    await mortal.died()
    mortal.bench.upstream.full.discard(full)
    client = await mortal.start()
    for file, headers in zip(files[::-1], (key | wait, wait), strict=True):
        task = got(await client.post(SUBMIT, json=edit(prompt, file), headers=headers))
        assert task["state"] == "completed", task
    assert [await mortal.copies(file["id"]) for file in files] == [2, 1]
    assert len(mortal.bench.upstream.posts[prompt]) == 4


# --- pauses


@case(*UPLOADS, stores=("postgres",))
async def an_upload_that_was_paused_is_answered_and_shown(mortal: Mortal, point: str) -> None:
    client = await mortal.start(DARKROOM_TEST_PAUSE=point)
    asked = asyncio.create_task(upload(client, photo()))
    other = await mortal.paused()
    if other is not None:
        shown = got(await other.get("/v1/files"))["data"]
        assert len(shown) == (point == "file.stored")
    mortal.goes_on()
    file = got(await asked, 201)
    assert got(await (other or client).get("/v1/files"))["data"] == [file]


@case("input.uploaded", stores=("sqlite",))
@case(*COPIES, stores=("postgres",))
async def a_worker_paused_with_an_upload_submits_nothing_twice(mortal: Mortal, point: str) -> None:
    """Another process submits the task after the lease. The first one goes on and sends nothing."""
    client = await mortal.start(DARKROOM_TEST_PAUSE=point)
    file, prompt = await uploaded(client), mortal.folder.name
    body, headers = edit(prompt, file), {"idempotency-key": "once", "prefer": "wait=90"}
    asked = asyncio.create_task(client.post(SUBMIT, json=body, headers=headers))
    other = await mortal.paused()
    if other is not None:
        assert got(await other.post(SUBMIT, json=body, headers=headers))["state"] == "completed"
    mortal.goes_on()
    task = got(await asked)
    assert task["state"] == "completed", task
    after = edit(f"{prompt} again", file)
    assert got(await client.post(SUBMIT, json=after, headers=headers | {"idempotency-key": "2"}))
    assert mortal.bench.upstream.posts[prompt] == [task["id"]]


@case("file.erased", stores=("postgres",))
async def an_erasure_that_was_paused_is_complete(mortal: Mortal, point: str) -> None:
    """The file is gone for every process at once. A task that names it is refused."""
    client = await mortal.start(DARKROOM_TEST_PAUSE=point)
    file, prompt = await uploaded(client), mortal.folder.name
    path = f"/v1/files/{file['id']}"
    asked = asyncio.create_task(client.delete(path))
    other = await mortal.paused()
    if other is not None:
        refused(await other.get(path), 404)
        refused(await other.post(SUBMIT, json=edit(prompt, file)), 400, param="image_urls")
    mortal.goes_on()
    assert (await asked).status_code == 204
    refused(await client.get(path), 404)
    assert mortal.blobs() == []


# --- all of them at once, because on PostgreSQL each waits for leases to expire


@pytest.fixture(scope="module")
async def outcomes(
    tmp_path_factory: pytest.TempPathFactory, postgres_server: str, postgres_template: str
) -> AsyncIterator[dict[str, BaseException | None]]:
    folder, places = tmp_path_factory.mktemp("inputs"), asyncio.Semaphore(AT_ONCE)
    async with benches(folder, postgres_server, postgres_template) as bench:

        async def told(name: str) -> None:
            store, story = CASES[name]
            async with places, mortal_on(store, bench, folder / name) as mortal:
                async with asyncio.timeout(CASE_S):
                    await story(mortal)

        ended = await asyncio.gather(*map(told, CASES), return_exceptions=True)
        yield dict(zip(CASES, ended, strict=True))


@pytest.mark.parametrize("name", CASES)
async def test_a_process_that_dies_or_pauses_with_an_input_image_loses_and_doubles_nothing(
    outcomes: dict[str, BaseException | None], name: str
) -> None:
    if (error := outcomes[name]) is not None:
        raise error


def test_every_checkpoint_of_input_images_is_tried() -> None:
    """On both stores, and where the process holds work also by a pause."""
    for store in STORES:
        names = [name for name, (where, _) in CASES.items() if where == store]
        tried = {point for name in names for point in INPUT_CHECKPOINTS if point in name}
        assert tried == INPUT_CHECKPOINTS.keys()
