"""Owners share the delivery slots: one owner's silent endpoints delay no delivery of another."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.backends import DELIVERIES
from service.errors import ConfigurationError
from service.settings import load_settings
from tests.api import got, refused
from tests.bench.silent_endpoints import silenced
from tests.world import world

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("attackers", [1, 10])
async def test_a_thousand_silent_endpoints_delay_no_other_owners_delivery(
    tmp_path: Path, attackers: int
) -> None:
    """Another owner's deliveries arrive within a second. Without shares they would wait for the
    timeout of an attempt, a minute. `tests.bench.silent_endpoints` compares the times.

    Other work of the machine only adds to the times, so the first of three rounds below the limit
    is the last.
    """
    async with silenced(tmp_path, attackers) as (_, attacked, held):
        times: list[float] = []
        while not times or (len(times) < 3 and times[-1] >= 1):
            times.append(await attacked.p99())
        assert times[-1] < 1, times
        assert len(held) <= DELIVERIES * (1 - 0.8**attackers) + attackers


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
