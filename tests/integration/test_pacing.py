"""The concurrency limit of calls to the upstream over real sockets: its maximum, its priorities,
and its reaction to 429.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, func, select
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from service.backends import make_secret_file
from service.db.clock import wall_clock
from service.db.tables import events, tasks
from service.db.transaction import Lease
from service.queue import worker
from service.resources import new_id
from service.tasks import confirm_worker
from service.tasks.accept import insert_tasks
from service.tasks.state import State
from service.tasks.submissions import SubmissionResult, record_submissions
from service.tasks.upstream_check import UpstreamCheck
from service.upstreams.base import Accepted, Report
from service.web.routes import upstream_routes
from tests.bench.acknowledgement import CHUNK, waiting
from tests.stores import open_sqlite
from tests.upstream import document, error, failed
from tests.waiting import wait_until
from tests.world import World, world

pytestmark = pytest.mark.slow

DAY_MS = 86_400_000
TOO_MANY = error(429, "rate_limit_exceeded")


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Shortens the polling of the workers and the time between queries. The free call at the start
    would be one more in every count.
    """

    async def nothing(_: UpstreamCheck) -> None: ...

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "LOOK_S", 0.05)
        patch.setattr(confirm_worker, "confirm_wait", lambda _queries: 0.05)
        patch.setattr(confirm_worker, "PATIENCE_S", 0.1)
        patch.setattr(UpstreamCheck, "run", nothing)
        patch.setattr(upstream_routes, "SLOT_S", 60.0)  # a busy machine is slow to free one
        yield


async def a_while(_call: str) -> None:
    """A short delay of a slow upstream: one pause of `wait_until`."""
    looks = iter((False, True))
    await wait_until(lambda: next(looks))


@dataclass(slots=True)
class Slow:
    """An upstream that counts its calls in progress: `running` now, `most` at the peak. The end of
    a call's path is its name.

    It answers once `ready` returns. Every task has failed and every submission is accepted. If
    `busy` is set, every answer is 429.
    """

    ready: Callable[[str], Awaitable[None]] = a_while
    busy: bool = False
    running: int = 0
    most: int = 0
    calls: Counter[str] = field(default_factory=Counter)

    @property
    def app(self) -> Starlette:
        return Starlette(routes=[Route("/v1/{path:path}", self._answer, methods=["GET", "POST"])])

    async def _answer(self, request: Request) -> Response:
        call = request.path_params["path"].rpartition("/")[2]
        self.calls[call] += 1
        number = self.calls[call]
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.ready(call)
        finally:
            self.running -= 1
        if self.busy:
            return TOO_MANY
        if call == "generations":
            return document("pending", id=f"task-unified-{number}")
        return JSONResponse({"data": {}}) if call == "credits" else failed("service_error")


async def submitted(folder: Path, count: int, first_query_ms: int = DAY_MS) -> list[str]:
    """Writes `count` submitted tasks into the store of a world that is not open yet. Returns their
    ids.
    """
    ids = [new_id("task", wall_clock()) for _ in range(count)]
    make_secret_file(folder / "data" / "secret.key")
    async with open_sqlite(
        folder / "data" / "darkroom.db", process="before", new_id=new_id
    ) as store:
        for start in range(0, count, CHUNK):
            chunk = ids[start : start + CHUNK]
            await asyncio.gather(
                *(store.write(insert_tasks, waiting(task_id), urgent=True) for task_id in chunk)
            )
            taken = [
                SubmissionResult(
                    Lease("submit", task_id, 0, 0),
                    Accepted(Report(upstream_id=f"u-{task_id}")),
                    wait_ms=first_query_ms,
                )
                for task_id in chunk
            ]
            await asyncio.gather(
                *(store.write(record_submissions, each, urgent=True) for each in taken)
            )
    return ids


async def call_back(here: World, ids: Sequence[str], at_once: int = 32) -> None:
    """Sends the upstream's callbacks for these tasks. Raises AssertionError unless each is
    accepted.
    """
    connections = asyncio.Semaphore(at_once)

    async def one(task_id: str) -> None:
        async with connections:
            answer = await here.stranger.post(
                here.callback_url(task_id), json={"id": f"u-{task_id}", "status": "failed"}
            )
        assert (answer.status_code, answer.json()["status"]) == (200, "accepted")

    await asyncio.gather(*(one(task_id) for task_id in ids))


