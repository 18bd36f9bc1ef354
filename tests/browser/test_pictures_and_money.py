"""The gallery, spending, the overview and keys, as a person uses them."""

import io
import re
import zipfile

import pytest
from playwright.async_api import Browser, expect

from tests.browser.people import WIDTHS, complaints, person
from tests.world import World


@pytest.mark.parametrize("width", WIDTHS)
async def test_pictures_are_found_walked_through_and_downloaded(
    browser: Browser, here: World, width: int
) -> None:
    """By the text of the prompt, with the keyboard alone: arrows move, the space bar selects, Enter
    opens the large view.
    """
    prompt = f"a glass bowl {width}"
    task = await here.ended((await here.submit(prompt=prompt, n=2))["id"])
    async with person(browser, here, width) as page:
        await page.goto("/console/gallery")
        await page.get_by_label("Text of the prompt").fill(prompt)
        await page.keyboard.press("Enter")
        await page.wait_for_url("**/console/gallery?prompt=*")
        pictures = page.locator("[data-picture]")
        await expect(pictures).to_have_count(2)
        assert await complaints(page) == []
        await page.locator("main").focus()
        await page.keyboard.press("ArrowRight")
        await expect(pictures.nth(0)).to_be_focused()
        await page.keyboard.press(" ")
        await page.keyboard.press("ArrowRight")
        await expect(pictures.nth(1)).to_be_focused()
        await page.keyboard.press(" ")
        button = page.get_by_role("button", name="Download 2 as zip")
        async with page.expect_download() as saved:
            await button.click()
        with zipfile.ZipFile(io.BytesIO((await (await saved.value).path()).read_bytes())) as zipped:
            assert zipped.namelist() == [f"{task['id']}-0.png", f"{task['id']}-1.png"]
        await pictures.nth(0).focus()
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("heading", name="Picture 1 of 2")).to_be_visible()
        for fact in (task["images"][0]["sha256"], "768 × 768 pixels", "4 credits", prompt):
            await expect(page.locator(".facts")).to_contain_text(fact)
        assert await complaints(page) == []
        await page.keyboard.press("ArrowRight")
        await expect(page.get_by_role("heading", name="Picture 2 of 2")).to_be_visible()


@pytest.mark.parametrize("width", WIDTHS)
async def test_an_owner_gets_a_key_with_a_budget_spends_and_loses_the_key(
    browser: Browser, here: World, width: int
) -> None:
    """The key is shown once. Spending has the bar of the budget, the cost by day and the dearest
    task, and the overview has the figures behind it.
    """
    owner = f"press-{width}"
    async with person(browser, here, width) as page:
        await page.goto("/console/keys")
        await page.get_by_label("Owner").fill(owner)
        await page.get_by_label("Budget in credits").fill("10")
        await page.get_by_role("button", name="Create key").click()
        await expect(page.locator("main")).to_contain_text(re.compile("dk_[a-z2-7]{20,}"))
        key = re.search("dk_[a-z2-7]{20,}", await page.locator("main").inner_text())
        assert key is not None
        assert await complaints(page) == []
        async with here.with_key(key[0]) as client:
            body = {"model": "wan2.5-text-to-image", "prompt": "a hat", "size": "768x768"}
            task = (await client.post("/v1/images/generations", json=body)).json()
        await here.ended(task["id"])
        await page.goto(f"/console/spending?owner={owner}")
        await expect(page.locator("main")).to_contain_text("8 left of 10")
        await expect(page.get_by_role("progressbar", name=f"Budget of {owner}")).to_be_visible()
        await expect(page.locator(f"a[href='/console/tasks/{task['id']}']")).to_be_visible()
        await page.get_by_text("Credits by day as a table").click()
        await expect(page.locator(".plot tbody tr").last).to_contain_text("2")
        async with page.expect_download() as saved:
            await page.get_by_role("link", name="CSV by task").click()
        assert task["id"] in (await (await saved.value).path()).read_text("utf-8")
        assert await complaints(page) == []
        await page.goto("/console/overview")
        await expect(page.locator("#overview")).to_contain_text("From a callback to the event")
        await page.goto("/console/keys")
        assert key[0] not in await page.content()
        row = page.locator("tr", has_text=owner)
        await row.get_by_role("link", name="Revoke").click()
        async with page.expect_response(lambda each: each.request.method == "POST"):
            await page.get_by_role("dialog").get_by_role("button", name="Revoke").click()
        await expect(row).to_contain_text("revoked")
