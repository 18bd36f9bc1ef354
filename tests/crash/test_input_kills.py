"""Processes are killed while they store, upload or erase an input image. On both stores the task is
paid once, or fails without being paid.
"""

import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api import SUBMIT, got, refused
from tests.checkpoints import INPUT_CHECKPOINTS
from tests.crash.bench import Bench, benches
from tests.crash.life import LEASE_MS, PATIENCE_S, SETTINGS, free_port
from tests.crash.lives import lease_over
from tests.inputs import photo, upload, uploaded
from tests.launcher import Launched
from tests.processes import ADMIN_KEY, UPSTREAM_KEY, service_settings
from tests.waiting import wait_until

JSON = dict[str, Any]
UPLOADS, COPIES = ("file.begun", "file.saved"), ("input.started", "input.uploaded")
pytestmark = pytest.mark.timeout(240)


class Mortal:
    """A service that dies at a checkpoint and is started again on the same store."""

    def __init__(
        self, bench: Bench, folder: Path, environment: JSON, stack: AsyncExitStack
    ) -> None:
        self.bench, self.folder, self.environment = bench, folder, environment
        self.port, self.stack = free_port(stack), stack
        self.process: Launched | None = None

    async def start(self, **more: str) -> httpx.AsyncClient:
        environment = self.environment | more | {"DARKROOM_PORT": str(self.port)}
        process = self.process = Launched(self.bench.launcher, self.folder, environment)
        await wait_until(lambda: "service.started" in process.printed, PATIENCE_S)
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        url = f"http://127.0.0.1:{self.port}"
        client = httpx.AsyncClient(base_url=url, headers=headers, trust_env=False, timeout=100)
        return await self.stack.enter_async_context(client)

    async def died(self) -> None:
        process = self.process
        assert process is not None
        await wait_until(lambda: process.code is not None, PATIENCE_S)
        assert process.code == -signal.SIGKILL
        if "DARKROOM_DATABASE_URL" in self.environment:
            await lease_over()

    def blobs(self) -> list[str]:
        return [path.name for path in (self.folder / "data" / "images").rglob("file_*")]

    async def copies(self, file_id: str) -> int:
        """How many files the upstream has of an input image."""
        headers = {"authorization": f"Bearer {UPSTREAM_KEY}"}
        async with httpx.AsyncClient(base_url=self.bench.upstream_url, headers=headers) as client:
            answer = await client.get("/api/v1/files/list", params={"pageSize": 100})
        return sum(file["file_name"].startswith(file_id) for file in answer.json()["data"]["files"])


@pytest.fixture(scope="module")
async def bench(
    tmp_path_factory: pytest.TempPathFactory, postgres_server: str
) -> AsyncIterator[Bench]:
    async with benches(tmp_path_factory.mktemp("inputs"), postgres_server) as made:
        yield made


@pytest.fixture(params=["sqlite", "postgres"])
async def mortal(
    bench: Bench, request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[Mortal]:
    more = dict(SETTINGS)
    async with AsyncExitStack() as stack:
        if request.param == "postgres":
            more["DATABASE_URL"] = await stack.enter_async_context(bench.database())
        environment = service_settings(bench.upstream_url, tmp_path, **more)
        environment |= {"DARKROOM_TEST_LEASE_MS": str(LEASE_MS)}
        made = Mortal(bench, tmp_path, environment, stack)
        yield made
        if made.process is not None and made.process.code is None:
            made.process.signal(signal.SIGKILL)


def edit(prompt: str, file: JSON) -> JSON:
    fields = {"model": "wan2.5-image-to-image", "size": "768x768", "image_urls": [file["id"]]}
    return {"prompt": prompt, **fields}


@pytest.mark.parametrize("point", UPLOADS)
async def test_an_upload_that_got_no_response_is_never_shown(mortal: Mortal, point: str) -> None:
    client = await mortal.start(DARKROOM_TEST_KILL=point)
    with suppress(httpx.TransportError):
        await upload(client, photo())
    await mortal.died()
    assert len(mortal.blobs()) == (point == "file.saved")
    client = await mortal.start()
    assert got(await client.get("/v1/files"))["data"] == []
    file = await uploaded(client)
    assert got(await client.get("/v1/files"))["data"] == [file]


@pytest.mark.parametrize("point", COPIES)
async def test_a_task_whose_upload_was_cut_is_submitted_once(mortal: Mortal, point: str) -> None:
    """The next worker uploads again, under a name of its own, and pays for one task."""
    client = await mortal.start(DARKROOM_TEST_KILL=point)
    file, prompt = await uploaded(client), mortal.folder.name
    body, key = edit(prompt, file), {"idempotency-key": "once"}
    with suppress(httpx.TransportError):
        await client.post(SUBMIT, json=body, headers=key | {"prefer": "wait=20"})
    await mortal.died()
    assert mortal.bench.upstream.posts[prompt] == []
    client = await mortal.start()
    task = got(await client.post(SUBMIT, json=body, headers=key | {"prefer": "wait=90"}))
    assert task["state"] == "completed", task
    assert mortal.bench.upstream.posts[prompt] == [task["id"]]
    assert await mortal.copies(file["id"]) == 1 + (point == "input.uploaded")


async def test_a_task_that_waits_with_an_erased_file_fails_unpaid(mortal: Mortal) -> None:
    """The file API is away, so the task waits. Then the process dies right after the erasure."""
    away = {"DARKROOM_EVOLINK_FILES_URL": "http://127.0.0.1:9"}
    client = await mortal.start(DARKROOM_TEST_KILL="file.erased", **away)
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


def test_every_checkpoint_of_input_images_is_tried() -> None:
    assert {*UPLOADS, *COPIES, "file.erased"} == INPUT_CHECKPOINTS.keys()
