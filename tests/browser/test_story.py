"""The first ten minutes of a person with the README, after `make dev` and without a terminal."""

import re
from collections.abc import Iterator

import pytest
from playwright.async_api import Browser, FilePayload, Page, expect

from tests.browser.people import WIDTHS, complaints, stranger
from tests.environment import ROOT
from tests.inputs import photo
from tests.processes import Running, started

EDITS = "wan2.5-image-to-image"


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """What `make dev` starts."""
    command = ("serve", "--sandbox", "--json", "--port", "0")
    assert "serve --sandbox" in (ROOT / "Makefile").read_text("utf-8")
    with started(*command, folder=tmp_path_factory.mktemp("dev")) as running:
        yield running


async def opened(page: Page, title: str) -> None:
    """Goes to a page by the navigation."""
    menu = page.get_by_label("Menu")
    if await menu.is_visible():
        await menu.click()
    link = page.get_by_role("navigation").get_by_role("link", name=title, exact=True)
    await link.locator("visible=true").click()
    await expect(page.get_by_role("heading", level=1, name=title)).to_be_visible()


@pytest.mark.parametrize("width", WIDTHS)
async def test_a_picture_is_edited_paid_delivered_again_and_found_in_the_browser_alone(
    browser: Browser, dev: Running, width: int
) -> None:
    """Sign in, add an endpoint that refuses, upload a picture and edit it, see the estimate, the
    result, its timeline and its cost, mend the endpoint, replay the delivery, and find the task by
    its prompt. Everything is reached by links and buttons from the first page.
    """
    told, prompt = dev.announcement, f"a paper boat at dusk, 黄昏的纸船, {width}"
    async with stranger(browser, dev.address, width) as page:
        await page.goto("/console/")
        await page.get_by_label("API key").fill(told["key"])
        await page.get_by_role("button", name="Sign in").click()
        await endpoint_that_refuses(page, told["receiver"])
        await edited_picture(page, prompt)
        await page.locator("#result").get_by_role("link", name=re.compile("^task_")).click()
        await expect(page.locator("svg.timeline circle").first).to_be_attached()
        for step in ("task.queued", "callback.received", "image.stored", "task.settled"):
            await expect(page.locator("#task th", has_text=step).first).to_be_visible()
        charge = page.locator("#task tr", has=page.locator("th", has_text="charge"))
        await expect(charge.locator("td").last).to_have_text("2")
        assert await complaints(page) == []
        await broken_delivery_sent_again(page)
        await opened(page, "Tasks")
        await page.get_by_label("Text of your prompts").fill(f"黄昏的纸船, {width}")
        await page.get_by_role("button", name="Filter").click()
        rows = page.locator("#list tbody tr")
        await expect(rows).to_have_count(1)
        await expect(rows).to_contain_text("paper boat")


async def endpoint_that_refuses(page: Page, receiver: str) -> None:
    await opened(page, "Endpoints")
    await page.get_by_role("link", name="Add an endpoint").first.click()
    await page.get_by_label("Address").fill(f"{receiver}?status=410")
    await page.get_by_label("Events").fill("image.task.completed")
    await page.get_by_role("button", name="Add").click()
    await expect(page.locator("#secret")).to_contain_text("whsec_")


async def edited_picture(page: Page, prompt: str) -> None:
    """Uploads a picture and sends it with the prompt. Ends with the result on the page."""
    await opened(page, "Playground")
    await page.get_by_label("Model").select_option(EDITS)
    content = photo("PNG", (480, 400))
    picture = FilePayload(name="boat.png", mimeType="image/png", buffer=content)
    await page.locator("#upload").set_input_files([picture])
    await expect(page.locator(".references li")).to_have_count(1)
    await page.locator("#prompt").fill(prompt)
    await expect(page.locator("#estimate")).to_contain_text("2 credits")
    await page.get_by_role("button", name="Send").locator("visible=true").click()
    result = page.locator("#result")
    await expect(result.locator(".badge")).to_have_text("completed", timeout=30_000)
    await expect(result.locator("figure img")).to_have_js_property("complete", True)
    await expect(result).to_contain_text("2 credits")


async def broken_delivery_sent_again(page: Page) -> None:
    """Sees the failure and its cause, mends the endpoint and replays the delivery."""
    await opened(page, "Deliveries")
    group = page.locator("#groups tbody tr")
    await expect(group).to_contain_text("answered 410")
    await group.get_by_role("link", name=re.compile("^ep_")).click()
    await page.get_by_role("link", name="Edit", exact=True).click()
    address = page.get_by_label("Address")
    await address.fill((await address.input_value()).partition("?")[0])
    await page.get_by_role("button", name="Save").click()
    await expect(page.get_by_text("The endpoint is changed.")).to_be_visible()
    await page.get_by_role("link", name="Enable").click()
    await page.get_by_role("dialog").get_by_role("button", name="Enable").click()
    await expect(page.get_by_text("The endpoint is enabled.")).to_be_visible()
    await opened(page, "Deliveries")
    await page.get_by_role("link", name="Send 1 failed again").click()
    await page.get_by_role("dialog").get_by_role("button", name="Send 1 again").click()
    figure = page.locator(".figure", has_text="Delivered").locator("dd")
    await expect(figure).to_have_text("1", timeout=20_000)
    await opened(page, "Deliveries")
    await expect(page.locator("#groups")).to_contain_text("Nothing fails.")
