"""The account breaker. When the upstream rejects the key or the account, submissions stop and one
probe at a time runs. Waiting tasks are submitted once the account works again.
"""

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from structlog.testing import capture_logs

from service.app import Role
from service.net.responses import Response as Answer
from service.tasks.account_breaker import remaining_credits
from service.upstreams.evolink import EvoLink
from tests.api import ASYNC
from tests.contract.subject import Clock, Subject
from tests.upstream import Cut, document, error, page
from tests.waiting import wait_until
from tests.world import World, subscriber, world

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_workers")]

SOON = (
    ",".join(["0.1"] * 99) + ",600"
)  # probes come soon, and a held task waits longer than any test lasts
CREDITS = JSONResponse(
    {"success": True, "data": {"token": {"remaining_credits": 41.5}, "user": {}}}
)


@dataclass(slots=True)
class Accounts:
    """An upstream that rejects submissions while `refusal` is set. `credits` is its answer to the
    free credits query.
    """

    refusal: Response | None
    credits: Response
    sent: list[str] = field(default_factory=list)  # prompts, in the order of arrival
    taken: list[str] = field(default_factory=list)
    probes: int = 0
    answers: asyncio.Event = field(
        default_factory=asyncio.Event
    )  # submissions are answered while it is set

    @property
    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/images/generations", self._submit, methods=["POST"]),
                Route("/v1/credits", self._credits),
            ]
        )

    async def _submit(self, request: Request) -> Response:
        prompt = json.loads(await request.body())["prompt"]
        self.sent.append(prompt)
        await self.answers.wait()
        if self.refusal is not None:
            return self.refusal
        self.taken.append(prompt)
        return document("pending", id=f"task-unified-{len(self.taken)}")

    async def _credits(self, _: Request) -> Response:
        self.probes += 1
        return self.credits if self.refusal is not None else CREDITS


def accounts(refusal: Response, credits: Response | None = None) -> Accounts:
    made = Accounts(refusal, credits or refusal)
    made.answers.set()
    return made


def alerts(lines: list[Any]) -> list[tuple[str, str]]:
    return [
        (line["event"], line["log_level"]) for line in lines if line["event"].startswith("account.")
    ]


async def ready(here: World) -> Any:
    return (await here.client.get("/readyz")).json()


async def metric(here: World, name: str) -> float:
    lines = (await here.client.get("/metrics")).text.splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


async def refused(here: World, theirs: Accounts) -> None:
    """Waits until the breaker knows that a submission was refused.

    The credits query of the start may be refused first. It opens the breaker too, but lets one task
    through as a trial, until a credits query has begun after the refused submission.
    """

    async def counted() -> bool:
        return await metric(here, "darkroom_account_refusals_total") >= 1

    await wait_until(counted)
    probes = theirs.probes
    await wait_until(lambda: theirs.probes > probes + 1)


@pytest.mark.parametrize(("status", "code"), [(401, "unauthorized"), (403, "user_disabled")])
async def test_a_refused_account_is_asked_for_free_until_it_is_good(
    status: int, code: str, tmp_path: Path
) -> None:
    """One rejected submission opens the breaker. Tasks then stay queued, clients get 200, and one
    alert is raised. A good answer to the credits query submits all of them at once.
    """
    theirs, reason = accounts(error(status, code)), f"{status} {code}"
    with capture_logs() as lines:
        async with world(tmp_path, upstream=theirs.app, submit_schedule=SOON) as here:
            first = await here.submit(prompt="first")
            await refused(here, theirs)
            others = [await here.submit(prompt=f"other {number}") for number in range(5)]
            assert {task["state"] for task in (first, *others)} == {"queued"}
            assert await ready(here) == {"status": "degraded", "causes": ["account"]}
            probes = theirs.probes
            await wait_until(lambda: theirs.probes > probes + 2)
            assert theirs.sent == ["first"]
            theirs.refusal = None
            await wait_until(lambda: len(theirs.taken) == 6)
            assert sorted(theirs.sent[1:]) == sorted(theirs.taken)
            assert await ready(here) == {"status": "ok", "causes": []}
            assert await metric(here, "darkroom_account_refusals_total") == 1
            assert await metric(here, "darkroom_upstream_credits") == 41.5
            assert {(await here.task(task["id"]))["error"] for task in (first, *others)} == {None}
    assert alerts(lines) == [("account.refused", "error"), ("account.restored", "warning")]
    assert [line["reason"] for line in lines if line["event"] == "account.refused"] == [reason]


