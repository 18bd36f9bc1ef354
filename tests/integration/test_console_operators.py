"""The console's pages of keys, spending and the overview, over HTTP."""

import csv
import io
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import httpx
import pytest

from service.web.console.pages.overview_page import figures_of, quantile
from service.web.console.pages.spending_page import every_day
from service.web.sessions import COOKIE
from tests.api import UNTIL_DONE, got, submitted
from tests.browser.people import cookie
from tests.world import ADMIN_KEY, World

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
async def admin(here: World) -> AsyncIterator[httpx.AsyncClient]:
    """A browser in which the admin has signed in."""
    async with httpx.AsyncClient(
        base_url=here.url, cookies={COOKIE: cookie(here, ADMIN_KEY)}
    ) as client:
        yield client


async def shown(client: httpx.AsyncClient, path: str, status: int = 200) -> str:
    answer = await client.get(path)
    assert answer.status_code == status, answer.text
    return answer.text


async def sent(client: httpx.AsyncClient, path: str, **fields: object) -> httpx.Response:
    """Sends a form with the token of the page of keys."""
    token = re.search(r'name="csrf" value="([^"]+)"', await shown(client, "/console/keys"))
    assert token is not None
    headers = {"origin": str(client.base_url).rstrip("/")}
    return await client.post(path, data={"csrf": token[1], **fields}, headers=headers)


# --- keys


async def test_a_key_is_made_with_a_budget_shown_once_and_revoked(
    here: World, admin: httpx.AsyncClient
) -> None:
    answer = await sent(
        admin,
        "/console/keys",
        owner="press",
        scopes=["submit", "read"],
        credits="12.5",
        period="month",
    )
    key = re.search(r"<code>(dk_[a-z2-7]+)</code>", answer.text)
    assert answer.status_code == 200
    assert key is not None
    assert "whsec_" in answer.text
    page = await shown(admin, "/console/keys")
    assert key[1] not in page
    assert "whsec_" not in page
    async with here.with_key(key[1]) as press:
        (budget,) = got(await press.get("/v1/budgets"))["data"]
        assert (budget["limit"], budget["period"]) == (12.5, "month")
        (row,) = got(await here.client.get("/v1/keys", params={"owner": "press"}))["data"]
        asking = await shown(admin, f"/console/keys/{row['id']}/revoke")
        assert "Revoke this key?" in asking
        assert got(await here.client.get("/v1/keys", params={"owner": "press"}))["data"] == [row]
        done = await sent(admin, f"/console/keys/{row['id']}/revoke")
        assert (done.status_code, done.headers["location"]) == (303, "/console/keys")
        (row,) = got(await here.client.get("/v1/keys", params={"owner": "press"}))["data"]
        assert row["revoked_at"] is not None


@pytest.mark.parametrize(
    ("fields", "invalid"),
    [
        ({"owner": HOSTILE, "scopes": ["read"]}, "owner"),
        ({"owner": "press"}, None),
        ({"owner": "press", "scopes": ["read"], "credits": "-1"}, "credits"),
        ({"owner": "press", "scopes": ["read"], "credits": "much"}, "credits"),
    ],
)
async def test_a_wrong_key_is_refused_at_its_field(
    admin: httpx.AsyncClient, fields: dict[str, object], invalid: str | None
) -> None:
    """What was typed is still there, and nothing of it is markup."""
    answer = await sent(admin, "/console/keys", **fields)
    assert answer.status_code == 400
    wrong = re.findall(r'<input id="(\w+)"[^>]* aria-invalid="true"', answer.text)
    assert wrong == ([invalid] if invalid else [])
    assert HOSTILE not in answer.text
    assert 'class="error"' in answer.text


async def test_pages_of_operators_are_for_the_scope_admin(here: World) -> None:
    async with here.owner("submit", "read", name="reader") as client:
        key = client.headers["authorization"].removeprefix("Bearer ")
    async with httpx.AsyncClient(base_url=here.url, cookies={COOKIE: cookie(here, key)}) as reader:
        for path in ("/console/keys", "/console/overview"):
            await shown(reader, path, 403)
        page = await shown(reader, "/console/spending")
        assert 'href="/console/keys"' not in page
        assert "CSV by owner" not in page


# --- spending


