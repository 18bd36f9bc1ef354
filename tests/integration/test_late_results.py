"""Results that arrive after the service ended a task by itself, and operators' decisions, over real
sockets.
"""

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from starlette.responses import Response

from service.queue import worker
from service.tasks import confirm_worker
from tests.callbacks import verdict
from tests.upstream import Cut, Upstream, document, error, picture
from tests.waiting import wait_until
from tests.world import World, world

pytestmark = pytest.mark.slow

Task = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Shortens the polling of the workers and the time between queries."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "LOOK_S", 0.05)
        patch.setattr(confirm_worker, "next_query_wait", lambda *_: 0.05)
        yield


@pytest.fixture(scope="module")
def upstream() -> Upstream:
    made = Upstream()
    made.files["0.png"] = [Response(picture(), media_type="image/png")]
    return made


@pytest.fixture(scope="module")
async def here(
    upstream: Upstream, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[World]:
    """A world that ends an uncertain submission soon."""
    async with world(
        tmp_path_factory.mktemp("late"), upstream=upstream.app, uncertain_after_s=0.05
    ) as made:
        yield made


@pytest.fixture(scope="module")
async def patient(
    upstream: Upstream, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[World]:
    """A world in which an uncertain task stays uncertain until an operator decides."""
    async with world(
        tmp_path_factory.mktemp("patient"),
        upstream=upstream.app,
        uncertain_after_s=600,
        download_schedule="600",
    ) as made:
        yield made


async def in_state(here: World, task_id: str, state: str) -> Task:
    async def look() -> Task | None:
        task = await here.task(task_id)
        return task if task["state"] == state else None

    task: Task = await wait_until(look)
    return task


async def doubtful(here: World, upstream: Upstream, prompt: str, *then: Response) -> Task:
    """A task whose submission got a truncated answer."""
    upstream.submits[prompt] = [Cut(b'{"id": "task-un'), *then]
    return await here.submit(prompt=prompt, headers={"prefer": "respond-async"})


async def call(here: World, task: Task, **body: Any) -> str:
    return await verdict(here, task, json.dumps(body).encode())


async def told_late(here: World, task: Task) -> Task:
    async def look() -> Task | None:
        return next(iter(await here.events(task=task["id"], type="task.late_result")), None)

    event: Task = await wait_until(look)
    return event


async def test_a_picture_proved_after_submission_uncertain_is_saved_and_listed(
    here: World, upstream: Upstream
) -> None:
    """The task stays failed with its one terminal event. The service stores the paid image and
    reports it by `task.late_result`.
    """
    task = await in_state(here, (await doubtful(here, upstream, "late proof"))["id"], "failed")
    assert task["error"]["code"] == "submission_uncertain"
    link = f"{here.sandbox_url}/files/0.png"
    upstream.queries["task-unified-late"] = [
        document("completed", link, usage={"credits_used": 1.5})
    ]
    assert (
        await call(here, task, id="task-unified-late", status="completed", results=[link])
        == "accepted"
    )
    event = await told_late(here, task)
    assert (event["data"]["stored"], event["data"]["lost"], event["data"]["credits_used"]) == (
        1,
        0,
        1.5,
    )
    late = await here.task(task["id"])
    assert [late[name] for name in ("state", "error", "results")] == ["failed", task["error"], []]
    assert late["usage"]["credits_used"] == 1.5
    (image,) = late["images"]
    assert (await here.stranger.get(image["url"])).content == picture()
    types = [event["type"] for event in await here.events(task=task["id"])]
    assert types == ["image.task.failed", "task.late_result"]
    assert "task.late_result" in [step["step"] for step in await here.steps(task["id"])]
    assert (
        await call(here, task, id="task-unified-late", status="completed", results=[link])
        == "duplicate"
    )


async def test_an_operator_gives_an_uncertain_task_its_id(
    patient: World, upstream: Upstream
) -> None:
    """The service queries the upstream at once under the given id, and the task continues
    normally.
    """
    task = await in_state(
        patient, (await doubtful(patient, upstream, "by hand"))["id"], "uncertain"
    )
    upstream.queries["task-unified-hand"] = [
        document("completed", f"{patient.sandbox_url}/files/0.png")
    ]
    answer = await patient.client.post(
        f"/v1/tasks/{task['id']}/resolve", json={"upstream_id": "task-unified-hand"}
    )
    assert (answer.status_code, answer.json()["upstream_id"]) == (200, "task-unified-hand")
    assert len((await patient.ended(task["id"]))["images"]) == 1
    other = await in_state(
        patient, (await doubtful(patient, upstream, "by hand, too"))["id"], "uncertain"
    )
    taken = await patient.client.post(
        f"/v1/tasks/{other['id']}/resolve", json={"upstream_id": "task-unified-hand"}
    )
    assert (taken.status_code, taken.json()["error"]["param"]) == (409, "upstream_id")


@pytest.mark.parametrize(("decision", "state"), [("failed", "failed"), ("resubmit", "submitted")])
async def test_an_operator_decides_an_uncertain_task(
    decision: str, state: str, patient: World, upstream: Upstream
) -> None:
    """`failed` ends the task as `submission_uncertain`. `resubmit` sends the same body again under
    the same idempotency key.
    """
    prompt = f"decided as {decision}"
    task = await doubtful(
        patient, upstream, prompt, document("pending", id=f"task-unified-{decision}")
    )
    await in_state(patient, task["id"], "uncertain")
    answer = await patient.client.post(f"/v1/tasks/{task['id']}/resolve", json={"as": decision})
    assert answer.status_code == 200, answer.text
    task = await in_state(patient, task["id"], state)
    assert (task["error"] or {"code": None})["code"] == (
        "submission_uncertain" if decision == "failed" else None
    )
    sent = upstream.received[prompt]
    assert len(sent) == (1 if decision == "failed" else 2)
    assert len({(request.headers["idempotency-key"], request.body) for request in sent}) == 1
    again = await patient.client.post(f"/v1/tasks/{task['id']}/resolve", json={"as": decision})
    assert (again.status_code, again.json()["error"]["code"]) == (409, "task_not_uncertain")


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"as": "maybe"},
        {"upstream_id": "x", "as": "failed"},
        {"as": "failed", "by": "me"},
        *({"upstream_id": id} for id in ("", "a b", "..", ".hidden", "x\n", "ü", "x" * 201)),
    ],
)
async def test_a_decision_is_one_of_three(
    body: dict[str, str], patient: World, upstream: Upstream
) -> None:
    """The API refuses every other decision with 400 and changes nothing."""
    task = await in_state(
        patient, (await doubtful(patient, upstream, f"undecided {body}"))["id"], "uncertain"
    )
    answer = await patient.client.post(f"/v1/tasks/{task['id']}/resolve", json=body)
    assert answer.status_code == 400, answer.text
    assert (await patient.task(task["id"]))["state"] == "uncertain"