@pytest.mark.parametrize(
    "credits",
    [
        error(404, "not_found"),
        error(500, "internal_error"),
        page(502),
        error(403, "permission_denied"),
        Cut(),
    ],
    ids=["404", "500", "502", "403", "cut"],
)
async def test_without_a_credits_answer_one_submission_probes(
    credits: Response, tmp_path: Path
) -> None:
    """The upstream has no credits query, or rejects this key there. The service then submits one
    waiting task at a time until the upstream accepts one.
    """
    theirs = accounts(error(401, "unauthorized"), credits)
    with capture_logs() as lines:
        async with world(tmp_path, upstream=theirs.app, submit_schedule=SOON) as here:
            await here.submit(prompt="first")
            theirs.answers.clear()
            before = len(theirs.sent)
            for number in range(5):
                await here.submit(prompt=f"other {number}", headers=ASYNC)
            await wait_until(lambda: len(theirs.sent) == before + 1)
            assert (await here.submit(prompt="late"))["state"] == "queued"
            assert len(theirs.sent) == before + 1, "one is on its way"
            theirs.answers.set()
            await wait_until(lambda: len(theirs.sent) > before + 3)
            theirs.refusal = None
            await wait_until(lambda: len(theirs.taken) == 7)
            assert len(set(theirs.taken)) == 7
    assert alerts(lines) == [("account.refused", "error"), ("account.restored", "warning")]


async def test_credits_that_answer_although_submissions_are_refused_are_asked_once(
    tmp_path: Path,
) -> None:
    """The key's quota is used up although the credits query succeeds. The service submits one
    waiting task at a time until the upstream accepts one, not all after each good answer.
    """
    theirs = accounts(error(403, "key_quota_exhausted"), CREDITS)
    with capture_logs() as lines:
        async with world(
            tmp_path, upstream=theirs.app, submit_schedule=SOON, evolink_concurrency=1
        ) as here:
            for number in range(6):
                await here.submit(prompt=f"task {number}", headers=ASYNC)
            await wait_until(lambda: len(theirs.sent) > 6 and theirs.probes > 1)
            assert theirs.probes == 2, "one at the start, one as a trial"
            theirs.refusal = None
            await wait_until(lambda: len(theirs.taken) == 6)
            assert len(set(theirs.taken)) == 6
    told = [event for event, _ in alerts(lines)]
    assert told == ["account.refused", "account.restored"] * 2


@pytest.mark.parametrize("callback", [True, False])
@pytest.mark.parametrize(
    "refusal",
    [error(401, "unauthorized"), error(429, "rate_limit_exceeded")],
    ids=["account", "throttled"],
)
async def test_what_was_not_submitted_in_time_fails(
    refusal: Response, callback: bool, tmp_path: Path
) -> None:
    """After `SUBMIT_GIVE_UP_S` a task fails with `not_submitted`, one event, and its own callback
    if it has a URL. A client that waits for the task gets its answer then.
    """
    theirs = accounts(refusal)
    options = {} if callback else {"callback_url": None}
    async with (
        world(
            tmp_path, upstream=theirs.app, submit_schedule="0.05", submit_give_up_s=0.5, **options
        ) as here,
        subscriber() as takes,
    ):
        task = await here.submit(headers={"prefer": "wait=20"}, callback_url=f"{takes.url}/done")
        assert (task["state"], task["status"], task["error"]["code"]) == (
            "failed",
            "failed",
            "not_submitted",
        )
        assert [event["type"] for event in await here.events(task=task["id"])] == [
            "image.task.failed"
        ]
        sent = len(theirs.sent)
        await wait_until(lambda: takes.received)
        assert json.loads(takes.received[0].body)["error"]["code"] == "not_submitted"
        later = await here.submit(headers=ASYNC)
        assert (await here.ended(later["id"]))["error"]["code"] == "not_submitted"
        assert theirs.taken == []
        assert sent >= 1


