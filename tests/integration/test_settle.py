"""Settling over real sockets: the outcome at the upstream is recorded once, from a callback or from
a query.
"""

import json
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import Response
from structlog.testing import capture_logs

from service.db import tables
from service.db.transaction import Transaction
from service.queue import backoff, worker
from service.tasks import confirm_worker, task_queries
from service.tasks.confirm_worker import QueryPlan
from tests.callbacks import verdict
from tests.upstream import Upstream, document, error, failed, page, picture
from tests.waiting import wait_until
from tests.world import World, world

TTL_S = 600


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Workers look for due work and repeat queries sooner than in production."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "LOOK_S", 0.05)
        patch.setattr(confirm_worker, "confirm_wait", lambda _: 0.05)
        patch.setattr(confirm_worker, "next_query_wait", lambda *_: 0.05)
        patch.setattr(
            confirm_worker,
            "first_query_wait",
            lambda _, with_callback, override: override if with_callback else 0.1,
        )
        yield


@pytest.fixture(scope="module")
async def here(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """The upstream is the sandbox, which calls back in time."""
    folder = tmp_path_factory.mktemp("settle")
    async with world(folder, reconcile_after_s=600, no_results_after_s=0.3) as made:
        yield made


@pytest.fixture(scope="module")
async def silent(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """The service queries the sandbox if no callback comes."""
    folder = tmp_path_factory.mktemp("silent")
    async with world(folder, reconcile_after_s=0.3, no_results_after_s=0.3) as made:
        yield made


@pytest.fixture(scope="module")
async def told(
    upstream: Upstream, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[World]:
    """The upstream answers with the responses of the test, and only the test sends callbacks."""
    upstream.files["0.png"] = [Response(picture(), media_type="image/png")]
    async with world(
        tmp_path_factory.mktemp("told"), upstream=upstream.app, reconcile_after_s=600
    ) as made:
        yield made


async def call(here: World, task: dict[str, Any], status: str, **more: Any) -> str:
    body = json.dumps({"id": task["upstream_id"], "status": status, **more})
    return await verdict(here, task, body.encode())


async def types(here: World, task_id: str) -> list[str]:
    return [event["type"].removeprefix("image.task.") for event in await here.events(task=task_id)]


ENDS = [
    ({}, "completed", "completed", None),
    ({"fail": "content_policy_violation"}, "failed", "failed", "content_policy_violation"),
    ({"fail": "generation_timeout"}, "failed", "failed", "generation_timeout"),
    ({"fail": "resource_not_found"}, "expired", "failed", "expired"),
    ({"cancel": "status"}, "cancelled", "failed", "request_cancelled"),
    ({"cancel": "code"}, "cancelled", "failed", "request_cancelled"),
    ({"images": 0}, "failed", "failed", "no_results"),
]


@pytest.mark.parametrize("heard", ["by callback", "by asking"])
@pytest.mark.parametrize(
    ("faults", "state", "status", "code"), ENDS, ids=[json.dumps(end[0]) for end in ENDS]
)
async def test_a_task_ends_as_the_upstream_says(
    faults: dict[str, Any],
    state: str,
    status: str,
    code: str | None,
    heard: str,
    here: World,
    silent: World,
) -> None:
    """Each outcome at the upstream maps to one state, with one terminal event and the charged
    credits, with and without a callback.
    """
    if heard == "by asking":
        here, faults = silent, faults | {"drop_callback": True}
    task = await here.ended((await here.submit(sandbox=faults))["id"])
    assert (task["state"], task["status"]) == (state, status)
    assert (task["error"] and task["error"]["code"]) == code
    assert len(task["images"]) == (1 if state == "completed" else 0)
    assert task["usage"]["credits_used"] == {"completed": 2, "no_results": 0}.get(code or state)
    assert await types(here, task["id"]) == ["submitted", state]
    steps = [step["step"] for step in await here.steps(task["id"])]
    assert ("callback.received" in steps) is (heard == "by callback")
    assert steps.count("task.confirmed") == 1


@pytest.mark.slow
async def test_without_a_callback_url_tasks_are_settled_by_asking(tmp_path: Path) -> None:
    """The submission contains no `callback_url`, so the task has no callbacks. A query
    settles it.
    """
    async with world(tmp_path, callback_url=None) as here:
        task = await here.ended((await here.submit())["id"])
        assert task["state"] == "completed"
        made = (await here.sandbox.get("/sandbox/tasks")).json()["data"]
        assert [each["callbacks"] for each in made] == [[]]


@pytest.mark.parametrize("callback", [True, False])
@pytest.mark.parametrize(
    "answer",
    [
        error(404, "task_not_found"),
        error(500, "internal_error"),
        page(502),
        error(429, "rate_limit_exceeded"),
        document("teleporting"),
    ],
    ids=["404", "500", "gateway", "429", "unknown status"],
)
async def test_an_answer_that_settles_nothing_is_asked_again(
    answer: Response, callback: bool, told: World, upstream: Upstream
) -> None:
    """404, an error or an undocumented status settles nothing. The worker queries the upstream
    until it names an outcome.
    """
    task = await told.submit()
    upstream.queries[task["upstream_id"]] = [answer, answer, failed("service_error")]
    if callback:
        await call(told, task, "failed")
    else:
        await ask(told, task)
    ended = await told.ended(task["id"])
    assert ended["error"]["code"] == "service_error"
    assert upstream.asked[task["upstream_id"]] == 3


async def ask(here: World, task: dict[str, Any]) -> None:
    """Makes the task due for a query."""
    await here.context.resources.store.write(make_due, task["id"])


def make_due(tx: Transaction, ids: Sequence[str]) -> list[None]:
    for task_id in ids:
        tx.change(tables.tasks, task_id, {"settle_due_at": tx.now})
    return [None] * len(ids)


def make_old(tx: Transaction, ids: Sequence[str]) -> list[None]:
    """The tasks were submitted `TTL_S` ago."""
    for task_id in ids:
        tx.change(tables.tasks, task_id, {"submitted_at": tx.now - TTL_S * 1000})
    return [None] * len(ids)


async def test_a_callback_before_its_time_is_asked_about_soon(
    told: World, upstream: Upstream
) -> None:
    """The callback says completed while the query still says processing. The worker settles the
    task only when the query agrees.
    """
    task = await told.submit()
    result = f"{told.sandbox_url}/files/0.png"
    upstream.queries[task["upstream_id"]] = [
        document("processing", progress=50),
        document("processing"),
        document("completed", result),
    ]
    assert await call(told, task, "completed", results=[result]) == "accepted"
    ended = await told.ended(task["id"])
    assert (ended["state"], len(ended["images"])) == ("completed", 1)
    assert upstream.asked[task["upstream_id"]] == 3


def test_the_waits_are_those_of_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a callback URL the first query comes after `RECONCILE_AFTER_S`, or after max(60 s, 2 ×
    estimate), and later waits are 1 to 15 min. Without a callback URL the first query comes after
    half the estimate, at least 3 s, and later waits are 5 to 60 s. After an unconfirmed callback
    the waits are 1 to 60 s.
    """
    for name in ("confirm_wait", "next_query_wait", "first_query_wait"):
        monkeypatch.setattr(confirm_worker, name, getattr(backoff, name))
    called, silent = QueryPlan(True, None, lambda: 0.0), QueryPlan(False, 7.0, lambda: 0.0)
    assert [called.first(estimate) for estimate in (None, 20, 45)] == [60_000, 60_000, 90_000]
    soon = QueryPlan(True, 7.0, lambda: 0.0)
    assert [soon.first(45), soon.again(1, called_back=False)] == [7_000, 7_000]
    assert [silent.first(estimate) for estimate in (None, 4, 45)] == [3_000, 3_000, 22_500]
    assert [called.again(attempt, called_back=False) for attempt in (1, 2, 9)] == [
        60_000,
        120_000,
        750_000,
    ]
    assert [silent.again(attempt, called_back=False) for attempt in (1, 2, 9)] == [
        5_000,
        7_500,
        50_000,
    ]
    assert [silent.again(attempt, called_back=True) for attempt in (1, 2, 9)] == [
        1_000,
        2_000,
        60_000,
    ]
    assert called.again(1, called_back=True, retry_after=30.0) == 30_000


@pytest.mark.slow
async def test_a_task_the_upstream_forgot_is_expired_after_its_time(tmp_path: Path) -> None:
    """The worker accepts 404 as the end only when the task is older than `TASK_TTL_S`."""
    upstream = Upstream()
    async with world(
        tmp_path, upstream=upstream.app, reconcile_after_s=0.05, evolink_task_ttl_s=TTL_S
    ) as here:
        task = await here.submit()
        upstream.queries[task["upstream_id"]] = [error(404, "task_not_found")]
        await wait_until(lambda: upstream.asked[task["upstream_id"]] >= 3)
        assert (await here.task(task["id"]))["state"] == "submitted"
        await here.context.resources.store.write(make_old, task["id"])
        ended = await here.ended(task["id"])
        assert (ended["state"], ended["status"], ended["error"]["code"]) == (
            "expired",
            "failed",
            "expired",
        )
        assert await types(here, task["id"]) == ["submitted", "expired"]


async def test_the_tokens_word_is_enough_where_no_query_is_wanted(tmp_path: Path) -> None:
    """With `EVOLINK_CONFIRM=never` a callback settles the task without a query. Only a
    contradicting or unreadable callback leads to a query.
    """
    upstream = Upstream()
    upstream.files["0.png"] = [Response(picture(), media_type="image/png")]
    async with world(
        tmp_path, upstream=upstream.app, evolink_confirm="never", reconcile_after_s=600
    ) as here:
        task = await here.submit()
        await call(
            here,
            task,
            "completed",
            results=[f"{here.sandbox_url}/files/0.png"],
            usage={"credits_used": 2},
        )
        ended = await here.ended(task["id"])
        assert (ended["state"], len(ended["images"]), ended["usage"]["credits_used"]) == (
            "completed",
            1,
            2,
        )
        assert upstream.asked[task["upstream_id"]] == 0
        assert await call(here, task, "failed") == "conflict"
        await wait_until(lambda: upstream.asked[task["upstream_id"]] == 1)
        assert (await here.task(task["id"]))["state"] == "completed"
        doubted = await here.submit()
        upstream.queries[doubted["upstream_id"]] = [failed("service_error")]
        assert await verdict(here, doubted, b"garbage") == "unreadable"
        assert (await here.ended(doubted["id"]))["error"]["code"] == "service_error"
        assert upstream.asked[doubted["upstream_id"]] == 1


async def test_each_question_that_nobody_called_for_is_one_line(
    told: World, upstream: Upstream
) -> None:
    """Each query without a callback logs one `reconcile.queried` line with the answer."""
    task = await told.submit()
    answers = [
        document("processing"),
        document("teleporting"),
        error(404, "task_not_found"),
        page(502),
        failed("service_error"),
    ]
    upstream.queries[task["upstream_id"]] = [*answers]
    with capture_logs() as lines:
        await ask(told, task)
        await told.ended(task["id"])
    words = [line["answer"] for line in lines if line["event"] == "reconcile.queried"]
    assert words == ["processing", "undocumented", "not_found", "502", "failed"]


async def test_a_task_without_an_upstream_id_is_not_asked_about(
    told: World, upstream: Upstream
) -> None:
    """Without an upstream id there is nothing to query. The worker ends the work, and the row is
    not due any more.
    """
    upstream.submits["lost"] = [page(502)]
    task = await told.submit(prompt="lost")
    await ask(told, task)

    async def idle() -> bool:
        row = await told.context.resources.store.read(task_queries.task_row, task["id"], None)
        return row is not None and row.settle_due_at is None

    await wait_until(idle)
    assert (await told.task(task["id"]))["state"] == "uncertain"


async def test_a_task_whose_id_was_anothers_waits_without_a_question(
    told: World, upstream: Upstream
) -> None:
    """A callback gives the task an upstream id. The answer to another submission then proves that
    the id belongs to the other task. The first task loses the id, and the worker sends no query for
    it.
    """
    upstream.submits["robbed"] = [page(502)]
    upstream.submits["rightful"] = [document("pending", id="task-unified-shared")]
    robbed = await told.submit(prompt="robbed")
    body = json.dumps({"id": "task-unified-shared", "status": "processing"})
    assert (await told.stranger.post(told.callback_url(robbed["id"]), content=body)).json() == {
        "status": "accepted"
    }
    await wait_until(lambda: upstream.asked["task-unified-shared"])
    assert (await told.submit(prompt="rightful"))["upstream_id"] == "task-unified-shared"

    async def row() -> Any:
        return await told.context.resources.store.read(task_queries.task_row, robbed["id"], None)

    async def waits() -> bool:
        now = await row()
        return now.upstream_id is None and now.settle_lease_until is None

    await wait_until(waits)
    attempts, asked = (await row()).settle_attempts, upstream.asked["task-unified-shared"]
    assert (await told.client.post(f"/v1/tasks/{robbed['id']}/reconcile")).status_code == 409
    await ask(told, robbed)

    async def looked_at() -> bool:
        return bool((await row()).settle_attempts != attempts) and await waits()

    await wait_until(looked_at)
    assert upstream.asked["task-unified-shared"] == asked
    assert (await told.task(robbed["id"]))["state"] == "submitted"
    assert (
        await told.client.post(f"/v1/tasks/{robbed['id']}/cancel")
    ).status_code == 200  # a worker would pick the task up in later tests
