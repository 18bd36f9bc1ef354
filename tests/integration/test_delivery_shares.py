"""Owners share the delivery slots: one owner's silent endpoints delay no delivery of another."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import pytest
from starlette.responses import Response

from service.backends import DELIVERIES
from service.db.batching import BatchingStore
from service.errors import ConfigurationError
from service.events.endpoints import NewEndpointRow, insert_endpoints
from service.settings import load_settings
from tests.api import got, refused
from tests.outbox import emitted
from tests.silence import silence
from tests.waiting import wait_until
from tests.world import Received, World, subscriber, world

pytestmark = pytest.mark.slow

SILENT, EVENTS, ROUNDS, MEASURED = 1000, 3, 3, 50


async def subscribe(here: World, owner: str, url: str, count: int) -> None:
    resources = here.context.resources
    secret = resources.keyring.encrypt("whsec_" + "QUJD" * 8)
    rows = [
        NewEndpointRow(resources.id("endpoint"), owner, url, ("*",), "", secret, most=SILENT)
        for _ in range(count)
    ]
    assert all(
        await asyncio.gather(*(resources.store.write(insert_endpoints, row) for row in rows))
    )


class Arrivals:
    """When the subscriber got each event."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}
        self.seen = asyncio.Event()

    def answer(self, _: int, request: Received) -> Response:
        self.times[request.headers["webhook-id"]] = time.perf_counter()
        self.seen.set()
        return Response(status_code=204)


class Timed:
    """Times from an event of one owner to its arrival."""

    def __init__(self, here: World, owner: str, arrivals: Arrivals) -> None:
        self._store: BatchingStore = here.context.resources.store
        self._owner = owner
        self._arrivals = arrivals

    async def p99(self) -> float:
        times = []
        for _ in range(MEASURED):
            began = time.perf_counter()
            (event,) = await emitted(self._store, 1, owner=self._owner)
            async with asyncio.timeout(30):
                while event not in self._arrivals.times:
                    self._arrivals.seen.clear()
                    await self._arrivals.seen.wait()
            times.append(self._arrivals.times[event] - began)
        return sorted(times)[MEASURED * 99 // 100 - 1]


@pytest.mark.parametrize("attackers", [1, 10])
async def test_a_thousand_silent_endpoints_delay_no_other_owners_delivery(
    tmp_path: Path, attackers: int
) -> None:
    """The 99th percentile of another owner stays within twice that of a service without the silent
    endpoints, which is measured in turns with it. Without shares it is the timeout of an attempt.
    """
    async with AsyncExitStack() as stack:
        shop = await stack.enter_async_context(subscriber())
        silent, held = await stack.enter_async_context(silence())
        calm, here = [
            await stack.enter_async_context(world(tmp_path / name, delivery_timeout_s=60))
            for name in ("calm", "attacked")
        ]
        arrivals = Arrivals()
        shop.answer = arrivals.answer
        timed = [Timed(each, "victim", arrivals) for each in (calm, here)]
        for each in (calm, here):
            await subscribe(each, "victim", f"{shop.url}/", 1)
        for number in range(attackers):
            await subscribe(here, f"attacker-{number}", silent, SILENT // attackers)
            await emitted(here.context.resources.store, EVENTS, owner=f"attacker-{number}")
        await wait_until(lambda: len(held) >= DELIVERIES // 5)
        for one in timed:
            await one.p99()  # the first requests open connections
        rounds: list[tuple[float, float]] = []
        while len(rounds) < ROUNDS or (len(rounds) < 5 * ROUNDS and slowdown(rounds) > 2):
            without, attacked = [await one.p99() for one in timed]
            rounds.append((without, attacked))
        assert slowdown(rounds) <= 2, rounds
        assert len(held) <= DELIVERIES * (1 - 0.8**attackers) + attackers


def slowdown(rounds: Sequence[tuple[float, float]]) -> float:
    return median(during / before for before, during in rounds)


async def test_an_owner_has_a_limited_number_of_endpoints(tmp_path: Path) -> None:
    """The refusal names the limit and the setting. Other owners, and the operators' endpoints for
    all owners, have a limit of their own. A deleted endpoint makes room.
    """
    async with world(tmp_path, max_endpoints=2) as here, here.owner() as one, here.owner() as other:

        async def create(client: httpx.AsyncClient, **more: Any) -> httpx.Response:
            body = {"url": "https://203.0.114.1/", **more}
            return await client.post("/v1/endpoints", json=body)

        made = [got(await create(one), 201)["id"] for _ in range(2)]
        error = refused(await create(one), 422, "too_many_endpoints")
        assert "at most 2 endpoints (DARKROOM_MAX_ENDPOINTS)" in error["message"]
        assert len(got(await one.get("/v1/endpoints"))["data"]) == 2
        answers = await asyncio.gather(*(create(other) for _ in range(6)))
        assert sorted(answer.status_code for answer in answers) == [201] * 2 + [422] * 4
        for owner in (None, "admin"):
            statuses = [(await create(here.client, owner=owner)).status_code for _ in range(3)]
            assert statuses == [201, 201, 422]
        assert (await one.delete(f"/v1/endpoints/{made[0]}")).status_code == 204
        got(await create(one), 201)


def test_the_limit_of_endpoints_is_a_hundred_unless_it_is_set() -> None:
    assert load_settings({}, None).max_endpoints == 100
    with pytest.raises(ConfigurationError, match="DARKROOM_MAX_ENDPOINTS"):
        load_settings({"DARKROOM_MAX_ENDPOINTS": "0"}, None)
