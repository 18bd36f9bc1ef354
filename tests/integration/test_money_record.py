"""The ledger and the sandbox's record of charges agree, over HTTP (docs/money.md)."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api import ASYNC, SUBMIT, UNTIL_DONE, got, order, submitted
from tests.world import World, world


@pytest.fixture(scope="module")
async def own(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    async with world(tmp_path_factory.mktemp("record")) as made:
        yield made


async def record(own: World) -> dict[str, Any]:
    """The sandbox's charges by the service's task."""
    rows = (await own.sandbox.get("/sandbox/charges")).raise_for_status().json()["data"]
    assert len({row["idempotency_key"] for row in rows}) == len(rows)
    return {row["idempotency_key"]: row for row in rows}


CASES = {
    "plain": {"n": 3},
    "failed": {"sandbox": {"fail": "service_error"}},
    "fewer images": {"n": 4, "sandbox": {"images": 2}},
    "fivefold": {"sandbox": {"reserved": 7.5, "usage": 1.5}},
    "dearer": {"sandbox": {"reserved": 0.5, "usage": 4.25}},
    "a refund": {"sandbox": {"refund": 1}},
    "a lost answer": {"sandbox": {"lose_answer": True}},
    "three callbacks": {"sandbox": {"repeat_callback": 3}},
    "cancelled there": {"sandbox": {"cancel": "code"}},
    "by the request": {"model": "gpt-image-1.5", "size": "1:1"},
}


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
async def test_usage_equals_the_upstreams_record(own: World, fields: dict[str, Any]) -> None:
    async with own.owner() as client:
        task = await submitted(client, UNTIL_DONE, **fields)
        totals = got(await client.get("/v1/usage"))["totals"]
        row = (await record(own))[task["id"]]
        assert (totals["used"], totals["refunded"]) == (row["used"], row["refunded"])
        if task["usage"]["credits_reserved"] is not None:  # the answer arrived
            assert totals["reserved"] == row["credits_reserved"]
        entries = got(await client.get("/v1/ledger"))["data"]
        assert sum(entry["credits"] for entry in entries if entry["kind"] == "reserve") == 0


async def test_a_refund_that_comes_later_is_booked_by_the_next_query(own: World) -> None:
    async with own.owner() as client:
        faults = {"refund": 1.5, "refund_after": 0.5}
        task = await submitted(client, UNTIL_DONE, sandbox=faults)
        assert got(await client.get("/v1/usage"))["totals"]["refunded"] == 0
        totals: dict[str, Any] = {"refunded": 0}
        for _ in range(50):
            await own.client.post(f"/v1/tasks/{task['id']}/reconcile")
            await asyncio.sleep(0.05)
            totals = got(await client.get("/v1/usage"))["totals"]
            if totals["refunded"]:
                break
        assert (totals["used"], totals["refunded"]) == (1.5, 1.5)
        row = (await record(own))[task["id"]]
        assert (row["used"], row["refunded"]) == (1.5, 1.5)


async def test_four_retries_of_one_intent_are_one_task_and_one_charge(own: World) -> None:
    """One click, four retries under one key, and each connection is cut in the middle."""
    async with own.owner() as client:
        key = {"idempotency-key": "one-intent-of-a-client"}
        body = order(sandbox={"delay": 0.4})
        timeout, wanted = httpx.Timeout(5, read=0.08), key | UNTIL_DONE
        for _ in range(4):
            with pytest.raises(httpx.ReadTimeout):
                await client.post(SUBMIT, json=body, headers=wanted, timeout=timeout)
        task = got(await client.post(SUBMIT, json=body, headers=key | UNTIL_DONE))
        assert (task["state"], len(task["images"])) == ("completed", 1)
        assert [each["id"] for each in got(await client.get("/v1/tasks"))["data"]] == [task["id"]]
        entries = got(await client.get("/v1/ledger"))["data"]
        assert [entry["kind"] for entry in entries].count("charge") == 1
        charged = (await record(own))[task["id"]]
        assert got(await client.get("/v1/usage"))["totals"]["used"] == charged["used"] == 1.5
        image = await own.client.get(task["images"][0]["url"])
        assert len(image.content) == task["images"][0]["bytes"]


@pytest.fixture(params=["sqlite", "postgres"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """The settings that the processes of one store share. SQLite has one process."""
    if request.param == "sqlite":
        return {}
    url = request.getfixturevalue("postgres_url")
    return {"database_url": url, "secret_key": "k" * 32, "blob_url": f"file://{tmp_path}/images"}


async def test_two_hundred_submissions_against_a_budget_for_fifty(
    tmp_path: Path, shared: dict[str, Any]
) -> None:
    """20 clients, on PostgreSQL over two processes. Exactly 50 submissions are accepted."""
    async with AsyncExitStack() as stack:
        worlds = [
            await stack.enter_async_context(world(tmp_path / name, **shared))
            for name in (("one", "two") if shared else ("one",))
        ]
        first = worlds[0]
        body = {
            "owner": "crowd",
            "scopes": ["submit", "read"],
            "budget": {"period": "total", "credits": 100},
        }
        key = got(await first.client.post("/v1/keys", json=body), 201)["key"]
        clients = [
            await stack.enter_async_context(worlds[n % len(worlds)].with_key(key))
            for n in range(20)
        ]

        async def ten(client: httpx.AsyncClient) -> list[int]:
            posts = (
                client.post(SUBMIT, json=order(sandbox={"usage": 2, "reserved": 2}), headers=ASYNC)
                for _ in range(10)
            )
            return [answer.status_code for answer in await asyncio.gather(*posts)]

        statuses = [each for some in await asyncio.gather(*map(ten, clients)) for each in some]
        assert (statuses.count(200), statuses.count(402)) == (50, 150)
        report = got(await clients[0].get("/v1/usage"))["totals"]
        assert (report["tasks"], report["estimated"]) == (50, 100)
        assert len(await first.events(type="budget.exhausted")) == 1
