"""Live parts and dialogs: when a page looks again, and what it asks before it acts.

The page's clock stands still, so the tests say when 250 ms are over.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from playwright.async_api import Browser, Page, Request, expect

from tests.browser.people import person
from tests.outbox import emitted
from tests.waiting import wait_until
from tests.world import World

COUNTED = """
window.heard = 0;
const Source = window.EventSource;
window.EventSource = class extends Source {
  addEventListener(type, listener) {
    super.addEventListener(type, (event) => { listener(event); window.heard += 1; });
  }
};
"""
AWAY = """(hidden) => {
  Object.defineProperty(document, "hidden", { configurable: true, get: () => hidden });
  document.dispatchEvent(new Event("visibilitychange"));
}"""


@asynccontextmanager
async def watched(
    browser: Browser, here: World, path: str
) -> AsyncIterator[tuple[Page, list[str]]]:
    """A page whose clock stands still, and the parts that it has fetched again."""
    asked: list[str] = []

    def note(request: Request) -> None:
        if part := request.headers.get("x-fragment"):
            asked.append(part)

    async with person(browser, here) as page:
        page.on("request", note)
        await page.add_init_script(COUNTED)
        await page.clock.install(time="2026-01-01T00:00:00Z")
        async with page.expect_response(lambda each: "/v1/events" in each.url):
            await page.goto(path)
        await page.clock.pause_at("2026-01-01T01:00:00Z")
        yield page, asked


async def heard(page: Page, count: int) -> None:
    async def enough() -> bool:
        return int(await page.evaluate("window.heard")) >= count

    await wait_until(enough)


async def test_many_events_are_one_look_250_ms_after_the_first(
    browser: Browser, here: World
) -> None:
    async with watched(browser, here, "/console/tasks") as (page, asked):
        await emitted(here.context.resources.store, 5, "image.task.failed", "admin")
        await heard(page, 5)
        await page.clock.run_for(249)
        assert asked == []
        await page.clock.run_for(1)
        await wait_until(lambda: asked == ["list"])
        await page.clock.run_for(5000)
        await emitted(here.context.resources.store, 1, "task.parked", "admin")
        await heard(page, 6)
        await page.clock.run_for(5000)
        assert asked == ["list"], "the part does not show such an event"


async def test_a_hidden_tab_asks_for_nothing_and_looks_once_when_it_is_seen_again(
    browser: Browser, here: World
) -> None:
    """A look that was due is not made, and the stream of events is closed."""
    store = here.context.resources.store
    async with watched(browser, here, "/console/tasks") as (page, asked):
        await emitted(store, 1, "image.task.failed", "admin")
        await heard(page, 1)
        await page.evaluate(AWAY, True)
        await emitted(store, 1, "image.task.failed", "admin")
        await page.clock.run_for(60_000)
        assert asked == []
        assert await page.evaluate("window.heard") == 1
        async with page.expect_response(lambda each: "/v1/events" in each.url):
            await page.evaluate(AWAY, False)
        await wait_until(lambda: asked == ["list"])
        await emitted(store, 1, "image.task.failed", "admin")
        await heard(page, 2)
        await page.clock.run_for(250)
        await wait_until(lambda: asked == ["list", "list"])


async def test_a_part_that_looks_by_itself_rests_in_a_hidden_tab(
    browser: Browser, here: World
) -> None:
    async with person(browser, here) as page:
        asked: list[str] = []
        page.on("request", lambda each: asked.append(each.headers.get("x-fragment", "page")))
        await page.clock.install(time="2026-01-01T00:00:00Z")
        await page.goto("/console/overview")
        await page.clock.pause_at("2026-01-01T01:00:00Z")
        await wait_until(lambda: "overview" in asked)
        await page.evaluate(AWAY, True)
        asked.clear()
        await page.clock.run_for(60_000)
        assert asked == []


@pytest.mark.parametrize("act", ["Pause", "Rotate secret", "Delete"])
async def test_an_act_on_an_endpoint_asks_first(browser: Browser, here: World, act: str) -> None:
    """The dialog says what will happen. Escape and its second button leave everything as it is, and
    the focus is where it was.
    """
    body = {"url": f"http://127.0.0.1:1/{act.split(maxsplit=1)[0]}", "types": ["image.at_risk"]}
    made = (await here.client.post("/v1/endpoints", json=body)).json()
    async with person(browser, here) as page:
        await page.goto(f"/console/endpoints/{made['id']}")
        posts: list[str] = []
        page.on("request", lambda each: posts.append(each.url) if each.method == "POST" else None)
        link = page.get_by_role("link", name=act)
        dialog = page.get_by_role("dialog")
        for leave in ("Escape", "Leave it"):
            await link.focus()
            await page.keyboard.press("Enter")
            await expect(dialog.get_by_role("heading")).to_be_visible()
            await expect(dialog.get_by_role("button", name=act)).to_be_visible()
            if leave == "Escape":
                await page.keyboard.press("Escape")
            else:
                await dialog.get_by_role("link", name=leave).click()
            await expect(dialog).to_have_count(0)
            await expect(link).to_be_focused()
        assert posts == []
        await link.click()
        async with page.expect_response(lambda each: each.request.method == "POST"):
            await dialog.get_by_role("button", name=act).click()
        assert len(posts) == 1
    shown = await here.client.get(f"/v1/endpoints/{made['id']}")
    assert shown.status_code == (404 if act == "Delete" else 200)


async def test_a_task_is_cancelled_and_a_key_revoked_only_after_a_question(
    browser: Browser, here: World
) -> None:
    task = await here.submit(sandbox={"delay": 600})

    async def submitted() -> bool:
        return bool((await here.task(task["id"]))["state"] == "submitted")

    await wait_until(submitted)
    key = (await here.client.post("/v1/keys", json={"owner": "leaver", "scopes": ["read"]})).json()
    async with person(browser, here) as page:
        dialog = page.get_by_role("dialog")
        await page.goto(f"/console/tasks/{task['id']}")
        await page.get_by_role("link", name="Cancel").click()
        await expect(dialog).to_contain_text("may still finish and charge the task")
        assert (await here.task(task["id"]))["state"] == "submitted"
        await dialog.get_by_role("button", name="Cancel").click()
        await expect(page.get_by_text("The task is cancelled.")).to_be_visible()
        await page.goto("/console/keys")
        await page.locator(f"a[href='/console/keys/{key['id']}/revoke']").click()
        await expect(dialog).to_contain_text("Revoke this key?")
        async with page.expect_response(lambda each: each.request.method == "POST"):
            await dialog.get_by_role("button", name="Revoke").click()
    assert (await here.task(task["id"]))["state"] == "cancelled"
    (row,) = (await here.client.get("/v1/keys", params={"owner": "leaver"})).json()["data"]
    assert row["revoked_at"] is not None