async def count_of(here: World, *conditions: Any) -> int:
    def query(connection: Connection) -> int:
        return connection.execute(select(func.count()).where(*conditions)).scalar_one()

    return await here.context.resources.store.read(query)


async def all_settled(here: World, timeout: float = 60) -> None:
    async def none_left() -> bool:
        return await count_of(here, tasks.c.state != State.FAILED) == 0

    await wait_until(none_left, timeout)


# --- the limit
# ---------------------------------------------------------------------------------------------


async def flood(
    folder: Path, callbacks: int, silent: int, concurrency: int, timeout: float = 60
) -> Slow:
    """Sends callbacks while silent tasks are due for reconciling and clients read and submit. Every
    task settles once.
    """
    upstream = Slow()
    called = await submitted(folder, callbacks)
    await submitted(folder, silent, first_query_ms=0)
    async with world(folder, upstream=upstream.app, evolink_concurrency=concurrency) as here:
        passed = asyncio.gather(*(here.client.get("/v1/credits") for _ in range(20)))
        sent = asyncio.gather(
            *(here.submit(headers={"prefer": "respond-async"}) for _ in range(20))
        )
        await call_back(here, called)
        assert {answer.status_code for answer in await passed} == {200}
        await call_back_later(here, [task["id"] for task in await sent])
        await all_settled(here, timeout)
        assert await count_of(here, events.c.terminal.is_(True)) == callbacks + silent + 20
    return upstream


async def call_back_later(here: World, ids: Sequence[str]) -> None:
    """Waits until the submissions are recorded, then calls back. The callbacks omit the upstream's
    id, which the submission's answer has given.
    """

    async def all_there() -> bool:
        return await count_of(here, tasks.c.id.in_(ids), tasks.c.upstream_id.is_(None)) == 0

    await wait_until(all_there)
    for task_id in ids:
        answer = await here.stranger.post(here.callback_url(task_id), json={"status": "failed"})
        assert answer.status_code == 200


async def test_a_batch_of_callbacks_makes_no_more_calls_than_the_setting_says(
    tmp_path: Path,
) -> None:
    """Confirmations, reconciling, submissions and passed-through calls together never exceed
    `EVOLINK_CONCURRENCY`, and all tasks settle.
    """
    upstream = await flood(tmp_path, callbacks=100, silent=50, concurrency=5)
    assert upstream.most == 5
    assert (upstream.calls["generations"], upstream.calls["credits"]) == (20, 20)
    assert {
        task: count for task, count in upstream.calls.items() if task.startswith("u-") and count > 1
    } == {}


# --- priorities
# ------------------------------------------------------------------------------------------------


@asynccontextmanager
async def backlog(
    folder: Path, silent: int
) -> AsyncIterator[tuple[World, Slow, list[str], list[str]]]:
    """A world with many due silent tasks whose queries hang. Yields their ids and the ids of five
    other tasks.
    """
    answered = asyncio.Event()
    others = await submitted(folder, 5)
    quiet = await submitted(folder, silent, first_query_ms=0)
    names = {f"u-{task_id}" for task_id in quiet}

    async def ready(call: str) -> None:
        if call in names:
            await answered.wait()

    upstream = Slow(ready)
    async with world(folder, upstream=upstream.app, evolink_concurrency=8) as here:
        await wait_until(lambda: upstream.running == 7)
        try:
            yield here, upstream, quiet, others
        finally:
            answered.set()


async def test_a_backlog_of_silent_tasks_delays_no_confirmation(tmp_path: Path) -> None:
    """Hundreds of tasks are due for reconciling, and their queries hang. The worker still confirms
    one callback after another.
    """
    async with backlog(tmp_path, 300) as (here, upstream, _silent, others):
        for task_id in others:
            await call_back(here, [task_id])
            assert (await here.ended(task_id))["state"] == "failed"
        assert (upstream.running, upstream.most) == (7, 8)
        figures = (await here.client.get("/metrics")).text
        assert 'darkroom_queue_depth{stage="reconcile"} 300.0' in figures
        assert 'darkroom_queue_depth{stage="settle"} 0.0' in figures


