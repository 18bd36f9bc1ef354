"""The frame of every page: sign-in, navigation, sign-out, at both widths."""

import pytest
from playwright.async_api import Browser, expect

from tests.browser.people import HEIGHT, NARROW, WIDE, WIDTHS, complaints, person
from tests.world import ADMIN_KEY, World


@pytest.mark.parametrize("width", WIDTHS)
async def test_a_person_signs_in_by_a_key_and_out_again(
    browser: Browser, here: World, width: int
) -> None:
    """A page that was asked for before the sign-in opens after it."""
    async with person(browser, here, width, None) as page:
        await page.goto("/console/playground?model=wan2.5-text-to-image")
        assert await complaints(page) == []
        await page.get_by_label("API key").fill(ADMIN_KEY)
        await page.keyboard.press("Enter")
        await page.wait_for_url("**/console/playground?model=*")
        if width < 760:
            await page.get_by_label("Menu").click()
        await page.get_by_role("button", name="Sign out").locator("visible=true").click()
        await page.wait_for_url("**/console/sign-in")
        await page.goto("/console/playground")
        await expect(page.get_by_role("heading", name="Sign in")).to_be_visible()


async def test_the_first_tab_stop_leads_to_the_content(browser: Browser, here: World) -> None:
    async with person(browser, here, NARROW) as page:
        await page.goto("/console/playground")
        await page.keyboard.press("Tab")
        await expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
        await page.keyboard.press("Enter")
        await expect(page.locator("#main")).to_be_focused()


async def test_everything_works_without_scripts(browser: Browser, here: World) -> None:
    """Sign-in, navigation and sign-out are forms and links."""
    async with person(browser, here, NARROW, None, java_script_enabled=False) as page:
        await page.goto("/console/")
        await page.get_by_label("API key").fill(ADMIN_KEY)
        await page.get_by_role("button", name="Sign in").click()
        await page.get_by_label("Menu").click()
        await page.locator(".menu").get_by_role("link", name="Playground").click()
        await page.wait_for_url("**/console/playground")


async def test_axe_finds_nothing_serious_on_any_page(browser: Browser, here: World) -> None:
    """Every page of the navigation with one task in the store, and the API's documentation, at both
    widths. No page is wider than the window.
    """
    await here.ended((await here.submit())["id"])
    async with person(browser, here, WIDE) as page:
        await page.goto("/console/playground")
        links = page.locator("nav.wide a")
        for path in [await link.get_attribute("href") or "" for link in await links.all()]:
            await page.goto(path)
            for width in WIDTHS:
                await page.set_viewport_size({"width": width, "height": HEIGHT})
                assert (path, width, await complaints(page)) == (path, width, [])
