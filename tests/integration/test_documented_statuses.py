"""Clients that know only the documented statuses and addresses: a cancelled task, the address of a
submission, the upstream's form of an id.
"""

import re
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api import ASYNC, SUBMIT, UNTIL_DONE, got, order, refused, submitted
from tests.upstream import Upstream, document
from tests.waiting import wait_until
from tests.world import World, subscriber, world

JSON = dict[str, Any]
LATE = {"delay": 600}


async def polled(client: httpx.AsyncClient, task_id: str, path: str = "/v1/tasks") -> JSON:
    """The task as a client sees it that polls until one of the documented terminal statuses."""

    async def look() -> JSON | None:
        task = got(await client.get(f"{path}/{task_id}"))
        return task if task["status"] in ("completed", "failed") else None

    task: JSON = await wait_until(look)
    return task


@pytest.mark.parametrize(
    "end", [{"cancel": "status"}, {"cancel": "code"}, {"cancel": "code", "repeat_callback": 2}]
)
@pytest.mark.parametrize("path", ["/v1/tasks", SUBMIT])
async def test_a_task_that_the_upstream_cancelled_is_failed(
    here: World, end: JSON, path: str
) -> None:
    """The error says that it was cancelled, and `state` tells the two apart."""
    task = await submitted(here.client, sandbox=end)
    ended = await polled(here.client, task["id"], path)
    assert (ended["status"], ended["state"]) == ("failed", "cancelled")
    assert ended["error"]["code"] == "request_cancelled"


async def test_a_task_that_its_owner_cancelled_is_failed_everywhere(here: World) -> None:
    """In the response to the cancel, the task, the list, the event and the task's own callback."""
    async with subscriber() as shop, here.owner() as client:
        task = await submitted(client, sandbox=LATE, callback_url=f"{shop.url}/own")
        cancelled = got(await client.post(f"/v1/tasks/{task['id']}/cancel"))
        (own,) = await wait_until(lambda: shop.received)
        (event,) = got(await client.get("/v1/events", params={"type": "image.task.cancelled"}))[
            "data"
        ]
        shown: Sequence[JSON] = [
            cancelled,
            await polled(client, task["id"]),
            got(await client.get("/v1/tasks", params={"state": "cancelled"}))["data"][0],
            event["data"],
            httpx.Response(200, content=own.body).json(),
        ]
        for each in shown:
            assert (each["status"], each["state"]) == ("failed", "cancelled")
            assert each["error"]["code"] == "request_cancelled"


async def test_a_cancelled_task_has_the_documented_code_whatever_the_upstream_wrote(
    tmp_path: Path,
) -> None:
    """A client looks for `request_cancelled`. The upstream's message stays."""
    upstream = Upstream()
    upstream.submits["odd"] = [document("pending", id="task-unified-1")]
    error = {"code": "stopped", "message": "by an operator", "type": "task_error"}
    upstream.queries["task-unified-1"] = [document("cancelled", error=error)]
    async with world(tmp_path, upstream=upstream.app, callback_url=None, query_timeout_s=5) as here:
        task = await submitted(here.client, prompt="odd")
        ended = await polled(here.client, task["id"])
        assert ended["error"] == {**error, "code": "request_cancelled"}


# --- addresses


async def test_a_task_is_under_the_address_of_its_submission(here: World) -> None:
    """By the service's id and by the upstream's, with the same rules as `/v1/tasks/{id}`."""
    async with here.owner() as client, here.owner() as other:
        task = await submitted(client, UNTIL_DONE)
        for name in (task["id"], task["upstream_id"]):
            assert got(await client.get(f"{SUBMIT}/{name}")).items() <= task.items()
            assert got(await client.get(f"{SUBMIT}/{name}/")).items() <= task.items()
            refused(await other.get(f"{SUBMIT}/{name}"), 404, "task_not_found")
        refused(await client.get(f"{SUBMIT}/task_{'a' * 26}"), 404, "task_not_found")
        refused(await client.get(SUBMIT), 405)
        assert (await here.stranger.get(f"{SUBMIT}/{task['id']}")).status_code == 401


@pytest.fixture(scope="module")
async def unified(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """A service that gives its tasks ids of the upstream's form."""
    folder = tmp_path_factory.mktemp("unified")
    async with world(folder, task_id_prefix="task-unified-") as made:
        yield made


async def test_ids_may_have_the_upstreams_form(unified: World) -> None:
    """Everything works with such an id: the task, its images and timeline, and erasure."""
    async with unified.owner() as client, unified.owner() as other:
        task = await submitted(client, UNTIL_DONE)
        assert re.fullmatch("task-unified-[a-z2-7]{26}", task["id"])
        assert task["state"] == "completed"
        assert got(await client.get(f"/v1/tasks/{task['id']}")).items() <= task.items()
        assert got(await client.get(f"/v1/tasks/{task['upstream_id']}")).items() <= task.items()
        assert got(await client.get(f"/v1/tasks/{task['id']}/timeline"))["data"]
        assert (await unified.stranger.get(task["results"][0])).status_code == 200
        refused(await other.get(f"/v1/tasks/{task['id']}"), 404, "task_not_found")
        assert (await client.delete(f"/v1/tasks/{task['id']}")).status_code == 204
        assert (await unified.stranger.get(task["results"][0])).status_code == 410


async def test_a_task_may_build_on_one_with_such_an_id(unified: World) -> None:
    """The service translates its own id, and refuses another owner's."""
    async with unified.owner() as client, unified.owner() as other:
        first = await submitted(client, UNTIL_DONE)
        named = order(model_params={"task_id": first["id"]})
        task = got(await client.post(SUBMIT, json=named, headers=ASYNC))
        assert (await unified.ended(task["id"]))["state"] == "completed"
        refused(
            await other.post(SUBMIT, json=named),
            400,
            "invalid_parameter",
            param="model_params.task_id",
        )


async def test_a_cancelled_status_with_a_code_of_a_failure_counts_as_a_cancel(
    unified: World,
) -> None:
    """An id of the upstream's form takes callbacks as any other."""
    task = await submitted(unified.client, sandbox=LATE)
    body = {"id": task["upstream_id"], "status": "canceled"}
    answer = await unified.stranger.post(unified.callback_url(task["id"]), json=body)
    assert got(answer)["status"] == "accepted"
