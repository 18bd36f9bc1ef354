"""`reconcile` fetches the lost results of a task while the upstream still has them."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.downloads import bytes_of, downloading, link, made, noise, served
from tests.upstream import Upstream, document, error, page, picture
from tests.world import JSON, World


async def reconciled(here: World, task: JSON) -> None:
    answer = await here.client.post(f"/v1/tasks/{task['id']}/reconcile")
    assert (answer.status_code, answer.json()["state"]) == (200, "failed")


async def told_late(here: World, task: JSON) -> JSON:
    """The one event about late results."""
    return await here.told(task["id"], "task.late_result")


async def stands(here: World, before: JSON) -> JSON:
    """The task, whose state, error and one terminal event are as they were."""
    after = await here.task(before["id"])
    names = ("state", "status", "error", "results")
    assert [after[name] for name in names] == [before[name] for name in names]
    types = [event["type"] for event in await here.events(task=before["id"])]
    assert [name for name in types if name.startswith("image.task.")] == [
        "image.task.submitted",
        "image.task.failed",
    ]
    return after


@pytest.fixture(scope="module")
async def here(
    upstream: Upstream, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[World]:
    """A world in which a link lives for 0.3 s."""
    folder = tmp_path_factory.mktemp("revived")
    async with downloading(folder, upstream, evolink_result_ttl_s=0.3) as made:
        yield made


LOSSES = {
    "server error": error(500, "internal_error"),
    "gateway": page(524),
    "html": page(200),
    "half a picture": served(picture()[:40]),
    "too large": served(picture() + bytes(600_000)),
    "too many pixels": served(picture(size=(401, 250))),
}


@pytest.mark.parametrize("name", LOSSES)
async def test_a_lost_result_is_saved_late(name: str, here: World, upstream: Upstream) -> None:
    """State and terminal event stand. The picture is saved and listed, operators are told once."""
    upstream.files["kept"] = [served(noise())]
    upstream.files[name] = [LOSSES[name]]
    task = await made(here, upstream, link(here, "kept"), link(here, name))
    before = await here.ended(task["id"])
    assert (before["state"], before["error"]["code"]) == ("failed", "results_lost")
    upstream.files[name] = [served(picture())]
    await reconciled(here, task)
    told = await told_late(here, task)
    assert (told["stored"], told["lost"], told["state"]) == (2, 0, "failed")
    after = await stands(here, before)
    assert [image["index"] for image in after["images"]] == [0, 1]
    assert await bytes_of(here, after["images"][1]) == picture()
    assert after["quarantine"] is None


@pytest.mark.parametrize("first", ["dead", "https://10.0.0.5/a.png", "https://2130706433/a.png"])
async def test_the_upstreams_fresh_link_is_fetched(
    first: str, here: World, upstream: Upstream
) -> None:
    """The link in the store is dead, the one in the upstream's answer is not."""
    upstream.files |= {"dead": [error(500, "internal_error")], "fresh": [served(picture())]}
    task = await made(here, upstream, link(here, "dead") if first == "dead" else first)
    before = await here.ended(task["id"])
    upstream.queries[task["upstream_id"]] = [document("completed", link(here, "fresh"))]
    await reconciled(here, task)
    assert (await told_late(here, task))["stored"] == 1
    assert len((await stands(here, before))["images"]) == 1


async def test_reconciling_twice_at_once_saves_once(here: World, upstream: Upstream) -> None:
    upstream.files["twice"] = [error(500, "internal_error")]
    task = await made(here, upstream, link(here, "twice"))
    before = await here.ended(task["id"])
    upstream.files["twice"] = [served(picture())]
    for _ in range(2):
        await reconciled(here, task)
    assert (await told_late(here, task))["stored"] == 1
    await reconciled(here, task)  # nothing is missing any more
    assert len((await stands(here, before))["images"]) == 1
    assert (await told_late(here, task))["stored"] == 1


async def test_a_corrected_setting_and_reconcile_save_what_was_lost_before(tmp_path: Path) -> None:
    """The host was not listed until its link was dead for the service."""
    upstream, wrong = Upstream(), {"evolink_result_hosts": "files.example"}
    upstream.files["late.png"] = [served(picture())]
    async with downloading(tmp_path, upstream, evolink_result_ttl_s=0.3, **wrong) as here:
        task = await made(here, upstream, link(here, "late.png"))
        before = await here.ended(task["id"])
        assert "DARKROOM_EVOLINK_RESULT_HOSTS" in before["error"]["message"]
    async with downloading(tmp_path, upstream) as here:
        upstream.queries[task["upstream_id"]] = [document("completed", link(here, "late.png"))]
        await reconciled(here, task)
        assert (await told_late(here, task))["stored"] == 1
        assert len((await stands(here, before))["images"]) == 1
