"""The service is killed again and again while a replay of failed deliveries is under way."""

import json
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.responses import Response

from service.backends import REDELIVERIES
from service.events.replays import PAGE
from tests.api import got
from tests.crash.group import LEASE_MS
from tests.crash.life import PATIENCE_S, SETTINGS, listed
from tests.launcher import Launched, borrowed
from tests.outbox import emitted
from tests.processes import ADMIN_KEY, service_settings
from tests.waiting import wait_until
from tests.world import Subscriber, subscriber, world

EVENTS, DEATHS = 2 * PAGE + 50, (1, PAGE, 2 * PAGE)  # deliveries that are made at each death
pytestmark = pytest.mark.timeout(180)


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest) -> str | None:
    """The URL of a PostgreSQL database. None: the embedded store."""
    return request.getfixturevalue("postgres_url") if request.param == "postgres" else None


async def test_a_replay_that_is_killed_loses_and_doubles_nothing(
    tmp_path: Path, database: str | None
) -> None:
    """Three processes die while `POST /v1/replays` makes its deliveries. The fourth ends it: every
    event arrives, under one delivery each. An event comes twice only if a process died between the
    endpoint's response and the record of it.
    """
    async with AsyncExitStack() as stack:
        shop = await stack.enter_async_context(subscriber())
        launcher = stack.enter_context(borrowed())
        settings: dict[str, Any] = {"secret_key": SETTINGS["SECRET_KEY"]}
        environment = service_settings("http://127.0.0.1:1", tmp_path, **SETTINGS)
        if database is not None:
            settings["database_url"] = environment["DARKROOM_DATABASE_URL"] = database
        environment["DARKROOM_TEST_LEASE_MS"] = str(LEASE_MS)
        ids = await broken(tmp_path, shop, settings)
        replay, process = "", Launched(launcher, tmp_path, environment)
        for made in DEATHS:
            client = await stack.enter_async_context(client_of(process))
            if not replay:
                answer = got(await client.post("/v1/replays", json={"filter": {"state": "dead"}}))
                assert answer["count"] == EVENTS
                replay = answer["id"]
            await reached(client, replay, made)
            process.signal(signal.SIGKILL)
            await ended(process)
            process = Launched(launcher, tmp_path, environment)
        client = await stack.enter_async_context(client_of(process))
        shown = await reached(client, replay, EVENTS, state="done", delivered=EVENTS)
        assert (shown["count"], shown["made"], shown["dead"]) == (EVENTS, EVENTS, 0)
        rows = await listed(client, "deliveries")
        delivered = Counter(row["event"] for row in rows if row["state"] == "delivered")
        assert delivered == Counter(ids)
        came = Counter(each.headers["webhook-id"] for each in shop.received)
        assert came.keys() == set(ids)
        assert came.total() <= EVENTS + len(DEATHS) * REDELIVERIES
        process.signal(signal.SIGTERM)
        await ended(process)


async def ended(process: Launched) -> None:
    await wait_until(lambda: process.code is not None, PATIENCE_S)


async def broken(folder: Path, shop: Subscriber, settings: dict[str, Any]) -> list[str]:
    """The ids of events whose deliveries are dead. Their endpoint works again."""
    shop.answer = lambda _n, _request: Response(status_code=500)
    async with world(folder, delivery_schedule=(0.05,), **settings) as here:
        got(await here.client.post("/v1/endpoints", json={"url": shop.url}), 201)
        ids = await emitted(here.context.resources.store, EVENTS, owner="admin")

        async def dead() -> bool:
            body = {"filter": {"state": "dead"}, "dry_run": True}
            return bool(got(await here.client.post("/v1/replays", json=body))["count"] == EVENTS)

        await wait_until(dead, PATIENCE_S)
    shop.answer = lambda _n, _request: Response(status_code=204)
    shop.received.clear()
    return ids


@asynccontextmanager
async def client_of(process: Launched) -> AsyncIterator[httpx.AsyncClient]:
    await wait_until(lambda: "service.started" in process.printed, PATIENCE_S)
    lines = [json.loads(line) for line in process.printed.splitlines() if line.startswith("{")]
    address = next(line["address"] for line in lines if line["event"] == "service.started")
    headers = {"authorization": f"Bearer {ADMIN_KEY}"}
    async with httpx.AsyncClient(
        base_url=f"http://{address}", headers=headers, trust_env=False, timeout=30
    ) as client:
        yield client


async def reached(
    client: httpx.AsyncClient, replay: str, made: int, **figures: object
) -> dict[str, Any]:
    """The replay as soon as it has made that many deliveries and has these figures."""

    async def look() -> dict[str, Any] | None:
        shown: dict[str, Any] = got(await client.get(f"/v1/replays/{replay}"))
        return shown if shown["made"] >= made and figures.items() <= shown.items() else None

    shown: dict[str, Any] = await wait_until(look, PATIENCE_S)
    return shown
