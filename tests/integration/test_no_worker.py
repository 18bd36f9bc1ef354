"""Web processes without any worker say so (docs/operations.md)."""

import asyncio
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from service.app import Role
from service.db.counters import set_counter
from service.db.transaction import Transaction
from service.errors import StoreUnavailable
from service.upkeep import heartbeats
from service.web.console.pages.overview_page import figures_of
from tests.api import ASYNC, got
from tests.callbacks import raw
from tests.waiting import wait_until
from tests.world import ADMIN_KEY, World, world

pytestmark = pytest.mark.slow

WEB, WORKER = Role(workers=False), Role(web=False)


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    """30 s become 0.8 s, 10 s become 0.05 s."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heartbeats, "SILENT_MS", 800)
        patch.setattr(heartbeats, "BEAT_S", 0.05)
        yield


@contextmanager
def patient() -> Iterator[None]:
    """A start may take longer than 0.8 s."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heartbeats, "SILENT_MS", 60_000)
        yield


def long_ago(tx: Transaction, items: Sequence[None]) -> list[None]:
    """Workers were last alive in 1970."""
    set_counter(tx, heartbeats.COUNTER, 1)
    return list(items)


async def readiness(here: World) -> Any:
    return got(await here.client.get("/readyz"))


async def until(here: World, *causes: str) -> None:
    async def same() -> bool:
        return bool((await readiness(here))["causes"] == list(causes))

    await wait_until(same)


def test_the_limits_are_the_documented_ones() -> None:
    """The quick fixture replaced them, so the module is read anew."""
    names: dict[str, Any] = {"__name__": "again"}
    exec(Path(heartbeats.__file__).read_text(), names)
    assert (names["SILENT_MS"], names["BEAT_S"]) == (30_000, 10.0)


async def test_a_web_process_alone_misses_the_workers(tmp_path: Path) -> None:
    """It gives them time to start, then it is degraded while the queue grows. It can still commit
    callbacks, so the status is 200. Only a key sees the cause.
    """
    async with world(tmp_path, role=WEB) as here:
        with patient():
            assert await readiness(here) == {"status": "ok", "causes": []}
        await here.submit(headers=ASYNC)
        await until(here, "no_worker")
        assert (await readiness(here))["status"] == "degraded"
        url, key = f"{here.url}/readyz", f"authorization: Bearer {ADMIN_KEY}\r\n"
        status, _, body = await raw(url, method="GET", headers=key)
        assert (status, json.loads(body)) == (200, {"status": "degraded", "causes": ["no_worker"]})

        async def told() -> bool:
            status, _, body = await raw(url, method="GET")
            assert (status, json.loads(body).keys()) == (200, {"status"})
            return bool(json.loads(body)["status"] == "degraded")

        await wait_until(told)


async def test_a_sign_of_life_waits_for_a_store_that_does_not_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one comes all the same, and none comes from workers that are gone."""
    alive, failed = True, asyncio.Event()

    async def not_now(*_: object, **__: object) -> None:
        failed.set()
        raise StoreUnavailable("the store does not commit")

    async with world(tmp_path, role=WEB) as here:
        store, watch = here.context.resources.store, here.context.workers_missing
        assert watch is not None
        await wait_until(watch)
        with monkeypatch.context() as patch:
            patch.setattr(store, "write", not_now)
            beating = asyncio.create_task(heartbeats.beat(store, "worker", lambda: alive))
            await failed.wait()
        await until(here)
        alive = False
        await until(here, "no_worker")
        beating.cancel()


async def test_a_process_with_workers_of_its_own_misses_none(tmp_path: Path) -> None:
    """`serve` and `worker` report their own workers, under the cause `workers`."""
    async with world(tmp_path) as here:
        assert here.context.workers_missing is None
        assert await readiness(here) == {"status": "ok", "causes": []}


async def test_workers_of_another_process_are_seen_and_missed(
    tmp_path: Path, postgres_url: str
) -> None:
    """The cause goes when a worker comes, and comes when it goes. A process whose workers died
    gives no sign of life. A second worker is as good as the first.
    """
    shared: dict[str, Any] = {"database_url": postgres_url, "secret_key": "k" * 32}
    async with world(tmp_path / "web", role=WEB, **shared) as web:
        await until(web, "no_worker")
        async with world(tmp_path / "one", role=WORKER, **shared):
            await until(web)
            async with world(tmp_path / "two", role=WORKER, **shared):
                pass
            until_s = asyncio.get_running_loop().time() + 1.2
            await wait_until(lambda: asyncio.get_running_loop().time() > until_s)
            await until(web)
        await until(web, "no_worker")
        before = asyncio.all_tasks()
        async with world(tmp_path / "three", role=Role(), **shared):
            await until(web)
            (workers,) = [
                task for task in asyncio.all_tasks() - before if task.get_name() == "workers"
            ]
            workers.cancel()
            await asyncio.wait([workers])
            await until(web, "no_worker")


async def test_a_web_process_that_starts_later_waits_as_long(
    tmp_path: Path, postgres_url: str
) -> None:
    """The last sign of life may be old, because everything was stopped. Both kinds of process get
    the time to start.
    """
    shared: dict[str, Any] = {"database_url": postgres_url, "secret_key": "k" * 32}
    async with world(tmp_path / "one", role=Role(), **shared) as old:
        await wait_until(lambda: old.context.workers_alive and old.context.workers_alive())
    async with world(tmp_path / "web", role=WEB, **shared) as web:
        with patient():
            await web.context.resources.store.write(long_ago, None)
            assert (await readiness(web))["causes"] == []
        await until(web, "no_worker")


async def test_the_overview_counts_the_processes_that_are_at_work(
    tmp_path: Path, postgres_url: str
) -> None:
    """By role, of those with a sign of life in the last 30 s. Each process counts all of them."""
    shared: dict[str, Any] = {"database_url": postgres_url, "secret_key": "k" * 32}

    async def counted(here: World, **wanted: int) -> None:
        async def same() -> bool:
            text = (await here.client.get("/metrics")).text
            figures = figures_of(text)[0].samples["processes"]
            return {role: int(count) for (role,), count in figures.items() if count} == wanted

        await wait_until(same)

    async with world(tmp_path / "web", role=WEB, **shared) as web:
        await counted(web, web=1)
        async with (
            world(tmp_path / "one", role=WORKER, **shared),
            world(tmp_path / "two", role=WORKER, **shared),
            world(tmp_path / "three", **shared) as both,
        ):
            await counted(web, web=1, worker=2, serve=1)
            await counted(both, web=1, worker=2, serve=1)
        await counted(web, web=1)
        store = web.context.resources.store
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(heartbeats, "FORGET_MS", 0)
            await store.write(heartbeats.forget_processes, None)
    async with world(tmp_path / "embedded") as alone:
        await counted(alone, serve=1)
