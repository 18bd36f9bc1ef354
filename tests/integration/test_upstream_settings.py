"""Settings of the upstream that make every call fail are found without a submission. `/readyz`
names the cause, and operators are told.
"""

import asyncio
import os
import pty
import re
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from structlog.testing import capture_logs

from service.app import Role
from service.errors import StoreUnavailable
from service.queue import worker
from service.tasks import upstream_check
from service.upstreams.sandbox import SandboxOptions, create_sandbox
from tests.api import ASYNC, got, refused
from tests.environment import clean_environment
from tests.upstream import After, Cut, document, error, page
from tests.waiting import wait_until
from tests.world import ADMIN_KEY, World, answering, world

pytestmark = pytest.mark.slow

CREDITS = JSONResponse({"success": True, "data": {"token": {"remaining_credits": 41.5}}})
UNAUTHORIZED = ("account.refused", "evolink", {"upstream": "evolink", "reason": "401 unauthorized"})
HELD = "held: the upstream refuses our key"
SOON = ",".join(["0.1"] * 99) + ",600"


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "LOOK_S", 0.05)
        patch.setattr(upstream_check, "LOOK_S", 0.05)
        patch.setattr(upstream_check, "WAITS_S", (0.1,))
        yield


@dataclass(slots=True)
class Api:
    """An upstream with one answer for each kind of call, which a test may change."""

    credits: Response
    submits: Response | None = None  # None: a new task
    queries: Response | None = None  # None: processing
    asked: list[str] = field(default_factory=list)
    posts: int = 0

    @property
    def app(self) -> Starlette:
        return Starlette(routes=[Route("/{path:path}", self._answer, methods=["GET", "POST"])])

    async def _answer(self, request: Request) -> Response:
        self.asked.append(request.url.path)
        if request.method == "POST":
            self.posts += 1
            return self.submits or document("pending", id=f"task-unified-{self.posts}")
        if request.url.path.startswith("/v1/tasks/"):
            return self.queries or document("processing")
        return self.credits


def refusing(refusal: Response) -> Api:
    return Api(refusal, refusal)


def work(api: Api) -> None:
    api.credits, api.submits, api.queries = CREDITS, None, None


async def causes(here: World) -> list[str]:
    answer = got(await here.client.get("/readyz"))
    assert answer["status"] == ("degraded" if answer["causes"] else "ok")
    names: list[str] = answer["causes"]
    return names


async def until(here: World, *expected: str) -> None:
    async def same() -> bool:
        return await causes(here) == list(expected)

    await wait_until(same)


async def gauge(here: World) -> float:
    lines = (await here.client.get("/metrics")).text.splitlines()
    (line,) = (line for line in lines if line.startswith("darkroom_account_refused "))
    return float(line.split()[1])


async def account_events(here: World) -> list[Any]:
    return [
        (event["type"], event["subject"], event["data"])
        for event in await here.events(type="account.*")
    ]


async def not_now(*_: object, **__: object) -> None:
    raise StoreUnavailable("the store does not commit")


async def announced(here: World, before: int, *told: object) -> None:
    """Waits until these account events are there, and no others, after so many of before."""

    async def same() -> bool:
        return (await account_events(here))[before:] == list(told)

    await wait_until(same)


@pytest.fixture(scope="module")
def api() -> Api:
    return Api(CREDITS)


