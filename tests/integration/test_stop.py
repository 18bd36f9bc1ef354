"""A process that gets a stop signal answers waiting clients, gives its work back and
exits with 0.
"""

import asyncio
import signal
import sqlite3
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.db.queues import QUEUES
from service.signing import Keyring
from tests.processes import ADMIN_KEY, UPSTREAM_KEY, Running, sandbox, service_settings, started
from tests.waiting import wait_until

ORDER = {"model": "wan2.5-text-to-image", "prompt": "a slow lighthouse"}
SUBMIT = "/v1/images/generations"
SECRET = "the secret key of a stop that a test knows too"


@pytest.fixture
def slow_upstream(tmp_path: Path) -> Iterator[Running]:
    """An upstream whose tasks and answers to queries outlast every test."""
    with sandbox("--delay", "600", "--fault", "query_delay=600", folder=tmp_path) as running:
        yield running


@asynccontextmanager
async def client_of(running: Running) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"authorization": f"Bearer {ADMIN_KEY}"}
    async with httpx.AsyncClient(
        base_url=running.address, headers=headers, timeout=90, trust_env=False
    ) as client:
        yield client


async def ended(running: Running, limit_s: float) -> int:
    async with asyncio.timeout(limit_s):
        return await asyncio.to_thread(running.ended)


def leases(path: Path) -> list[Any]:
    """The ends of all leases in the database file."""
    found = []
    with closing(sqlite3.connect(path)) as connection:
        for queue in QUEUES.values():
            column = queue.column("lease_until").name
            found += connection.execute(
                f"SELECT {column} FROM {queue.table.name} WHERE {column} IS NOT NULL"
            ).fetchall()
    return found


async def query_under_way(service: Running, client: httpx.AsyncClient, path: Path) -> None:
    """Waits until the only task has been submitted and a worker queries the upstream for it."""
    await wait_until(lambda: service.logged("task.submitted"))
    await wait_until(lambda: leases(path))
    await client.get("/readyz")  # its commit comes after that of the lease: the worker has begun


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_service_ends_with_zero(tmp_path: Path, number: int) -> None:
    """SIGTERM and Ctrl+C are clean ends. The last log line is `service.stopped`, and the exit code
    is 0.
    """
    with started(
        "serve", folder=tmp_path, **service_settings("https://upstream.invalid", tmp_path)
    ) as service:
        service.signal(number)
        assert await ended(service, 60) == 0
        assert service.logged("service.stopped")[0]["unfinished"] == 0
        assert "service.stopped" in service.lines[-1]


async def test_a_sandbox_ends_with_zero(tmp_path: Path) -> None:
    """SIGTERM ends the sandbox with 0, although a request is still open."""
    with sandbox("--fault", "submit_delay=600", folder=tmp_path) as upstream:
        async with httpx.AsyncClient(
            base_url=upstream.address, timeout=90, trust_env=False
        ) as client:
            key = {"authorization": f"Bearer {UPSTREAM_KEY}"}
            held = asyncio.create_task(client.post(SUBMIT, json=ORDER, headers=key))

            async def created() -> Any:
                return (await client.get("/sandbox/tasks", headers=key)).json()["data"]

            await wait_until(created)
            upstream.signal(signal.SIGTERM)
            assert await ended(upstream, 60) == 0
            await asyncio.gather(
                held, return_exceptions=True
            )  # the request may be cut off or get 500


async def test_who_waits_for_a_task_is_answered_with_it_as_it_is(
    tmp_path: Path, slow_upstream: Running
) -> None:
    """A stop answers `Prefer: wait=60` and `GET /v1/events?wait=60` at once."""
    with started(
        "serve", folder=tmp_path, **service_settings(slow_upstream.address, tmp_path)
    ) as service:
        async with client_of(service) as client:
            held = asyncio.create_task(
                client.post(SUBMIT, json=ORDER, headers={"prefer": "wait=60"})
            )

            async def submitted() -> bool:
                tasks = (await client.get("/v1/tasks")).json()["data"]
                return bool(tasks) and tasks[0]["state"] == "submitted"

            await wait_until(submitted)
            last = (await client.get("/v1/events")).json()["next_after"]
            reader = asyncio.create_task(
                client.get("/v1/events", params={"after": last, "wait": 60})
            )
            await wait_until(lambda: len(service.logged("http.request")) >= 2)
            service.signal(signal.SIGTERM)
            async with asyncio.timeout(30):
                answer = await held
                assert answer.status_code == 200
                assert answer.json()["state"] == "submitted"
                (outcome,) = await asyncio.gather(reader, return_exceptions=True)
            if isinstance(outcome, httpx.Response):  # the stop may have refused the request
                assert outcome.json()["data"] == []
        assert await ended(service, 60) == 0
    assert leases(tmp_path / "data" / "darkroom.db") == []