async def test_reconcile_asks_the_upstream_and_fetches_pictures_now(
    patient: World, upstream: Upstream
) -> None:
    """Reconcile runs a query or a download at once that would otherwise wait for its due time."""
    upstream.submits["now"] = [document("pending", id="task-unified-now")]
    upstream.queries["task-unified-now"] = [
        document("completed", f"{patient.sandbox_url}/files/now.png")
    ]
    upstream.files["now.png"] = [
        error(500, "server_error"),
        Response(picture(), media_type="image/png"),
    ]
    task = await patient.submit(prompt="now")
    assert (await patient.client.post(f"/v1/tasks/{task['id']}/reconcile")).status_code == 200
    await wait_until(lambda: upstream.asked["now.png"] == 1)  # the next try would be in ten minutes
    await in_state(patient, task["id"], "storing")

    async def retried() -> bool:
        return any(step["step"] == "image.retry" for step in await patient.steps(task["id"]))

    await wait_until(retried)
    assert (await patient.client.post(f"/v1/tasks/{task['id']}/reconcile")).status_code == 200
    assert (await patient.ended(task["id"]))["state"] == "completed"


async def test_there_is_nothing_to_reconcile_without_an_id(
    patient: World, upstream: Upstream
) -> None:
    """The upstream has named no id for the task, so the service cannot query it."""
    task = await in_state(
        patient, (await doubtful(patient, upstream, "nameless"))["id"], "uncertain"
    )
    answer = await patient.client.post(f"/v1/tasks/{task['id']}/reconcile")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "task_not_submitted")