async def test_a_callback_for_a_task_that_waits_to_be_reconciled_goes_first(tmp_path: Path) -> None:
    """A reconciler that gets no slot releases its row. The confirmation of that task's callback
    then waits for no silent task.
    """
    async with backlog(tmp_path, 8) as (here, upstream, silent, _others):
        (last,) = (task_id for task_id in silent if not upstream.calls[f"u-{task_id}"])
        await wait_until(
            lambda: len(here.context.resources.limiter.kinds["reconcile"].waiting) == 1
        )
        await call_back(here, [last])
        await wait_until(lambda: upstream.calls[f"u-{last}"])
        assert [upstream.running, here.context.resources.limiter.used("confirm")] == [8, 1]


# --- answers of 429
# --------------------------------------------------------------------------------------------


async def test_an_upstream_that_is_too_busy_sees_fewer_calls_until_it_is_not(
    tmp_path: Path,
) -> None:
    """After repeated 429 answers the service makes one call at a time. Once the calls succeed the
    limit rises to its former value, and every task settles.
    """
    gate = asyncio.Event()

    async def held(_call: str) -> None:
        await gate.wait()

    upstream = Slow(held, busy=True)
    called = await submitted(tmp_path, 150)
    async with world(tmp_path, upstream=upstream.app, evolink_concurrency=8) as here:
        limiter = here.context.resources.limiter
        await call_back(here, called)
        await wait_until(lambda: upstream.running == 8)
        upstream.ready = a_while
        gate.set()
        await wait_until(lambda: limiter.kinds["confirm"].limit == 1 and limiter.used() <= 1)
        assert upstream.most == 8
        upstream.most, before = 0, upstream.calls.total()
        await wait_until(lambda: upstream.calls.total() > before + 10)
        assert upstream.most == 1
        gate.clear()

        async def held_at_last(call: str) -> None:
            await (held(call) if limiter.kinds["confirm"].limit == 8 else a_while(call))

        upstream.busy, upstream.ready = False, held_at_last
        await wait_until(lambda: upstream.most == 8)
        gate.set()
        await all_settled(here)
        assert limiter.kinds["confirm"].limit == 8


async def test_a_429_is_heard_wherever_it_comes(tmp_path: Path) -> None:
    """A 429 to a submission, confirmation, query or passed-through call halves the limit of its
    kind, and the gauge shows it.
    """
    upstream = Slow(busy=True)
    (called,), _ = await submitted(tmp_path, 1), await submitted(tmp_path, 1, first_query_ms=0)
    async with world(tmp_path, upstream=upstream.app, submit_schedule="600") as here:
        limiter = here.context.resources.limiter
        await wait_until(lambda: limiter.kinds["reconcile"].limit == 7)
        assert [
            limiter.kinds["confirm"].limit,
            limiter.kinds["submit"].limit,
            limiter.kinds["passthrough"].limit,
        ] == [16, 12, 4]
        await here.submit()
        assert [
            limiter.kinds["confirm"].limit,
            limiter.kinds["submit"].limit,
            limiter.kinds["passthrough"].limit,
        ] == [16, 6, 4]
        assert (await here.client.get("/v1/credits")).status_code == 429
        assert [
            limiter.kinds["confirm"].limit,
            limiter.kinds["submit"].limit,
            limiter.kinds["passthrough"].limit,
        ] == [16, 6, 2]
        await call_back(here, [called])
        await wait_until(lambda: limiter.kinds["confirm"].limit <= 8)
        assert (
            'darkroom_upstream_limit{kind="submit"} 6.0' in (await here.client.get("/metrics")).text
        )


async def test_what_is_passed_through_does_not_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A passed-through call that gets no slot in time is answered 503 with `Retry-After` and is not
    sent. With a free slot it is sent.
    """
    upstream = Slow()
    async with world(tmp_path, upstream=upstream.app, evolink_concurrency=2) as here:
        monkeypatch.setattr(upstream_routes, "SLOT_S", 0.05)
        async with AsyncExitStack() as places:
            for _ in range(2):
                await places.enter_async_context(here.context.resources.limiter.slot("confirm"))
            for path in ("/v1/credits", "/v1/models", "/v1/tasks/task-unified-nobody"):
                answer = await here.client.get(path)
                assert (answer.status_code, answer.json()["error"]["code"]) == (
                    503,
                    "upstream_unavailable",
                )
                assert answer.headers["retry-after"] == "5"
        assert upstream.calls.total() == 0
        monkeypatch.setattr(upstream_routes, "SLOT_S", 30.0)
        assert (await here.client.get("/v1/credits")).status_code == 200