@pytest.fixture(scope="module")
async def working(api: Api, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    folder = tmp_path_factory.mktemp("shared")
    async with world(folder, upstream=api.app, submit_schedule=SOON) as here:
        yield here


@pytest.fixture
async def shared(api: Api, working: World) -> AsyncIterator[World]:
    """A world whose upstream works. After the test it works again."""
    yield working
    work(api)
    await until(working)

    async def told() -> bool:
        names = [name for name, _, _ in await account_events(working)]
        return not working.context.breaker.changed.is_set() and names[-1:] != ["account.refused"]

    await wait_until(told)


# --- a wrong key
# --------------------------------------------------------------------------------------------------

REFUSALS = {
    "401": (error(401, "unauthorized"), "401 unauthorized"),
    "401 with an integer": (
        JSONResponse({"error": {"code": 401, "message": "invalid token"}}, 401),
        "401 invalid token",
    ),
    "401 page": (page(401), "401 without an error of its own"),
    "401 empty": (Response(b"", 401), "401 without an error of its own"),
    "key": (error(403, "key_disabled"), "403 key_disabled"),
    "key expired": (error(403, "api_key_expired"), "403 api_key_expired"),
    "user": (error(403, "user_disabled"), "403 user_disabled"),
    "address": (error(403, "ip_restricted"), "403 ip_restricted"),
}


async def test_a_refused_key_is_found_at_the_start(tmp_path: Path) -> None:
    """No submission and no request of a client is needed."""
    api = refusing(error(401, "unauthorized"))
    async with world(tmp_path, upstream=api.app, submit_schedule=SOON) as here:
        await until(here, "account")
        await announced(here, 0, UNAUTHORIZED)
        assert api.posts == 0


@pytest.mark.parametrize(("refusal", "reason"), REFUSALS.values(), ids=REFUSALS)
async def test_a_refused_key_is_told_everywhere(
    refusal: Response, reason: str, api: Api, shared: World
) -> None:
    """One event, the gauge, `/readyz`, the task's timeline and the client's answers tell it, and
    all of them tell when the key is good again.
    """
    before, posts = len(await account_events(shared)), api.posts
    api.credits = api.submits = refusal
    refused(await shared.client.get("/v1/credits"), 503, "upstream_account_refused")
    await until(shared, "account")
    assert await gauge(shared) == 1
    tasks = [await shared.submit(prompt=f"task {number}") for number in range(3)]
    assert {task["state"] for task in tasks} <= {"queued", "submitting"}
    for task in tasks:
        step = (await shared.steps(task["id"]))[-1]
        assert (step["step"], step["message"]) == ("task.held", HELD)
    assert api.posts <= posts + 1, "the others were held unsent"
    refused(await shared.client.get("/v1/models"), 503, "upstream_account_refused")
    told = ("account.refused", "evolink", {"upstream": "evolink", "reason": reason})
    await announced(shared, before, told)
    work(api)
    await until(shared)
    await wait_until(lambda: api.posts >= posts + len(tasks))
    assert await gauge(shared) == 0
    got(await shared.client.get("/v1/credits"))
    restored = ("account.restored", "evolink", {"upstream": "evolink"})
    await announced(shared, before, told, restored)
    steps = [step["step"] for step in await shared.steps(tasks[0]["id"])]
    assert steps.count("task.held") == 1


async def test_a_task_that_is_held_again_and_again_says_so_once(tmp_path: Path) -> None:
    """A held task is due again after the longest wait. That is no new step."""
    api = refusing(error(401, "unauthorized"))
    async with world(tmp_path, upstream=api.app, submit_schedule="0.05") as here:
        await until(here, "account")
        task = await here.submit()
        asked = len(api.asked)
        await wait_until(lambda: len(api.asked) > asked + 10)
        steps = [step["step"] for step in await here.steps(task["id"])]
        assert steps == ["task.queued", "task.held"]


async def test_a_restart_with_the_same_key_is_no_news(tmp_path: Path) -> None:
    """Operators hear of a refusal once, and of its end from the process that sees it."""
    api = refusing(error(401, "unauthorized"))
    for _ in range(2):
        async with world(tmp_path, upstream=api.app) as here:
            await until(here, "account")
            await announced(here, 0, UNAUTHORIZED)
            await here.submit(headers=ASYNC)
    work(api)
    async with world(tmp_path, upstream=api.app) as here:

        async def restored() -> bool:
            names = [name for name, _, _ in await account_events(here)]
            return names == ["account.refused", "account.restored"]

        await wait_until(restored)
        assert await causes(here) == []


async def test_two_processes_tell_it_once(tmp_path: Path, postgres_url: str) -> None:
    """A web process and a worker share the store. Both name the cause."""
    api = refusing(error(401, "unauthorized"))
    shared: dict[str, Any] = {
        "database_url": postgres_url,
        "secret_key": "k" * 32,
        "upstream": api.app,
    }
    async with (
        world(tmp_path / "one", role=Role(workers=False), **shared) as web,
        world(tmp_path / "two", role=Role(web=False), **shared) as other,
    ):
        for here in (web, other):
            await until(here, "account")
            await wait_until(lambda: not here.context.breaker.changed.is_set())  # noqa: B023
        await web.submit(headers=ASYNC)
        await announced(web, 0, UNAUTHORIZED)


async def test_credits_that_are_refused_while_submissions_are_taken_hold_nothing(
    tmp_path: Path,
) -> None:
    """The first task is sent all the same. After that the credits do not count."""
    api = Api(error(401, "unauthorized"))
    async with world(tmp_path, upstream=api.app, submit_schedule=SOON) as here:
        await until(here, "account")
        for number in range(3):
            task = await here.submit(prompt=f"task {number}")
            await wait_until(lambda: api.posts == number + 1)  # noqa: B023
            assert task["state"] in ("queued", "submitting", "submitted")
        await until(here)
        refused(await here.client.get("/v1/credits"), 503, "upstream_account_refused")
        assert await causes(here) == []
        assert (await here.submit(prompt="last"))["state"] == "submitted"


async def test_what_operators_hear_waits_for_a_store_that_does_not_commit(
    api: Api, shared: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event comes once the store commits again."""
    monkeypatch.setattr(upstream_check, "AGAIN_S", 0.01)
    store, before = shared.context.resources.store, len(await account_events(shared))
    with monkeypatch.context() as patch:
        patch.setattr(store, "write", not_now)
        api.credits = api.submits = error(401, "unauthorized")
        await shared.client.get("/v1/credits")
        assert shared.context.breaker.changed.is_set()

    async def told() -> bool:
        names = [name for name, _, _ in (await account_events(shared))[before:]]
        return names == ["account.refused"]

    await wait_until(told)


async def test_a_key_that_is_revoked_later_is_found_by_a_query(tmp_path: Path) -> None:
    """The query itself proves nothing about submissions. The credits do."""
    api = Api(CREDITS)
    async with world(tmp_path, upstream=api.app, submit_schedule=SOON) as here:
        await until(here)
        task = await here.submit()
        api.queries = error(401, "unauthorized")
        await here.client.post(f"/v1/tasks/{task['id']}/reconcile")
        await wait_until(lambda: api.asked.count("/v1/credits") > 1)
        assert await causes(here) == []
        api.credits = api.submits = error(401, "unauthorized")
        await here.client.post(f"/v1/tasks/{task['id']}/reconcile")
        await until(here, "account")
        work(api)
        await until(here)


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
async def test_the_command_line_says_why_a_task_waits(terminal: bool, tmp_path: Path) -> None:
    """`submit --wait` says it within the first answer, on standard error, and goes on waiting.
    `task` shows it in the timeline.
    """
    api = refusing(error(401, "unauthorized"))
    async with world(tmp_path, upstream=api.app, submit_schedule=SOON) as here:
        main, tty = pty.openpty()
        other = {"DARKROOM_URL": here.url, "DARKROOM_API_KEY": ADMIN_KEY, "TERM": "xterm"}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "service", "submit", "a lighthouse", "--wait"),
            env=clean_environment({**other, "COLUMNS": "200"}),
            cwd=tmp_path,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=tty if terminal else asyncio.subprocess.PIPE,
            stderr=tty if terminal else asyncio.subprocess.PIPE,
        )
        os.close(tty)
        said = b""
        while HELD.encode() not in said:
            if terminal:
                said += await asyncio.to_thread(os.read, main, 65536)
            else:
                assert process.stderr is not None
                said += await process.stderr.readline()
        (task_id,) = set(re.findall(r"task_[a-z2-7]{26}", said.decode()))
        shown = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "service", "task", task_id),
            env=clean_environment(other),
            cwd=tmp_path,
            stdout=asyncio.subprocess.PIPE,
        )
        assert HELD in (await shown.communicate())[0].decode()
        got(await here.client.post(f"/v1/tasks/{task_id}/cancel"))
        with suppress(OSError):
            while terminal:
                said += await asyncio.to_thread(os.read, main, 65536)
        out, err = await process.communicate()
        os.close(main)
        assert process.returncode == 1
        if not terminal:
            assert (out, err.count(b"\n")) == (b"", 1)


# --- a wrong address
# --------------------------------------------------------------------------------------------------

ELSEWHERE = {
    "a wrong path": error(404, "not_found"),
    "a wrong path's page": page(404),
    "a wrong path's text": PlainTextResponse("Not Found", 404),
    "no such method": error(405, "method_not_allowed"),
    "a login page": page(200),
    "a redirect to a login": Response(b"", 302, {"location": "https://login.example/"}),
    "a website": Response(b"<!doctype html>", 200, media_type="text/html"),
    "an empty answer": Response(b"", 200),
    "a firewall's page": page(403),
    "a proxy that wants a password": page(407),
    "http on a port of https": page(400),
    "a gateway without a server": page(502),
    "a gateway's error in JSON": error(503, "service_unavailable"),
    "a cut answer": Cut(b"{"),
}


@pytest.mark.parametrize("answer", ELSEWHERE.values(), ids=ELSEWHERE)
async def test_an_answer_that_is_not_the_upstreams_is_a_cause(
    answer: Response, api: Api, shared: World
) -> None:
    """The log names the setting. Once the address leads to the upstream, the cause goes by itself,
    without a request.
    """
    api.credits = api.queries = answer  # a query's good answer would prove the address
    shared.context.resources.upstreams["evolink"]._proved = False  # type: ignore[attr-defined]
    with capture_logs() as lines:
        assert (await shared.client.get("/v1/credits")).status_code >= 400
        await until(shared, "upstream")
        await wait_until(lambda: [line for line in lines if line["event"] == "upstream.unusable"])
        work(api)
        await until(shared)
    (line,) = [line for line in lines if line["event"] == "upstream.unusable"]
    assert line["setting"] == "DARKROOM_EVOLINK_BASE_URL"
    assert line["status"] in (answer.status_code, None)


@pytest.mark.parametrize(
    "address",
    [
        "{url}/v1/v1",
        "{url}/api",
        "{url}/%20",
        "http://127.0.0.1:9",
        "https://{host}",
        "https://name.invalid/v1",
    ],
)
async def test_an_address_without_the_api_behind_it_is_found_at_the_start(
    address: str, tmp_path: Path
) -> None:
    """The sandbox answers, but not there. Or nothing answers at all."""
    app = create_sandbox(SandboxOptions())
    async with answering(app) as url:
        base = address.format(url=url, host=url.removeprefix("http://"))
        async with world(tmp_path, evolink_base_url=base) as here:
            await until(here, "upstream")


@pytest.mark.parametrize("ending", ["/", "/v1", "/v1/images/generations"])
async def test_an_address_that_ends_as_people_copy_it_works(ending: str, tmp_path: Path) -> None:
    """A task is submitted, at one path."""
    api = Api(CREDITS)
    async with answering(api.app) as url, world(tmp_path, evolink_base_url=url + ending) as here:
        assert (await here.submit())["state"] == "submitted"
        assert await causes(here) == []
    assert set(api.asked) == {"/v1/credits", "/v1/images/generations"}


async def test_real_answers_count_more_than_a_credits_query_that_is_missing(tmp_path: Path) -> None:
    """An upstream without it is in order as soon as it takes a submission."""
    api = Api(error(404, "not_found"))
    async with world(tmp_path, upstream=api.app) as here:
        await until(here, "upstream")
        assert (await here.submit())["state"] == "submitted"
        await until(here)


@asynccontextmanager
async def silent() -> AsyncIterator[str]:
    """An upstream that takes connections and never answers."""

    async def wait(_: Request) -> Response:
        return After(asyncio.Event().wait, CREDITS)

    async with answering(
        Starlette(routes=[Route("/{path:path}", wait, methods=["GET", "POST"])])
    ) as url:
        yield url


async def test_a_silent_upstream_neither_delays_nor_prevents_the_start(tmp_path: Path) -> None:
    """The service answers while its first call to the upstream still waits."""
    async with silent() as url:
        settings: dict[str, Any] = {"evolink_base_url": url, "query_timeout_s": 90}
        async with asyncio.timeout(60), world(tmp_path / "1", **settings) as here:
            assert await causes(here) == []
            assert (await here.submit(headers=ASYNC))["state"] in ("queued", "submitting")
        async with world(tmp_path / "2", evolink_base_url=url, query_timeout_s=0.2) as here:
            await until(here, "upstream")


async def test_a_web_process_without_a_key_asks_nothing(tmp_path: Path) -> None:
    """Workers elsewhere have the key. A client gets the clear answer."""
    api = refusing(error(401, "unauthorized"))
    async with world(
        tmp_path, upstream=api.app, role=Role(workers=False), evolink_api_key=None
    ) as here:
        refused(await here.client.get("/v1/credits"), 503, "upstream_account_refused")
        assert await causes(here) == []
        assert api.asked == ["/v1/credits"]
        assert await here.events(type="account.*") == []