async def test_work_that_cannot_be_finished_is_given_back(
    tmp_path: Path, slow_upstream: Running
) -> None:
    """After `STOP_S` the process cancels its work and releases the leases. The next start can claim
    the rows at once, and no crash is counted.
    """
    settings = service_settings(
        slow_upstream.address, tmp_path, STOP_S="1", RECONCILE_AFTER_S="0.1", QUERY_TIMEOUT_S="300"
    )
    with started("serve", folder=tmp_path, **settings) as service:
        async with client_of(service) as client:
            task = (await client.post(SUBMIT, json=ORDER)).json()
            path = tmp_path / "data" / "darkroom.db"
            await query_under_way(service, client, path)
        service.signal(signal.SIGTERM)
        assert await ended(service, 60) == 0
        assert service.logged("service.stopped")[0]["unfinished"] == 1
    assert leases(path) == []
    with closing(sqlite3.connect(path)) as connection:
        deaths = QUEUES["settle"].column("deaths").name
        assert connection.execute(
            f"SELECT state, {deaths} FROM tasks WHERE id = ?", [task["id"]]
        ).fetchall() == [("submitted", 0)]


async def test_callbacks_are_taken_until_the_work_in_flight_is_done(
    tmp_path: Path, slow_upstream: Running
) -> None:
    """The next process starts only after this process has ended. Until then it accepts callbacks
    and answers requests for events within seconds.
    """
    more = {
        "STOP_S": "60",
        "RECONCILE_AFTER_S": "0.1",
        "QUERY_TIMEOUT_S": "300",
        "SECRET_KEY": SECRET,
    }
    with started(
        "serve", folder=tmp_path, **service_settings(slow_upstream.address, tmp_path, **more)
    ) as service:
        async with client_of(service) as client:
            task = (await client.post(SUBMIT, json=ORDER)).json()
            await query_under_way(service, client, tmp_path / "data" / "darkroom.db")
            last = (await client.get("/v1/events")).json()["next_after"]
        service.signal(signal.SIGTERM)

        async def told() -> bool:
            async with client_of(service) as client:
                return "stopping" in (await client.get("/readyz")).json().get("causes", ())

        await wait_until(told)
        async with client_of(service) as client:
            token = Keyring([SECRET.encode()]).callback_token("evolink", task["id"])
            body = {
                "id": task["upstream_id"],
                "status": "completed",
                "results": ["http://127.0.0.1/1.png"],
            }
            answer = await client.post(f"/callbacks/evolink/{task['id']}/{token}", json=body)
            assert (answer.status_code, answer.json()) == (200, {"status": "accepted"})
            began = time.monotonic()
            assert (await client.get("/v1/events", params={"after": last, "wait": 60})).json()[
                "data"
            ] == []
            assert 0.9 < time.monotonic() - began < 30, (
                "an answer at once would make the client poll in a tight loop"
            )
        assert service.process.poll() is None


async def test_a_second_interrupt_ends_it_at_once(tmp_path: Path, slow_upstream: Running) -> None:
    """A second Ctrl+C does not wait for running work. The exit code is 130, without a traceback."""
    settings = service_settings(
        slow_upstream.address,
        tmp_path,
        STOP_S="300",
        RECONCILE_AFTER_S="0.1",
        QUERY_TIMEOUT_S="300",
    )
    with started("serve", folder=tmp_path, **settings) as service:
        async with client_of(service) as client:
            held = asyncio.create_task(
                client.post(SUBMIT, json=ORDER, headers={"prefer": "wait=60"})
            )
            await query_under_way(service, client, tmp_path / "data" / "darkroom.db")
            service.signal(signal.SIGINT)
            assert (await held).status_code == 200
        service.signal(signal.SIGINT)
        assert await ended(service, 60) == 130
        assert not any(line.startswith("Traceback") for line in service.lines)


async def test_web_and_worker_apart_stop_cleanly(tmp_path: Path, postgres_url: str) -> None:
    """On PostgreSQL `serve --no-worker` accepts a task and `worker` does its work. Both exit with
    0. The worker serves only the probes, and its links lead to the web process.
    """
    secret = "x" * 32
    with sandbox("--delay", "0.2", folder=tmp_path) as upstream:
        common = {"DATABASE_URL": postgres_url, "SECRET_KEY": secret}
        web = service_settings(upstream.address, tmp_path, **common)
        with started("serve", "--no-worker", folder=tmp_path, **web) as serving:
            work = service_settings(
                upstream.address, tmp_path, **common, CALLBACK_URL=serving.address
            )
            work["DARKROOM_PORT"] = serving.address.rpartition(":")[2]
            with started("worker", "--port", "0", folder=tmp_path, **work) as working:
                assert (
                    working.logged("service.started")[0]["settings"]["base_url"] == serving.address
                )
                async with client_of(serving) as client, client_of(working) as probe:
                    task = (
                        await client.post(SUBMIT, json=ORDER, headers={"prefer": "wait=60"})
                    ).json()
                    assert task["state"] == "completed"
                    assert (await probe.get("/readyz")).json()["status"] == "ok"
                    assert (await probe.get("/v1/tasks")).status_code == 404
                for each, role in ((working, "worker"), (serving, "web")):
                    each.signal(signal.SIGTERM)
                    assert await ended(each, 60) == 0
                    assert each.logged("service.stopped")[0]["role"] == role
