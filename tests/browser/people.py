"""People at the console: a signed-in page of a real browser.

A page that logs an error, breaks its Content-Security-Policy or asks another host fails its test.
"""

import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from playwright.async_api import Browser, Page, async_playwright, expect

from service.signing import hash_api_key
from service.web.sessions import COOKIE
from tests.servers import missing
from tests.world import ADMIN_KEY, World

AXE = Path(sys.prefix) / "node" / "node_modules" / "axe-core" / "axe.min.js"
SERIOUS = ("serious", "critical")
HEIGHT = 800
PATIENCE_MS = 30_000
expect.set_options(timeout=PATIENCE_MS)
# Without a name: all serious rules. Rules of lower impact take half of the time.
VIOLATIONS = """async (name) => {
  const serious = ({ enabled, impact }) => enabled && ["serious", "critical"].includes(impact);
  const names = name ? [name] : axe._audit.rules.filter(serious).map(({ id }) => id);
  const options = { runOnly: { type: "rule", values: names }, resultTypes: ["violations"] };
  return (await axe.run(options)).violations;
}"""
LEAST = 24  # px, the least width and height of a target (WCAG 2.2, 2.5.8)
TARGETS = """() => {
  const within = (link) => {  // a sentence
    if (getComputedStyle(link).display !== "inline") return false;
    let block = link.parentElement;
    while (getComputedStyle(block).display === "inline") block = block.parentElement;
    return block.textContent.trim() !== link.textContent.trim();
  };
  const targets = "a[href], button, input:not([type=hidden]), select, textarea, summary";
  return [...document.querySelectorAll(targets)]
    .filter((each) => each.checkVisibility() && !within(each) && !each.closest(".hidden, .skip"))
    .map((each) => {
      const area = /checkbox|radio/.test(each.type) ? each.labels[0] : each;
      const { width, height } = area.getBoundingClientRect();
      return [each.outerHTML.slice(0, 200), width, height];
    });
}"""


WIDTHS = WIDE, NARROW = 1280, 360
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """The machine's Chromium. Debian's package `chromium` has it, and `chromium-headless-shell` has
    the one without windows, which takes half of the time.
    """
    names = ("chromium-headless-shell", "chromium", "chromium-browser")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        missing("chromium")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=program,
            args=["--no-sandbox", "--disable-dev-shm-usage"],
            timeout=100_000,
        )
        yield browser
        await browser.close()


@asynccontextmanager
async def person(
    browser: Browser, world: World, width: int = WIDE, key: str | None = ADMIN_KEY, **more: Any
) -> AsyncIterator[Page]:
    """A page of somebody who has signed in with the key. None: nobody has signed in."""
    async with stranger(browser, world.url, width, **more) as page:
        if key is not None:
            session = cookie(world, key)
            await page.context.add_cookies([{"name": COOKIE, "value": session, "url": world.url}])
        yield page


@asynccontextmanager
async def stranger(
    browser: Browser, url: str, width: int = WIDE, **more: Any
) -> AsyncIterator[Page]:
    """A page of a person who opens the console at this address for the first time."""
    context = await browser.new_context(
        viewport={"width": width, "height": HEIGHT}, base_url=url, **more
    )
    context.set_default_timeout(PATIENCE_MS)
    page, wrong = await context.new_page(), list[str]()
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    page.on("request", lambda asked: wrong.append(asked.url) if foreign(url, asked.url) else None)
    try:
        yield page
    finally:
        await context.close()
    assert wrong == []


def cookie(world: World, key: str) -> str:
    """The session that the sign-in with this key would make."""
    sessions = world.context.access.sessions
    assert sessions is not None
    _, header = sessions.start(hash_api_key(key))
    return header.partition(";")[0].partition("=")[2]


def foreign(own: str, url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme in ("http", "https") and parts.netloc != urlsplit(own).netloc


async def complaints(page: Page) -> list[str]:
    """What axe-core finds serious on the page, its contrast in each colour scheme, targets that are
    too small, and whether the page is wider than its window.
    """
    if not AXE.exists():
        missing("axe-core")
    if not await page.evaluate("'axe' in window"):
        await page.evaluate(AXE.read_text("utf-8"))
    found = [
        f"{width:.1f} by {height:.1f} px are too small for a target: {html}"
        for html, width, height in await page.evaluate(TARGETS)
        if min(width, height) < LEAST
    ]
    for scheme in SCHEMES:
        await page.emulate_media(color_scheme=scheme)
        rule = None if scheme == "light" else "color-contrast"
        violations = await page.evaluate(VIOLATIONS, rule)
        found += [
            f"{scheme}: {each['id']}: {node['html'][:200]} {node['failureSummary']}"
            for each in violations
            if each["impact"] in SERIOUS
            for node in each["nodes"]
        ]
        wide = await page.evaluate("document.documentElement.scrollWidth - innerWidth")
        if wide > 0:
            found.append(f"{scheme}: the page is {wide} px wider than its window")
    return found