async def test_while_the_credits_are_asked_for_no_submission_asks_too(tmp_path: Path) -> None:
    """One probe runs at a time. The next credits query withdraws a trial that no task has used, and
    an answer about the key ends it.
    """
    theirs, asked, answered = (
        accounts(error(401, "unauthorized"), error(404, "not_found")),
        asyncio.Event(),
        asyncio.Event(),
    )

    async def credits(request: Request) -> Response:
        if theirs.probes == 0:
            return await theirs._credits(request)  # proves nothing: one submission may try
        asked.set()
        await answered.wait()
        theirs.probes += 1
        return error(401, "unauthorized")

    app = theirs.app
    app.router.routes.insert(0, Route("/v1/credits", credits))
    async with world(tmp_path, upstream=app, submit_schedule=SOON) as here:
        theirs.answers.clear()
        first = await here.submit(prompt="first", headers=ASYNC)
        await wait_until(lambda: theirs.sent)
        assert (await here.client.post(f"/v1/tasks/{first['id']}/cancel")).status_code == 200
        theirs.answers.set()  # the upstream rejects the key, and no task is there to use the trial
        await wait_until(asked.is_set)
        assert (await here.submit(prompt="meanwhile"))["state"] == "queued"
        answered.set()
        await wait_until(lambda: theirs.probes > 2)
        assert (await here.submit(prompt="afterwards"))["state"] == "queued"
        assert theirs.sent == ["first"]


async def test_no_old_task_fails_without_a_submission_after_a_restart(tmp_path: Path) -> None:
    """The tasks are already too old when the process starts, and the upstream rejects the key at
    once. The service submits each task once, one at a time, before the task fails.
    """
    theirs, prompts = (
        accounts(error(401, "unauthorized")),
        [f"task {number}" for number in range(4)],
    )
    async with world(tmp_path, upstream=theirs.app, role=Role(workers=False)) as here:
        tasks = [await here.submit(prompt=prompt, headers=ASYNC) for prompt in prompts]
    async with world(
        tmp_path,
        upstream=theirs.app,
        submit_schedule="0.05",
        submit_give_up_s=0.001,
        evolink_concurrency=1,
    ) as here:
        for task in tasks:
            assert (await here.ended(task["id"]))["error"]["code"] == "not_submitted"
        assert sorted(theirs.sent) == prompts


async def test_last_tries_are_made_one_at_a_time(tmp_path: Path) -> None:
    """While the breaker is open, at most one submission is in flight, however many tasks are too
    old.
    """
    async with world(tmp_path, role=Role(workers=False)) as here:
        account = here.context.breaker
        account.open("401 unauthorized")
        for _ in range(2):
            with account.allow(last=True) as first, account.allow(last=True) as second:
                assert (first, second) == (True, False)
            with account.allow(last=False) as young:
                assert not young


async def test_a_submission_under_way_when_the_account_is_refused_is_recorded(
    tmp_path: Path,
) -> None:
    """Its answer counts as usual, and it says nothing about the key that was rejected meanwhile."""
    theirs, answered = accounts(error(401, "unauthorized")), asyncio.Event()
    theirs.refusal = None  # the credits query of the start succeeds

    async def slow(request: Request) -> Response:
        body = json.loads(await request.body())
        if body["prompt"] != "slow":
            return await theirs._submit(request)
        theirs.sent.append("slow")
        await answered.wait()
        return document("pending", id="task-unified-slow")

    app = theirs.app
    app.router.routes.insert(0, Route("/v1/images/generations", slow, methods=["POST"]))
    async with world(tmp_path, upstream=app, submit_schedule="600") as here:
        first = await here.submit(prompt="slow", headers=ASYNC)
        await wait_until(lambda: "slow" in theirs.sent and theirs.probes)
        theirs.refusal = error(401, "unauthorized")
        await here.submit(prompt="refused")
        answered.set()

        async def submitted() -> bool:
            return bool((await here.task(first["id"]))["state"] == "submitted")

        await wait_until(submitted)
        assert here.context.breaker.is_open


