"""What no query has confirmed costs nothing, and a number of images has a limit that sums can bear
(docs/money.md).
"""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
from starlette.responses import JSONResponse, Response

from tests.api import SUBMIT, got, order, refused
from tests.upstream import Upstream, document, failed, picture
from tests.waiting import wait_until
from tests.world import World, world

JSON = dict[str, Any]
LINKS = ("https://result.test/files/0", "https://result.test/files/1")
MAX_N = 1000
FORGED: JSON = {"usage": {"credits_used": 900, "credits_reserved": 900}}


@dataclass(frozen=True)
class Watched:
    """A world whose upstream answers from lists."""

    world: World
    upstream: Upstream

    def linked(self, answer: JSONResponse) -> JSONResponse:
        """The answer with links of the upstream that have pictures."""
        url = self.world.sandbox_url.encode()
        return JSONResponse(json.loads(bytes(answer.body).replace(b"https://result.test", url)))

    async def called_back(self, task: JSON, answer: JSONResponse) -> None:
        """A callback with the right token."""
        url, content = self.world.callback_url(task["id"]), self.linked(answer).body
        reached = await self.world.stranger.post(url, content=bytes(content))
        assert got(reached)["status"] == "accepted"

    async def sums(self, task: JSON) -> tuple[float, float]:
        """What is reserved and what was spent."""
        query = {"task": task["id"]}
        rows = got(await self.world.client.get("/v1/ledger", params=query))["data"]
        held = sum(row["credits"] for row in rows if row["kind"] == "reserve")
        kinds = ("charge", "adjust", "refund")
        return held, sum(row["credits"] for row in rows if row["kind"] in kinds)


@pytest.fixture(scope="module")
async def watched(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Watched]:
    upstream = Upstream()
    upstream.files = {name: [Response(picture(), media_type="image/png")] for name in "01"}
    async with world(tmp_path_factory.mktemp("unproved"), upstream=upstream.app) as made:
        yield Watched(made, upstream)


def completed(*results: str, **usage: float) -> JSONResponse:
    more: JSON = {"usage": usage} if usage else {}
    return document("completed", *results, **more)


@pytest.mark.parametrize(
    ("called", "queried", "spent"),
    [
        (document("completed", LINKS[0], **FORGED), failed("service_error"), 0),
        (document("completed", LINKS[0], **FORGED), completed(LINKS[1]), 2),
        (document("completed", LINKS[0], **FORGED), completed(LINKS[0], credits_used=1), 1),
        (document("completed", *LINKS, **FORGED), completed(*LINKS, credits_used=0), 0),
        (failed("service_error", **FORGED), completed(LINKS[0], credits_used=3), 3),
        (
            document("completed", LINKS[0], billing={"refunded_credits": 3}),
            completed(LINKS[0], credits_used=3),
            3,
        ),
        (completed(LINKS[0], credits_used=1.5), completed(LINKS[0]), 1.5),
        (completed(LINKS[0]), completed(LINKS[0]), 2),
    ],
)
async def test_a_callbacks_cost_counts_if_a_query_says_the_same_and_names_none(
    watched: Watched, called: JSONResponse, queried: JSONResponse, spent: float
) -> None:
    """Until then the reservation stays. In every other case the query's own cost counts, or what
    the upstream reserved.
    """
    here = watched.world
    task = await here.submit()
    progress = document("processing", id=task["upstream_id"], **FORGED)
    await watched.called_back(task, progress)
    assert await watched.sums(task) == (2, 0)
    watched.upstream.queries[task["upstream_id"]] = [watched.linked(queried)]
    await watched.called_back(task, called)

    async def released() -> bool:
        return (await watched.sums(task))[0] == 0

    await wait_until(released)
    assert await watched.sums(task) == (0, spent)


@pytest.mark.parametrize("path", [SUBMIT, "/v1/estimates"])
@pytest.mark.parametrize("model", ["z-image-turbo", "gemini-2.5-flash-image", "dall-e-9"])
async def test_a_number_of_images_has_a_limit_for_every_model(
    watched: Watched, path: str, model: str
) -> None:
    """A refusal names it, and the upstream is not called. Usage sums what was accepted."""
    here = watched.world
    async with here.owner() as client:
        for n in (MAX_N + 1, 0, -1, 2**31, 2**63, 10**30, 4.0, 0.5, "4", True, [4]):
            body = order(model=model, size=None, prompt=f"{path} {model}", n=n)
            error = refused(await client.post(path, json=body), 400, "invalid_parameter", param="n")
            assert error["message"].startswith(f"n must be a whole number from 1 to {MAX_N}, not ")
        assert f"{path} {model}" not in watched.upstream.received
        for n in (1, MAX_N - 1, MAX_N):
            body = order(model=model, size=None, prompt="n images", n=n)
            got(await client.post(path, json=body))
        asked = got(await client.get("/v1/usage"))["totals"]["images_requested"]
        assert asked == (2 * MAX_N if path == SUBMIT else 0)
