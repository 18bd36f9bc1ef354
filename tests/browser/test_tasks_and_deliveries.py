"""Tasks, a task, deliveries and endpoints, as a person uses them."""

import re
from collections.abc import AsyncIterator

import pytest
from playwright.async_api import Browser, expect
from starlette.responses import Response

from tests.browser.people import WIDTHS, complaints, person
from tests.waiting import wait_until
from tests.world import Subscriber, World, subscriber


@pytest.fixture
async def shop() -> AsyncIterator[Subscriber]:
    async with subscriber() as made:
        yield made


@pytest.mark.parametrize("width", WIDTHS)
async def test_a_task_is_found_by_its_prompt_and_erased_after_a_question(
    browser: Browser, here: World, width: int
) -> None:
    """The list, the task with its timeline, and the dialog that asks."""
    prompt = f"a harbour at dawn {width}"
    task = await here.submit(prompt=prompt)
    await here.ended(task["id"])
    async with person(browser, here, width) as page:
        await page.goto("/console/tasks")
        await page.get_by_label("Text of your prompts").fill(prompt)
        await page.get_by_role("button", name="Filter").click()
        await page.wait_for_url("**/console/tasks?prompt=*")
        assert await complaints(page) == []
        await page.get_by_role("link", name=re.compile("^task_")).click()
        await expect(page.locator("svg.timeline circle").first).to_be_attached()
        assert await complaints(page) == []
        await page.get_by_role("link", name="Erase").click()
        dialog = page.get_by_role("dialog")
        await expect(dialog).to_contain_text("deleted for good")
        await dialog.get_by_role("button", name="Erase").click()
        await expect(page.get_by_role("status").first).to_contain_text("The task is erased.")


@pytest.mark.parametrize("width", WIDTHS)
async def test_an_endpoint_is_added_its_delivery_breaks_and_is_replayed(
    browser: Browser, here: World, shop: Subscriber, width: int
) -> None:
    """The secret is shown once. The button has the count, the replay shows its progress."""
    shop.answer = lambda _n, _request: Response(status_code=503)
    async with person(browser, here, width) as page:
        await page.goto("/console/endpoints")
        await page.get_by_role("link", name="Add an endpoint").first.click()
        await page.get_by_label("Address").fill(f"{shop.url}/{width}")
        await page.get_by_label("Events").fill("image.task.completed")
        await page.get_by_role("button", name="Add").click()
        await expect(page.locator("#secret")).to_contain_text("whsec_")
        assert await complaints(page) == []
        await page.get_by_role("link", name="To the endpoint").click()
        await page.wait_for_url("**/console/endpoints/ep_*")
        assert await complaints(page) == []
        endpoint = page.url.rpartition("/")[2]
        task = await here.submit()
        await here.ended(task["id"])
        await page.goto(f"/console/deliveries?endpoint={endpoint}&state=dead")
        again = page.get_by_role("link", name="Send 1 dead again")

        async def offered() -> bool:
            await page.reload()
            return bool(await again.count())

        await wait_until(offered)
        assert await complaints(page) == []
        shop.answer = lambda _n, _request: Response(status_code=204)
        await again.click()
        dialog = page.get_by_role("dialog")
        await dialog.get_by_role("button", name="Send 1 again").click()
        await page.wait_for_url("**/replays/rpl_*")
        await expect(page.locator(".figure", has_text="Delivered").locator("dd")).to_have_text("1")
        assert await complaints(page) == []
