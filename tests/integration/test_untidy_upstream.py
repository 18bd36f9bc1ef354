"""The service with the upstream of the chaos runs: every answer is untidy, and documents are usable
only in part.
"""

from collections.abc import AsyncIterator
from ipaddress import ip_network
from random import Random
from typing import Any

import pytest

from service.tasks import results
from service.upstreams.sandbox import SandboxOptions, create_sandbox
from service.upstreams.sandbox.effects import UNUSABLE
from tests.crash.chaos import upstream as chaos
from tests.crash.chaos.upstream import Noting, Untidy
from tests.crash.chaos.verdict import named
from tests.downloads import bytes_of, quick
from tests.world import LOOPBACK, World, world

JSON = dict[str, Any]
FAULTS: list[JSON] = [
    *({"unusable_field": name} for name in UNUSABLE),
    *({"results": form} for form in ("padded", "text", "objects", "result_data")),
    {"results": "text", "n": 2},
    {"results_late": True, "query_times": 2},
    {"results_late": True, "query_times": 1, "drop_callback": True},
    {"results_late": True, "query_times": 1, "unusable_field": "nul", "results": "padded", "n": 2},
]


@pytest.fixture(scope="module")
async def here(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    options = SandboxOptions(networks=(ip_network(LOOPBACK),), delay_s=0.05, seed=1)
    with quick(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(chaos, "UNTIDY", 1.0)
        patch.setattr(results, "results_wait", lambda _: 0.05)
        app = Untidy(Noting(create_sandbox(options)), Random(1))
        folder = tmp_path_factory.mktemp("untidy")
        async with world(folder, upstream=app, reconcile_after_s=0.5) as made:
            yield made


@pytest.mark.parametrize("faults", FAULTS, ids=str)
async def test_an_untidy_upstream_costs_nothing(faults: JSON, here: World) -> None:
    """The service stores what the sandbox made, byte for byte, after one submission."""
    sandbox = {name: value for name, value in faults.items() if name != "n"}
    n = faults.get("n", 1)
    task = await here.ended((await here.submit(prompt=str(faults), n=n, sandbox=sandbox))["id"])
    assert task["state"] == "completed", await here.steps(task["id"])
    made = (await here.sandbox.get("/sandbox/tasks")).json()["data"]
    sources = [source for source in made if source["idempotency_key"] == task["id"]]
    links = named(sources[0])
    originals = [(await here.sandbox.get(link)).content for link in links]
    assert [await bytes_of(here, image) for image in task["images"]] == originals
    assert (len(sources), len(originals)) == (1, n)
    posts = (await here.sandbox.get(chaos.POSTS)).json()
    assert [post[2] for post in posts if post[1] == task["id"]] == [200]


async def test_what_is_no_200_stays_as_it_is(here: World) -> None:
    """A refusal decides by its status and headers."""
    busy = {"submit_status": {"status": 429, "times": 1, "retry_after": 1}}
    task = await here.ended((await here.submit(sandbox=busy))["id"])
    assert task["state"] == "completed"
    steps = [step["step"] for step in await here.steps(task["id"])]
    assert "task.submission_uncertain" not in steps