async def test_a_task_held_as_the_breaker_closes_does_not_wait(tmp_path: Path) -> None:
    """A task that is snoozed just after the held tasks were made due becomes due as well."""
    async with world(tmp_path, role=Role(workers=False), submit_schedule="600") as here:
        task = await here.submit(headers=ASYNC)
        subject = Subject(here.context.resources.store, Clock())
        lease = await subject.claimed("submit", task["id"])
        await here.context.breaker.hold(lease, 3600)
        assert [again.key for again in await subject.claim("submit")] == [lease.key]
        subject.store.detach()


async def test_a_defect_while_probing_does_not_end_the_probing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker logs and counts the error, and the next probe comes on time."""
    theirs, ask = accounts(error(401, "unauthorized")), EvoLink.passthrough
    defects = iter([RuntimeError("nobody foresaw this")])

    async def defective(self: EvoLink, method: str, path: str) -> Answer:
        for defect in defects:
            raise defect
        return await ask(self, method, path)

    monkeypatch.setattr(EvoLink, "passthrough", defective)
    with capture_logs() as lines:
        async with world(tmp_path, upstream=theirs.app, submit_schedule=SOON) as here:
            await here.submit()
            await wait_until(lambda: theirs.probes > 0)
            theirs.refusal = None
            await wait_until(lambda: theirs.taken)
    assert [line["stage"] for line in lines if line["event"] == "worker.failed"] == ["account"]


async def test_a_restart_asks_anew(tmp_path: Path) -> None:
    """A new process may have a new key. It submits all waiting tasks. Rejected ones wait again."""
    theirs = accounts(error(401, "unauthorized"))
    async with world(tmp_path, upstream=theirs.app, submit_schedule="0.3") as here:
        task = await here.submit()
        assert await metric(here, "darkroom_upstream_credits") != await metric(
            here, "darkroom_upstream_credits"
        ), "NaN until it is known"
    theirs.refusal = None
    async with world(tmp_path, upstream=theirs.app, submit_schedule="0.3") as here:

        async def submitted() -> bool:
            return bool((await here.task(task["id"]))["state"] == "submitted")

        await wait_until(submitted)


async def test_a_credits_request_refreshes_the_metric(tmp_path: Path) -> None:
    """The answer passes through unchanged, and the metric shows the upstream's latest figure."""
    theirs = accounts(error(401, "unauthorized"), CREDITS)
    async with world(tmp_path, upstream=theirs.app) as here:
        assert (await here.client.get("/v1/credits")).content == CREDITS.body
        assert await metric(here, "darkroom_upstream_credits") == 41.5
        theirs.credits = error(401, "unauthorized")
        assert (await here.client.get("/v1/credits")).status_code == 503
        assert await metric(here, "darkroom_upstream_credits") == 41.5


@pytest.mark.parametrize(
    ("remaining", "credits"),
    [
        ("7", 7.0),
        ("8.25", 8.25),
        ('"12.5"', 12.5),
        ("0", 0.0),
        ("null", None),
        ("true", None),
        ("[]", None),
        ("NaN", None),
        ('"x"', None),
    ],
)
def test_remaining_credits_are_read_tolerantly(remaining: str, credits: float | None) -> None:
    """A number or its text is read. Any other value counts as unknown."""
    assert (
        remaining_credits(f'{{"data": {{"token": {{"remaining_credits": {remaining}}}}}}}'.encode())
        == credits
    )


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b"{}",
        b'{"data": 1}',
        b'{"data": {"token": []}}',
        b"\xff",
        b"[" * 10_000,
    ],
)
def test_credits_that_are_none_raise_nothing(body: bytes) -> None:
    assert remaining_credits(body) is None