async def test_spending_has_the_figures_of_the_usage_report(here: World) -> None:
    """An owner sees its own spending alone, by day and model, with its budget."""
    async with here.owner("submit", "read", name="spender") as client:
        key = client.headers["authorization"].removeprefix("Bearer ")
        tasks = [await submitted(client, UNTIL_DONE, n=n) for n in (3, 1)]
        budget = {"period": "day", "credits": 100}
        got(await here.client.put("/v1/budgets/spender", json=budget))
        usage = got(await client.get("/v1/usage", params={"by": "model"}))
    async with httpx.AsyncClient(base_url=here.url, cookies={COOKIE: cookie(here, key)}) as browser:
        page = await shown(browser, "/console/spending")
        used = usage["totals"]["used"]
        assert used > 0
        assert re.search(rf"<dt>Credits</dt><dd>{used:g}</dd>", page)
        assert f"<strong>{100 - used:g} left</strong> of 100" in page
        assert page.index(tasks[0]["id"]) < page.index(tasks[1]["id"]), "the dearest is first"
        assert page.count("<rect") == 30
        assert f"<title>{datetime.now(UTC):%Y-%m-%d}: {used:g} credits</title>" in page
        answer = await browser.get("/console/spending/usage.csv", params={"by": "task"})
        assert answer.headers["content-type"].startswith("text/csv")
        rows = list(csv.DictReader(io.StringIO(answer.text)))
        assert {row["key"] for row in rows} == {task["id"] for task in tasks}
        for query in ("from=2001-01-01&to=2001-01-31", "from=2026-02-02&to=2026-01-31"):
            past = await shown(browser, f"/console/spending?{query}")
            assert "Nothing was spent in this time" in past
        for query in ("from=yesterday", "owner=admin"):
            assert (await browser.get(f"/console/spending?{query}")).status_code in (400, 403)


def test_every_day_of_the_time_has_a_bar() -> None:
    """Days without a task are between those with one. A long time is cut at its beginning."""
    row = {"key": "2026-03-01", "used": 2, "refunded": 0}
    found = every_day([row], "2026-02-27", "2026-03-02")
    assert [each["key"][5:] for each in found] == ["02-27", "02-28", "03-01", "03-02"]
    assert [each["used"] for each in found] == [0, 0, 2, 0]
    assert len(every_day([row], "2020-01-01T00:00:00Z", "2026-03-02")) == 92
    assert every_day([], "2026-02-27", "2026-03-02") == []


# --- the overview


async def test_the_overview_shows_the_metrics(here: World, admin: httpx.AsyncClient) -> None:
    await submitted(here.client, UNTIL_DONE)
    page = await shown(admin, "/console/overview")
    text = (await here.client.get("/metrics")).text
    figures, buckets = figures_of(text)
    accepted = dict(figures.by("callbacks"))["accepted"]
    assert accepted > 0
    assert re.search(rf'<th scope="row">accepted</th><td class="num">{accepted:g}</td>', page)
    assert buckets["callback_to_event_seconds"][-1][1] > 0
    assert "<h2>Health</h2>" in page
    assert re.search(r'<th scope="row">serve</th><td class="num">1</td>', page)
    assert "Brokers behind, in seconds" in page
    assert quantile(buckets["callback_to_event_seconds"], 0.5) is not None


def test_a_broker_that_is_not_behind_is_shown_too() -> None:
    text = '# TYPE darkroom_sink_lag gauge\ndarkroom_sink_lag{sink="a"} 0\n'
    figures, _ = figures_of(text + 'darkroom_sink_lag{sink="b"} 2.5\n')
    assert figures.by("sink_lag", zeros=True) == [("b", 2.5), ("a", 0.0)]
    assert figures.by("sink_lag") == [("b", 2.5)]


def test_a_quantile_is_interpolated_in_its_bucket() -> None:
    """Nothing counted, or a value above all buckets, has none."""
    buckets = [(1.0, 10.0), (2.0, 20.0), (float("inf"), 20.0)]
    assert quantile(buckets, 0.5) == 1.0
    assert quantile(buckets, 0.75) == 1.5
    assert quantile([(1.0, 0.0), (float("inf"), 0.0)], 0.5) is None
    assert quantile([(1.0, 0.0), (float("inf"), 4.0)], 0.5) is None
    assert quantile([], 0.5) is None
