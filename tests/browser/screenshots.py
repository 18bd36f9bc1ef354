"""`make screenshots` takes the pictures of docs/console.md: `python -m tests.browser.screenshots`.

A service on the sandbox gets a few tasks, one of which fails, and an endpoint that refuses events.
"""

import asyncio
import tempfile
from pathlib import Path

from starlette.responses import Response

from tests.api import UNTIL_DONE, got, submitted
from tests.browser.people import WIDE, chromium, person
from tests.environment import ROOT
from tests.waiting import wait_until
from tests.world import World, subscriber, world

PROMPTS = (
    "a lighthouse in the fog, oil on canvas",
    "雾中的灯塔，油画",
    "a red bicycle against a white wall",
    "a bowl of lemons in morning light",
)


async def filled(here: World, url: str) -> dict[str, str]:
    """Fills the store. Returns the path of each picture's page."""
    got(await here.client.post("/v1/endpoints", json={"url": f"{url}/orders"}), 201)
    tasks = [
        await submitted(here.client, UNTIL_DONE, prompt=prompt, n=1 + number % 2)
        for number, prompt in enumerate(PROMPTS)
    ]
    sandbox = {"fail": "content_policy_violation"}
    await submitted(here.client, UNTIL_DONE, prompt="a portrait of a celebrity", sandbox=sandbox)
    budget = {"period": "month", "credits": 40}
    got(await here.client.put("/v1/budgets/admin", json=budget))

    async def refused() -> bool:
        groups = got(await here.client.get("/v1/deliveries/groups"))["data"]
        return bool(sum(group["count"] for group in groups) >= len(tasks))

    await wait_until(refused)
    return {
        "playground": f"/console/playground?task={tasks[0]['id']}",
        "task": f"/console/tasks/{tasks[1]['id']}",
        "deliveries": "/console/deliveries",
        "overview": "/console/overview",
    }


async def main() -> None:
    folder = ROOT / "docs" / "images"
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        async with world(Path(name)) as here, subscriber() as shop, chromium() as browser:
            shop.answer = lambda _n, _request: Response("no orders today", status_code=500)
            pages = await filled(here, shop.url)
            async with person(browser, here, WIDE) as page:
                for picture, path in pages.items():
                    await page.goto(path)
                    await page.screenshot(path=folder / f"{picture}.png")


if __name__ == "__main__":
    asyncio.run(main())
