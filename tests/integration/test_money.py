"""Money over HTTP: the ledger, usage and budgets (docs/money.md)."""

import csv
import io
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api import SUBMIT, UNTIL_DONE, got, listed, order, refused, submitted
from tests.integration.test_openapi import check
from tests.world import World, world

FIGURES = ("tasks", "images_requested", "images", "estimated", "reserved", "used", "refunded")


@pytest.fixture(scope="module")
async def own(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    async with world(tmp_path_factory.mktemp("money")) as made:
        yield made


async def usage(client: httpx.AsyncClient, **query: Any) -> Any:
    document = got(await client.get("/v1/usage", params=query))
    check(document, "UsageReport")
    return document


async def entries(client: httpx.AsyncClient, **query: Any) -> list[Any]:
    document = got(await client.get("/v1/ledger", params=query))
    check(document, "BookedEntryList")
    data: list[Any] = document["data"]
    return data


async def test_a_task_has_its_entries_and_its_usage(own: World) -> None:
    async with own.owner(name="painter") as client:
        task = await submitted(client, UNTIL_DONE, n=3)
        found = await entries(client, task=task["id"])
        assert [(entry["kind"], entry["source"]) for entry in found][:2] == [
            ("estimate", "catalogue"),
            ("reserve", "catalogue"),
        ]
        assert {entry["owner"] for entry in found} == {"painter"}
        reserved, used = task["usage"]["credits_reserved"], task["usage"]["credits_used"]
        spent = sum(entry["credits"] for entry in found if entry["kind"] == "charge")
        assert (sum(entry["credits"] for entry in found if entry["kind"] == "reserve"), spent) == (
            0,
            used,
        )
        report = await usage(client, by="task")
        assert report["data"] == [{"key": task["id"], **report["totals"]}]
        assert report["totals"] == {
            "tasks": 1,
            "images_requested": 3,
            "images": 3,
            "estimated": found[0]["credits"],
            "reserved": reserved,
            "used": used,
            "refunded": 0,
        }


@pytest.mark.parametrize("by", ["day", "model", "owner", "task"])
async def test_usage_has_the_same_totals_by_every_key(own: World, by: str) -> None:
    days = {f"{datetime.now(UTC):%Y-%m-%d}"}
    async with own.owner() as client, own.owner(name=f"other-{by}") as other:
        first = await submitted(client, UNTIL_DONE, n=2)
        second = await submitted(client, UNTIL_DONE, model="gpt-image-2", size="1:1")
        await submitted(other, UNTIL_DONE)
        report = await usage(client, by=by)
        keys = [row["key"] for row in report["data"]]
        assert keys == sorted(keys)
        days.add(f"{datetime.now(UTC):%Y-%m-%d}")  # two if midnight was in between
        assert {
            "day": days & set(keys),
            "model": {"wan2.5-text-to-image", "gpt-image-2"},
            "owner": {first["owner"]},
            "task": {first["id"], second["id"]},
        }[by] == set(keys)
        for name in FIGURES:
            assert sum(row[name] for row in report["data"]) == report["totals"][name]
        assert (report["totals"]["tasks"], report["totals"]["images"]) == (2, 3)


async def test_usage_is_cut_by_days_and_times(own: World) -> None:
    async with own.owner() as client:
        task = await submitted(client, UNTIL_DONE)
        created = datetime.fromtimestamp(task["created"], UTC)
        day = created.date()
        before, after = day - timedelta(1), day + timedelta(1)
        for query, count in (
            ({"from": f"{day}"}, 1),
            ({"from": f"{before}", "to": f"{day}"}, 1),
            ({"from": f"{after}"}, 0),
            ({"from": "0001-01-01", "to": "9999-12-31"}, 1),
            ({"to": f"{before}"}, 0),
            ({"to": f"{created:%Y-%m-%dT%H:%M:%SZ}"}, 0),
            ({"from": f"{created:%Y-%m-%dT%H:%M:%SZ}"}, 1),
        ):
            assert (await usage(client, **query))["totals"]["tasks"] == count, query


async def test_usage_comes_as_csv(own: World) -> None:
    async with own.owner() as client:
        model = '=HYPERLINK("x")'
        await submitted(client, UNTIL_DONE)
        unknown = await client.post(SUBMIT, json=order(model=model), headers=UNTIL_DONE)
        assert unknown.status_code == 403
        query = {"by": "model"}
        answer = await client.get("/v1/usage", params=query, headers={"accept": "text/csv"})
        assert answer.headers["content-type"].startswith("text/csv")
        rows = list(csv.DictReader(io.StringIO(answer.text)))
        report = await usage(client, by="model")
        assert [row["key"] for row in rows] == [f"'{model}", "wan2.5-text-to-image"]
        for row, figures in zip(rows, report["data"], strict=True):
            assert {name: float(row[name]) for name in FIGURES} == {
                name: float(figures[name]) for name in FIGURES
            }


async def test_the_ledger_is_read_in_pages(own: World) -> None:
    async with own.owner() as client:
        for _ in range(3):
            await submitted(client, UNTIL_DONE)
        whole = await entries(client)
        read: list[Any] = []
        after: dict[str, str] = {}
        while True:
            page = got(await client.get("/v1/ledger", params={"limit": 5, **after}))
            read += page["data"]
            if page["next_cursor"] is None:
                break
            after = {"after": page["next_cursor"]}
        assert read == whole
        assert len({entry["id"] for entry in whole}) == len(whole) == 12
        assert await entries(client, after=whole[-1]["id"]) == []


async def test_an_owner_sees_only_its_own_money(own: World) -> None:
    async with own.owner(name="rich") as rich, own.owner(name="poor") as poor:
        task = await submitted(rich, UNTIL_DONE)
        entry = (await entries(rich))[0]["id"]
        assert await entries(poor, task=task["id"]) == []
        assert (await usage(poor))["totals"]["tasks"] == 0
        refused(await poor.get("/v1/ledger", params={"after": entry}), 404, param="after")
        for path in ("/v1/usage", "/v1/ledger"):
            refused(await poor.get(path, params={"owner": "rich"}), 403, param="owner")
        assert (await usage(own.client, owner="rich", by="owner"))["data"][0]["key"] == "rich"
        assert {row["owner"] for row in await entries(own.client, owner="rich")} == {"rich"}


@pytest.mark.parametrize(
    ("path", "query", "param"),
    [
        ("usage", {"by": "hour"}, "by"),
        ("usage", {"from": "yesterday"}, "from"),
        ("usage", {"from": "2026-02-30"}, "from"),
        ("usage", {"to": "9999-12-31T00:00:00"}, "to"),
        ("usage", {"since": "2026-02-02"}, "since"),
        ("ledger", {"limit": "0"}, "limit"),
        ("ledger", {"after": "led_nothing"}, "after"),
        ("ledger", {"after": "\x00"}, "after"),
    ],
)
async def test_a_bad_parameter_is_named(
    own: World, path: str, query: dict[str, str], param: str
) -> None:
    refused(await own.client.get(f"/v1/{path}", params=query), 400, param=param)


# --- budgets


async def set_budget(own: World, owner: str, credits: float | None, period: str = "total") -> Any:
    body = {"period": period, "credits": credits}
    return got(await own.client.put(f"/v1/budgets/{owner}", json=body))


async def refusals(own: World) -> float:
    metrics = (await own.client.get("/metrics")).text.splitlines()
    name = "darkroom_budget_refusals_total "
    return next(float(line.removeprefix(name)) for line in metrics if line.startswith(name))


async def test_a_submission_over_the_budget_is_refused_with_the_figures(own: World) -> None:
    async with own.owner(name="thrifty") as client:
        document = await set_budget(own, "thrifty", 5.5, "month")
        check(document, "OwnersBudget")
        assert (document["limit"], document["left"], document["spent"]) == (5.5, 5.5, 0)
        await submitted(client, UNTIL_DONE, n=2)
        before, counted = (await own.sandbox.get("/v1/credits")).json(), await refusals(own)
        error = refused(await client.post(SUBMIT, json=order(n=2)), 402, "budget_exceeded")
        assert error["message"] == (
            "the task needs 4 credits: the budget of 5.5 a month has 1.5 left (4 spent, 0 reserved)"
        )
        assert error["type"] == "insufficient_quota_error"
        assert error["budget"] == {
            "owner": "thrifty",
            "period": "month",
            "limit": 5.5,
            "spent": 4,
            "reserved": 0,
            "left": 1.5,
            "estimate": 4,
        }
        check({"error": error}, "Error")
        assert (await own.sandbox.get("/v1/credits")).json() == before
        assert len(got(await client.get("/v1/tasks"))["data"]) == 1
        assert await refusals(own) == counted + 1
        events = await own.events(type="budget.exhausted")
        (event,) = (event for event in events if event["subject"] == "thrifty")
        assert event["data"]["owner"] == "thrifty"
        await set_budget(own, "thrifty", None)
        await submitted(client, UNTIL_DONE, n=2)


@pytest.mark.parametrize("unpriced", [None, "allow"])
async def test_a_model_without_a_price_needs_the_setting_under_a_budget(
    own: World, tmp_path: Path, unpriced: str | None
) -> None:
    async with AsyncExitStack() as stack:
        here = own
        if unpriced is not None:
            here = await stack.enter_async_context(world(tmp_path, unpriced=unpriced))
        client = await stack.enter_async_context(here.owner(name="unpriced"))
        await set_budget(here, "unpriced", 1)
        answer = await client.post(SUBMIT, json=order(model="gpt-image-2", size="1:1"))
        if unpriced is None:
            error = refused(answer, 402, "budget_exceeded")
            assert "no price of the model, and DARKROOM_UNPRICED is refuse" in error["message"]
            assert (error["budget"]["left"], error["budget"]["estimate"]) == (1, None)
            assert await listed(client) == []
            return
        await here.ended(got(answer)["id"])
        (budget,) = got(await client.get("/v1/budgets"))["data"]
        assert (budget["spent"], budget["left"]) == (1.5, -0.5)
        refused(await client.post(SUBMIT, json=order(model="gpt-image-2", size="1:1")), 402)


async def test_an_estimate_shows_the_callers_budget(own: World) -> None:
    async with own.owner(name="planner") as client:
        body = {"model": "wan2.5-text-to-image", "n": 3}
        assert got(await client.post("/v1/estimates", json=body))["budget"] is None
        await set_budget(own, "planner", 10)
        assert got(await client.post("/v1/estimates", json=body))["budget"] == {
            "limit": 10,
            "spent": 0,
            "reserved": 0,
            "left": 10,
        }


async def test_an_owner_reads_its_own_budget(own: World) -> None:
    async with own.owner(name="reader") as client, own.owner(name="writer") as other:
        for owner, credits in (("reader", 1), ("writer", 2)):
            await set_budget(own, owner, credits)
        document = got(await client.get("/v1/budgets"))
        check(document, "OwnersBudgetList")
        assert [(row["owner"], row["limit"]) for row in document["data"]] == [("reader", 1)]
        everyone = got(await own.client.get("/v1/budgets"))["data"]
        assert {"reader", "writer"} <= {row["owner"] for row in everyone}
        owners, query = [], {"limit": "1"}
        while True:
            page = got(await own.client.get("/v1/budgets", params=query))
            owners += [row["owner"] for row in page["data"]]
            if page["next_cursor"] is None:
                break
            query["cursor"] = page["next_cursor"]
        assert owners == [row["owner"] for row in everyone] == sorted(owners)
        body = {"period": "day", "credits": 100}
        refused(await other.put("/v1/budgets/writer", json=body), 403, "permission_denied")


async def test_a_key_brings_a_budget(own: World) -> None:
    body = {
        "owner": "limited",
        "scopes": ["submit"],
        "budget": {"period": "day", "credits": 0.000001},
    }
    key = got(await own.client.post("/v1/keys", json=body), 201)["key"]
    async with own.with_key(key) as client:
        refused(await client.post(SUBMIT, json=order()), 402, "budget_exceeded")


@pytest.mark.parametrize(
    ("owner", "body", "param"),
    [
        ("painter", {"period": "week", "credits": 1}, "period"),
        ("painter", {"period": "day", "credits": -1}, "credits"),
        ("painter", {"period": "day", "credits": 10**13}, "credits"),
        ("painter", {"period": "day", "credits": "much"}, "credits"),
        ("painter", {"period": "day"}, "credits"),
        ("painter", {"period": "day", "credits": 1, "since": 0}, "since"),
        ("PAINTER", {"period": "day", "credits": 1}, "owner"),
    ],
)
async def test_a_bad_budget_names_its_field(
    own: World, owner: str, body: dict[str, Any], param: str
) -> None:
    refused(await own.client.put(f"/v1/budgets/{owner}", json=body), 400, param=param)
