"""Submissions over real sockets: each submission outcome of docs/api.md, and the answer to the
client.
"""

import asyncio
import json
import socket
import sqlite3
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Connection, event
from sqlalchemy.exc import OperationalError
from standardwebhooks import Webhook
from starlette.responses import Response
from structlog.testing import capture_logs

from service.app import stages
from service.db import tables
from service.db.clock import steady_ns
from service.db.sqlite import SqliteStore
from service.db.transaction import Lease, Transaction
from service.errors import ApiError
from service.images.validator import ImageValidator
from service.tasks import submit_worker, task_queries
from service.tasks.waits import ended, wait_for
from service.upstreams.sandbox import SandboxOptions, create_sandbox
from service.web.routes import task_routes
from service.web.server import Server, listening
from tests.upstream import After, Cut, Upstream, document, error, page
from tests.waiting import wait_until
from tests.world import TEXT_TO_IMAGE, World, subscriber, world

pytestmark = pytest.mark.usefixtures("quick_workers")

ACCEPTED = document("pending", id="task-unified-own")


@pytest.fixture(scope="module")
async def here(
    upstream: Upstream, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[World]:
    async with world(tmp_path_factory.mktemp("submit"), upstream=upstream.app) as made:
        yield made


async def post(here: World, body: dict[str, Any], **headers: str) -> httpx.Response:
    whole = {"model": TEXT_TO_IMAGE, "prompt": "a lighthouse", "size": "768x768", **body}
    return await here.client.post(
        "/v1/images/generations",
        json=whole,
        headers={name.replace("_", "-"): v for name, v in headers.items()},
    )


async def in_state(here: World, task_id: str, state: str) -> Any:
    async def look() -> Any:
        task = await here.task(task_id)
        return task if task["state"] == state else None

    return await wait_until(look)


async def row(here: World, task_id: str) -> Any:
    return await here.context.resources.store.read(task_queries.task_row, task_id, None)


async def waiting(here: World, task_id: str) -> float | None:
    """The seconds until the next attempt of the task, None if the attempt is due already."""
    wait: float = ((await row(here, task_id)).submit_due_at - here.context.resources.clock()) / 1000
    return wait if wait > 0 else None


async def test_an_answer_in_hand_is_kept_until_the_store_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store fails when the upstream answers. The worker keeps the answer and records it later,
    with one submission and no uncertainty.
    """
    monkeypatch.setattr(submit_worker, "RECORD_AGAIN_S", 0.01)
    theirs = Upstream()
    async with world(tmp_path, upstream=theirs.app) as there:
        store = there.context.resources.store
        assert isinstance(store, SqliteStore)
        refused = 0

        def full(_: Connection) -> None:
            nonlocal refused
            refused += 1
            raise OperationalError(
                "COMMIT", {}, sqlite3.OperationalError("database or disk is full")
            )

        async def fill_the_disk() -> None:
            event.listen(store._engine, "commit", full)

        theirs.submits["away"] = [After(fill_the_disk, ACCEPTED)]
        task = await there.submit(prompt="away", headers={"prefer": "respond-async"})
        await wait_until(lambda: refused > 30)  # other writers are refused too
        event.remove(store._engine, "commit", full)
        assert (await in_state(there, task["id"], "submitted"))["upstream_id"] == "task-unified-own"
        assert len(theirs.received["away"]) == 1


async def test_a_process_that_stood_still_before_the_call_does_not_send(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process pauses between the claim and the call. Its lease may have expired and another
    worker may have decided, so it does not send.
    """
    late = list[float]()

    def stand_still(name: str) -> None:
        if name == "submission.started" and not late:
            late.append((submit_worker.MARGIN_S + 1) * 1e9)

    monkeypatch.setattr(submit_worker, "checkpoint", stand_still)
    monkeypatch.setattr(submit_worker, "steady_ns", lambda: steady_ns() + sum(late))
    theirs = Upstream()
    theirs.submits["still"] = [ACCEPTED]
    async with world(tmp_path, upstream=theirs.app) as there:
        task = await there.submit(prompt="still", headers={"prefer": "respond-async"})
        await in_state(there, task["id"], "submitted")
        assert len(theirs.received["still"]) == 1
        found = await row(there, task["id"])
        assert (found.submit_attempts, found.submit_outcomes, found.doubted_at) == (2, 2, None)


# --- submission outcomes
# ---------------------------------------------------------------------------------


async def test_an_answer_with_an_id_makes_a_task_submitted(here: World) -> None:
    """A 2xx answer with an id gives the client the task with the upstream's id and its usage."""
    task = await here.submit(prompt="accepted")
    assert task["state"] == "submitted"
    assert task["status"] == "pending"
    assert task["upstream_id"].startswith("task-unified-")
    assert task["usage"]["credits_reserved"] == 2
    assert [event["type"] for event in await here.events(task=task["id"])] == [
        "image.task.submitted"
    ]


@pytest.mark.parametrize(
    "answer",
    [
        error(429, "rate_limit_exceeded"),
        error(503, "service_unavailable"),
        error(401, "unauthorized"),
        error(403, "key_disabled"),
    ],
    ids=["429", "503 of its own", "401", "403 about the key"],
)
async def test_where_nothing_was_created_it_is_sent_again_the_same(
    answer: Response, here: World, upstream: Upstream
) -> None:
    """The answer proves that nothing was created. The worker sends the same bytes again under the
    same key.
    """
    prompt = f"not created {answer.body!r} 猫"
    upstream.submits[prompt] = [
        answer,
        answer,
        document("pending", id=f"task-unified-{answer.status_code}"),
    ]
    task = await here.submit(prompt=prompt, exotic={"b": 1, "a": [None, 0.1]})
    assert task["error"] is None
    await in_state(here, task["id"], "submitted")
    sent = upstream.received[prompt]
    assert len(sent) == 3
    assert {request.body for request in sent} == {sent[0].body}
    assert {request.headers["idempotency-key"] for request in sent} == {task["id"]}
    assert json.loads(sent[0].body)["exotic"] == {"b": 1, "a": [None, 0.1]}


async def test_an_upstream_that_cannot_be_reached_got_nothing(tmp_path: Path) -> None:
    """A refused connection proves that nothing was created. The task waits, and the worker sends it
    when the upstream listens.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as place:
        place.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        address = f"http://127.0.0.1:{place.getsockname()[1]}"
        async with world(tmp_path, evolink_base_url=address) as here:
            task = await here.submit()
            assert (task["state"], task["error"]) in [("queued", None), ("submitting", None)]
            place.listen()
            place.setblocking(False)
            sandbox = create_sandbox(
                SandboxOptions(networks=here.settings.upstream_networks, delay_s=0.05)
            )
            async with listening(Server(sandbox, place, 1), asyncio.Event()):
                assert (await here.ended(task["id"]))["state"] == "completed"


async def test_waits_between_submissions_keep_to_schedule_and_retry_after(tmp_path: Path) -> None:
    """The client gets 200 with the queued task. A longer `Retry-After` replaces the wait of the
    schedule. A refused account is logged as an error and counted. The timeline has the reason.
    """
    upstream = Upstream()
    upstream.submits = {
        "schedule": [error(429, "rate_limit_exceeded", retry_after="5")],
        "asked": [error(503, "service_unavailable", retry_after="1200")],
        "account": [error(401, "unauthorized")],
    }
    async with world(tmp_path, upstream=upstream.app, submit_schedule="600") as here:
        waits, answers, steps = {}, {}, {}
        with capture_logs() as lines:
            for prompt in upstream.submits:
                answers[prompt] = await here.submit(prompt=prompt)
                waits[prompt] = await wait_until(partial(waiting, here, answers[prompt]["id"]))
                steps[prompt] = (await here.steps(answers[prompt]["id"]))[1:]
        assert {task["state"] for task in answers.values()} == {"queued"}
        assert 590 < waits["schedule"] <= 720
        assert 1190 < waits["asked"] <= 1200
        assert 590 < waits["account"] <= 720
        told = {
            name: [(step["step"], step.get("reason")) for step in each]
            for name, each in steps.items()
        }
        assert told == {
            "schedule": [("task.submission_retried", "429 rate_limit_exceeded")],
            "asked": [("task.submission_retried", "503 service_unavailable")],
            "account": [("task.held", None)],
        }
        retried = [line for line in lines if line["event"] == "task.submission_retried"]
        assert [(line["account"], line["log_level"]) for line in retried] == [
            (False, "warning"),
            (False, "warning"),
            (True, "warning"),
        ]
        assert [line["log_level"] for line in lines if line["event"] == "account.refused"] == [
            "error"
        ]
        metrics = (await here.client.get("/metrics")).text
        assert "darkroom_account_refusals_total 1.0" in metrics
        assert await here.events(type="image.task.*") == []


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "content_filter"),
        (402, "insufficient_quota"),
        (403, "model_access_denied"),
        (404, "not_found"),
        (413, "too_large"),
        (422, "odd"),
    ],
)
async def test_a_refusal_is_the_clients_and_final(
    status: int, code: str, here: World, upstream: Upstream
) -> None:
    """The client gets the upstream's status and error with the task's id, also on a replay. The
    task is failed, and the worker sends nothing again.
    """
    prompt = f"refused {status}"
    upstream.submits[prompt] = [error(status, code)]
    answer = await post(here, {"prompt": prompt}, idempotency_key=prompt.replace(" ", "-"))
    told = answer.json()["error"]
    assert (answer.status_code, told["code"], told["message"], told["type"], told["param"]) == (
        (status, code, f"said {code}", "some_error", "size")
    )
    assert told["request_id"] == answer.headers["x-request-id"]
    task = await here.task(told["task_id"])
    assert (task["state"], task["status"], task["error"]["code"]) == ("failed", "failed", code)
    again = await post(here, {"prompt": prompt}, idempotency_key=prompt.replace(" ", "-"))
    assert again.status_code == status
    assert again.headers["idempotency-replayed"] == "true"
    assert again.json()["error"]["task_id"] == task["id"]
    assert len(upstream.received[prompt]) == 1
    assert [event["type"] for event in await here.events(task=task["id"])] == ["image.task.failed"]


UNPROVED = {
    "gateway 502": page(502),
    "gateway 503": page(503),
    "gateway 524": page(524),
    "own 500": error(500, "internal_error"),
    "own 502": error(502, "upstream_error"),
    "timeout 408": error(408, "timeout"),
    "redirect": Response(status_code=302, headers={"location": "/elsewhere"}),
    "no id": document("pending"),
    "no JSON": Response("ok", 200),
    "paid unknown": error(400, "paid_outcome_unknown"),
    "key conflict": error(409, "idempotency_conflict"),
    "cut": Cut(b'{"id": "task-uni'),
}


@pytest.mark.parametrize("name", UNPROVED)
async def test_what_proves_nothing_is_uncertain_and_not_sent_again(
    name: str, here: World, upstream: Upstream
) -> None:
    """The upstream may have charged. The task waits for a callback, the client gets 200, and no
    event is written.
    """
    upstream.submits[name] = [UNPROVED[name]]
    task = await here.submit(prompt=name)
    assert (task["state"], task["status"], task["error"]) == ("uncertain", "pending", None)
    assert len(upstream.received[name]) == 1
    assert await here.events(task=task["id"]) == []
    assert "task.submission_uncertain" in [step["step"] for step in await here.steps(task["id"])]


async def test_a_callback_proves_an_uncertain_submission(tmp_path: Path) -> None:
    """The answer is lost, but the upstream created the task. The callback binds the task, which
    then completes and is paid once.
    """
    async with world(tmp_path) as here:
        task = await here.submit(sandbox={"lose_answer": True, "drop_callback": True, "delay": 0})
        assert task["state"] == "uncertain"

        async def made() -> Any:
            (only,) = (await here.sandbox.get("/sandbox/tasks")).json()["data"]
            return only["status"] == "completed" and only

        called = await here.stranger.post(
            here.callback_url(task["id"]), json=await wait_until(made)
        )
        assert called.status_code == 200
        assert (await here.ended(task["id"]))["state"] == "completed"
        steps = [step["step"] for step in await here.steps(task["id"])]
        assert (
            steps.index("task.submission_uncertain")
            < steps.index("task.submitted")
            < steps.index("task.settled")
        )
        assert len((await here.sandbox.get("/sandbox/tasks")).json()["data"]) == 1


async def test_no_answer_and_no_callback_end_as_submission_uncertain(tmp_path: Path) -> None:
    """After `UNCERTAIN_AFTER_S` without proof the task fails. The worker never sends it again."""
    upstream, forever = Upstream(), asyncio.Event()
    upstream.submits["silence"] = [After(forever.wait, ACCEPTED)]
    async with world(
        tmp_path, upstream=upstream.app, submit_timeout_s=0.5, uncertain_after_s=0.1
    ) as here:
        task = await here.ended((await here.submit(prompt="silence"))["id"])
    assert (task["state"], task["error"]["code"]) == ("failed", "submission_uncertain")
    assert len(upstream.received["silence"]) == 1


async def test_without_a_callback_url_the_uncertain_is_decided_at_once(tmp_path: Path) -> None:
    """No callback can prove the outcome, so the task fails before `UNCERTAIN_AFTER_S`."""
    upstream = Upstream()
    upstream.submits["lost"] = [Cut()]
    async with world(tmp_path, upstream=upstream.app, callback_url=None) as here:
        task = await here.ended((await here.submit(prompt="lost"))["id"])
        assert (task["state"], task["error"]["code"]) == ("failed", "submission_uncertain")
        assert "callback_url" not in json.loads(upstream.received["lost"][0].body)


GIVE_UP_S = 600


def make_old(tx: Transaction, ids: Sequence[str]) -> list[None]:
    """The tasks were accepted `GIVE_UP_S` ago."""
    for task_id in ids:
        tx.change(tables.tasks, task_id, {"created_at": tx.now - GIVE_UP_S * 1000})
    return [None] * len(ids)


@pytest.mark.parametrize("callback", [True, False])
async def test_resubmitting_the_uncertain_uses_the_same_key_and_ends(
    callback: bool, tmp_path: Path
) -> None:
    """With `DARKROOM_UNCERTAIN=resubmit` the worker sends the same bytes under the same key until
    an answer proves the outcome, at most for `SUBMIT_GIVE_UP_S`.
    """
    upstream = Upstream()
    upstream.submits = {"lost": [Cut(), ACCEPTED], "for ever": [page(502)]}
    options = {} if callback else {"callback_url": None}
    async with world(
        tmp_path,
        upstream=upstream.app,
        uncertain="resubmit",
        uncertain_after_s=0.05,
        submit_give_up_s=GIVE_UP_S,
        **options,
    ) as here:
        task = await here.submit(prompt="lost")
        await in_state(here, task["id"], "submitted")
        first, second = upstream.received["lost"]
        assert first.body == second.body
        assert first.headers["idempotency-key"] == second.headers["idempotency-key"] == task["id"]
        sent, started = upstream.received["for ever"], time.monotonic()
        task = await here.submit(prompt="for ever")
        await wait_until(lambda: len(sent) >= 3)
        await here.context.resources.store.write(make_old, task["id"])
        task = await here.ended(task["id"])
        assert task["error"]["code"] == "submission_uncertain"
        assert len(sent) <= 1 + (time.monotonic() - started) / 0.05


async def test_giving_up_is_not_submitted(tmp_path: Path) -> None:
    """The task fails when the upstream has refused it for `SUBMIT_GIVE_UP_S`. A waiting client gets
    the failed task.
    """
    upstream = Upstream()
    upstream.submits["busy"] = [error(429, "rate_limit_exceeded")]
    async with world(tmp_path, upstream=upstream.app, submit_give_up_s=4) as here:
        task = await here.submit(prompt="busy", headers={"prefer": "wait=20"})
        assert (task["state"], task["error"]["code"]) == ("failed", "not_submitted")
        assert "rate_limit_exceeded" in task["error"]["message"]
        assert len(upstream.received["busy"]) >= 2


@pytest.mark.slow
async def test_a_sender_that_died_leaves_an_uncertain_submission(tmp_path: Path) -> None:
    """A process that ends during the call may have sent the submission. The next process does not
    send it again.
    """
    upstream, forever = Upstream(), asyncio.Event()
    upstream.submits["dying"] = [After(forever.wait, ACCEPTED)]
    async with world(tmp_path, upstream=upstream.app, stop_s=0.05) as here:
        task = await here.submit(prompt="dying", headers={"prefer": "respond-async"})
        await wait_until(lambda: upstream.received["dying"])
    async with world(tmp_path, upstream=upstream.app) as here:
        task = await in_state(here, task["id"], "uncertain")
        reasons = [
            step["reason"]
            for step in await here.steps(task["id"])
            if step["step"] == "task.submission_uncertain"
        ]
        assert reasons == ["its sender died before the answer was recorded"]
    assert len(upstream.received["dying"]) == 1


async def test_the_row_is_submitting_before_the_request_leaves(
    here: World, upstream: Upstream
) -> None:
    """The state is committed before the upstream gets the request. After a crash the row therefore
    never claims that nothing was sent.
    """
    states: list[str] = []

    async def look() -> None:
        states.append(
            (await row(here, upstream.received["look"][0].headers["idempotency-key"])).state
        )

    upstream.submits["look"] = [After(look, document("pending", id="task-unified-look"))]
    assert (await here.submit(prompt="look"))["state"] == "submitted"
    assert states == ["submitting"]


@asynccontextmanager
async def crowded(here: World) -> AsyncIterator[None]:
    """Holds every slot at the upstream."""
    async with AsyncExitStack() as places:
        for _ in range(here.settings.evolink_concurrency):
            await places.enter_async_context(here.context.resources.limiter.slot("confirm", 5.0))
        yield


async def test_a_task_cancelled_before_its_turn_is_not_sent(
    here: World, upstream: Upstream
) -> None:
    """The client cancels the task after the claim, while it waits for a slot at the upstream."""
    async with crowded(here):
        task = await here.submit(prompt="too late", headers={"prefer": "respond-async"})
        await wait_until(lambda: len(here.context.resources.limiter.kinds["submit"].waiting))
        answer = await here.client.post(f"/v1/tasks/{task['id']}/cancel")
        assert answer.json()["state"] == "cancelled"

    async def idle() -> bool:
        known = await row(here, task["id"])
        return known.submit_lease_until is None and known.submit_due_at is None

    await wait_until(idle)
    assert upstream.received["too late"] == []


async def test_a_submission_that_waits_for_a_place_at_a_stop_is_left_to_the_next_process(
    tmp_path: Path,
) -> None:
    """The stopping process does not send it. The task stays queued and due, without a counted
    attempt.
    """
    theirs = Upstream()
    async with world(tmp_path, upstream=theirs.app) as there:
        async with crowded(there):
            task = await there.submit(prompt="later", headers={"prefer": "respond-async"})
            await wait_until(lambda: len(there.context.resources.limiter.kinds["submit"].waiting))
            there.context.stopping.quiesce()

        async def free() -> Any:
            known = await row(there, task["id"])
            return known.submit_lease_until is None and known

        known = await wait_until(free)
        assert (known.state, known.submit_attempts, known.submit_due_at is not None) == (
            "queued",
            0,
            True,
        )
        assert theirs.received["later"] == []
    async with world(tmp_path, upstream=theirs.app) as there:
        await in_state(there, task["id"], "submitted")
    assert len(theirs.received["later"]) == 1


async def test_work_on_what_is_gone_ends_quietly(here: World) -> None:
    """At every stage a lease for a deleted row changes nothing and raises nothing."""
    for stage in stages(
        here.settings, here.context.resources, here.context.breaker, ImageValidator(1, 1, 1)
    ):
        await stage.run(Lease(stage.name, "gone", 1, 1))


# --- the answer to the client
# ---------------------------------------------------------------------------------


async def test_a_slow_upstream_is_not_waited_for_beyond_the_limit(
    here: World, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client without a preference waits for the first attempt at most 10 s (0.1 s here) and then
    gets the current task.
    """
    monkeypatch.setattr(task_routes, "FIRST_OUTCOME_S", 0.1)
    answered = asyncio.Event()
    upstream.submits["slow"] = [After(answered.wait, document("pending", id="task-unified-slow"))]
    task = await here.submit(prompt="slow")
    assert task["state"] in ("queued", "submitting")
    answered.set()
    await in_state(here, task["id"], "submitted")


async def test_nobody_waits_for_a_task_that_is_gone(here: World) -> None:
    """A waiting client gets 404 when the task's row is removed."""

    async def gone() -> bool:
        return False

    with pytest.raises(ApiError) as caught:
        await wait_for(here.context.resources, "task_gone", ended, 10, gone)
    assert caught.value.status == 404


# --- idempotency
# --------------------------------------------------------------------------------------------------


async def test_a_key_lost_in_a_race_finds_the_winners_task(here: World) -> None:
    """Concurrent submissions all find the key unused, but one row is made. The other callers get
    its task, or 409 for another body.
    """
    intake = here.context.intake
    body = {"model": TEXT_TO_IMAGE, "prompt": "race", "size": "768x768"}
    same = await asyncio.gather(*(intake.accept("racer", body, "race") for _ in range(4)))
    assert len({task_id for task_id, _ in same}) == 1
    assert [new is None for _, new in same].count(False) == 1
    mixed = [
        intake.accept("racer", {**body, "prompt": f"race {number}"}, "mixed") for number in range(2)
    ]
    outcomes = await asyncio.gather(*mixed, return_exceptions=True)
    assert [outcome.status for outcome in outcomes if isinstance(outcome, ApiError)] == [409]


# --- refusals before anything is sent
# -----------------------------------------------------------------------------

LIMITS = [
    ({"model": None}, "model", "200"),
    ({"model": "m" * 201}, "model", "200"),
    ({"prompt": ""}, "prompt", "2000"),
    ({"prompt": "猫" * 2001}, "prompt", "2000"),
    ({"negative_prompt": "n" * 501}, "negative_prompt", "500"),
    ({"size": "huge"}, "size", "1280x1280"),
    ({"size": "767x768"}, "size", "589824"),
    ({"size": "1441x1440"}, "size", "2073600"),
    ({"size": "400x1601"}, "size", "1:4"),
    ({"n": 5}, "n", "4"),
    ({"n": True}, "n", "4"),
    ({"model": "wan2.5-image-to-image"}, "image_urls", "1 to 5"),
    ({"metadata": []}, "metadata", "object"),
    ({"metadata": {"a": 1}}, "metadata", "texts"),
    ({"metadata": {str(number): "" for number in range(17)}}, "metadata", "16"),
    ({"metadata": {"a": "é" * 1024}}, "metadata", "2048"),
    ({"callback_url": 7}, "callback_url", "text"),
    ({"callback_url": "http://192.168.0.1/"}, "callback_url", "globally routable"),
    ({"callback_url": "https://user@hooks.example/"}, "callback_url", "user name"),
    ({"callback_url": "https://a.example/" + "x" * 2048}, "callback_url", "2048"),
    ({"model_params": {"task_id": "task_unknown"}}, "model_params.task_id", "no submitted task"),
]


@pytest.mark.parametrize(
    ("body", "param", "words"), LIMITS, ids=[f"{param}-{words}" for _, param, words in LIMITS]
)
async def test_what_breaks_a_limit_is_refused_by_name(
    body: dict[str, Any], param: str, words: str, here: World, upstream: Upstream
) -> None:
    """The client gets 400 with the field and its limit. Nothing is stored and nothing is sent."""
    body = {"prompt": "refused here", **body}
    answer = await post(here, body)
    told = answer.json()["error"]
    assert (answer.status_code, told["param"], told["task_id"]) == (400, param, None)
    assert words in told["message"]
    assert upstream.received[body["prompt"]] == []


async def test_an_owner_without_a_key_may_have_its_tasks_called_back(tmp_path: Path) -> None:
    """The owner `admin` has only `DARKROOM_ADMIN_KEY`. The service delivers its terminal tasks
    signed. Its first stored key shows the secret.
    """
    async with world(tmp_path) as there, subscriber() as takes:
        task = await there.submit(callback_url=takes.url, headers={"prefer": "wait=20"})
        await wait_until(lambda: takes.received)
        assert json.loads(takes.received[0].body)["id"] == task["id"]
        made = await there.client.post("/v1/keys", json={"owner": "admin", "scopes": ["admin"]})
        again = await there.submit(callback_url=takes.url, headers={"prefer": "wait=20"})
        await wait_until(lambda: len(takes.received) == 2)
        sent = Webhook(made.json()["callback_secret"]).verify(
            takes.received[1].body, dict(takes.received[1].headers)
        )
        assert sent["id"] == again["id"]


async def test_an_id_of_ours_is_sent_as_the_upstreams(here: World, upstream: Upstream) -> None:
    """`model_params.task_id` with the service's id becomes the upstream's id. The upstream's own
    ids and other values stay unchanged.
    """
    first = await here.submit(prompt="first")
    for value, sent in [
        (first["id"], first["upstream_id"]),
        ("task-unified-theirs", "task-unified-theirs"),
        (7, 7),
    ]:
        prompt = f"follows {value}"
        await here.submit(prompt=prompt, model_params={"task_id": value, "strength": 1})
        assert json.loads(upstream.received[prompt][0].body)["model_params"] == {
            "task_id": sent,
            "strength": 1,
        }


async def test_too_little_space_refuses_new_submissions(here: World) -> None:
    """Below `MIN_FREE_BYTES` a submission gets 503 with `Retry-After`, and nothing is stored."""
    intake = replace(here.context.intake, min_free_bytes=1 << 62)
    with pytest.raises(ApiError) as caught:
        await intake.accept("acme", {"model": "any"}, None)
    assert (caught.value.status, caught.value.code, caught.value.retry_after) == (
        503,
        "no_space",
        60,
    )


async def test_prompts_are_logged_only_when_asked_for(here: World) -> None:
    """Log lines contain prompts only with `LOG_PROMPTS`."""
    body = {"model": "any-model", "prompt": "a secret lighthouse"}
    for log_prompts in (False, True):
        with capture_logs() as lines:
            task_id, _ = await replace(here.context.intake, log_prompts=log_prompts).accept(
                "acme", body, None
            )
        assert ("secret lighthouse" in repr(lines)) is log_prompts
        queued = next(
            line for line in lines if line["event"] == "task.queued" and line["task_id"] == task_id
        )
        assert (queued["model"], queued["owner"]) == ("any-model", "acme")
