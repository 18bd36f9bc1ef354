"""The upstream's callbacks over real sockets: each row of the table in docs/callbacks.md."""

import asyncio
import json
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import Connection, event
from sqlalchemy.exc import OperationalError
from structlog.testing import capture_logs

from service.db.sqlite import REMEMBERED, SqliteStore
from service.tasks import inbox_worker
from tests.callbacks import asked, call, counted, heard, quick_world, said, types, verdict
from tests.upstream import After, Upstream, document, failed
from tests.waiting import wait_until
from tests.world import World

WORLD = quick_world


# --- the table, row by row
# ---------------------------------------------------------------------------------------------


async def test_the_first_terminal_callback_is_accepted_and_settled(
    here: World, upstream: Upstream
) -> None:
    """The answer is 200 `accepted`. The service queries the upstream, and that answer ends the
    task.
    """
    task = await here.submit()
    upstream.queries[task["upstream_id"]] = [failed("service_error")]
    assert await verdict(here, task, said(task, "failed")) == "accepted"
    assert (await here.ended(task["id"]))["error"]["code"] == "service_error"
    assert await heard(here, task) == [("accepted", "failed", 1)]
    assert upstream.asked[task["upstream_id"]] == 1


async def test_the_same_again_is_a_duplicate_and_nothing_else(
    here: World, upstream: Upstream
) -> None:
    """Ten arrive at once and one after the end. One is accepted, the rest are counted on it, and
    there is one query and one terminal event.
    """
    task = await here.submit()
    upstream.queries[task["upstream_id"]] = [failed("service_error")]
    bodies = [
        said(task, "failed", attempt=number) for number in range(10)
    ]  # equal content need not be equal bytes
    verdicts = await asyncio.gather(*(verdict(here, task, body) for body in bodies))
    assert sorted(verdicts) == ["accepted"] + ["duplicate"] * 9
    await here.ended(task["id"])
    assert await verdict(here, task, bodies[0]) == "duplicate"
    assert await heard(here, task) == [("accepted", "failed", 11)]
    assert await types(here, task) == ["image.task.submitted", "image.task.failed"]
    assert upstream.asked[task["upstream_id"]] == 1


async def test_every_spelling_of_cancelled_is_the_same(here: World, upstream: Upstream) -> None:
    task = await here.submit()
    upstream.queries[task["upstream_id"]] = [document("canceled")]
    error = {"code": "request_cancelled", "message": "gone"}
    spelled = [said(task, "failed", error=error), said(task, "cancelled"), said(task, "canceled")]
    assert [await verdict(here, task, body) for body in spelled] == [
        "accepted",
        "duplicate",
        "duplicate",
    ]
    assert (await here.ended(task["id"]))["state"] == "cancelled"


async def test_another_terminal_callback_is_a_conflict_told_once(
    here: World, upstream: Upstream
) -> None:
    """A different status or different results are 200 `conflict`. The body is stored, the service
    queries the upstream, and operators get one event. The settled outcome stays.
    """
    task = await here.submit()
    upstream.queries[task["upstream_id"]] = [failed("service_error", usage={"credits_used": 0})]
    assert await verdict(here, task, said(task, "failed")) == "accepted"
    await here.ended(task["id"])
    before = upstream.asked[task["upstream_id"]]
    contradiction = said(task, "completed", results=["https://files.evolink.ai/x.png"])
    assert [await verdict(here, task, contradiction) for _ in range(3)] == ["conflict"] * 3
    await asked(upstream, task, before + 1)
    assert (
        await verdict(
            here, task, said(task, "completed", results=["https://files.evolink.ai/y.png"])
        )
        == "conflict"
    )
    assert (await here.task(task["id"]))["state"] == "failed"
    assert await types(here, task) == [
        "image.task.submitted",
        "image.task.failed",
        "callback.conflict",
        "callback.conflict",
    ]
    assert [count for _, _, count in await heard(here, task)] == [1, 3, 1]
    conflict = (await here.events(task=task["id"], type="callback.conflict"))[0]["data"]
    assert (conflict["task_id"], conflict["upstream_id"]) == (task["id"], task["upstream_id"])


async def test_a_conflict_before_the_end_is_decided_by_the_upstream(
    here: World, upstream: Upstream
) -> None:
    """Two callbacks contradict each other before the task is settled. The query's answer counts,
    not the first callback.
    """
    task = await here.submit()
    answer = asyncio.Event()
    upstream.queries[task["upstream_id"]] = [After(answer.wait, failed("service_error"))]
    assert (
        await verdict(here, task, said(task, "completed", results=["http://127.0.0.1:9/x.png"]))
        == "accepted"
    )
    assert await verdict(here, task, said(task, "failed")) == "conflict"
    answer.set()
    ended = await here.ended(task["id"])
    assert (ended["state"], ended["images"]) == ("failed", [])
    assert await types(here, task) == [
        "image.task.submitted",
        "callback.conflict",
        "image.task.failed",
    ]


async def test_what_is_not_terminal_is_progress_only(here: World, upstream: Upstream) -> None:
    """`processing` moves status and progress forward and never back, and causes no query. An
    unknown status changes nothing.
    """
    task = await here.submit()
    assert await verdict(here, task, said(task, "processing", progress=40)) == "accepted"
    shown = await here.task(task["id"])
    assert (shown["state"], shown["status"], shown["progress"]) == ("submitted", "processing", 40)
    assert await verdict(here, task, said(task, "pending", progress=10)) == "accepted"
    assert await verdict(here, task, said(task, "teleporting")) == "accepted"
    shown = await here.task(task["id"])
    assert (shown["state"], shown["status"], shown["progress"]) == ("submitted", "processing", 40)
    assert upstream.asked[task["upstream_id"]] == 0
    upstream.queries[task["upstream_id"]] = [failed("service_error")]
    await verdict(here, task, said(task, "failed"))
    await here.ended(task["id"])
    assert await verdict(here, task, said(task, "processing", progress=90)) == "accepted"
    after = await here.task(task["id"])
    assert (after["state"], after["progress"]) == ("failed", 40)


async def test_a_foreign_upstream_id_is_a_conflict(here: World, upstream: Upstream) -> None:
    """The body names another upstream task than the known one. It is stored, the service queries
    the upstream, and the known id stays.
    """
    task = await here.submit()
    other = await here.submit()
    upstream.queries[task["upstream_id"]] = [failed("service_error")]
    for name in ("task-unified-foreign", other["upstream_id"]):
        assert (
            await verdict(here, task, said({**task, "upstream_id": name}, "completed"))
            == "conflict"
        )
    ended = await here.ended(task["id"])
    assert (ended["upstream_id"], ended["state"]) == (task["upstream_id"], "failed")
    assert (await types(here, task)).count("callback.conflict") == 2
    assert (await here.task(other["id"]))["state"] == "submitted"


async def test_a_callback_for_a_task_that_is_gone_is_answered(here: World) -> None:
    """The right token of a deleted task gets 200 `unknown`. It is logged, and nothing is stored."""
    with capture_logs() as lines:
        assert await verdict(here, "task_gone", b'{"status": "completed"}') == "unknown"
    assert [
        (line["verdict"], line["task_id"]) for line in lines if line["event"] == "callback.received"
    ] == [("unknown", "task_gone")]


@pytest.mark.parametrize(
    "named", ["task-unified-early", None], ids=["with its id", "without an id"]
)
async def test_a_callback_may_come_before_the_submit_answer(
    named: str | None, here: World, upstream: Upstream
) -> None:
    """The answer is never 404. The callback binds the id that it names, the submit answer's id
    wins, and the task is settled although the callback does not come again.
    """
    prompt, answered, mine = f"early {named}", asyncio.Event(), f"task-unified-answer-{named}"
    upstream.submits[prompt] = [After(answered.wait, document("pending", id=mine))]
    upstream.queries[mine] = [failed("service_error")]
    task = await here.submit(prompt=prompt, headers={"prefer": "respond-async"})
    await wait_until(lambda: upstream.received[prompt])
    body = {"status": "failed"} if named is None else {"status": "failed", "id": named}
    assert await verdict(here, task, json.dumps(body).encode()) == "accepted"
    early = await here.task(task["id"])
    assert (early["upstream_id"], early["state"]) == (named, "submitted" if named else "submitting")
    answered.set()
    ended = await here.ended(task["id"])
    assert (ended["upstream_id"], ended["error"]["code"]) == (mine, "service_error")
    assert await types(here, task) == ["image.task.submitted", "image.task.failed"]


@contextmanager
def commits(here: World, hook: Callable[[Connection], None]) -> Iterator[None]:
    """Runs `hook` before each commit of the store, on the thread that waits for a slow disk."""
    store = here.context.resources.store
    assert isinstance(store, SqliteStore)
    store._commits.extend([1.0] * REMEMBERED)
    event.listen(store._engine, "commit", hook)
    try:
        yield
    finally:
        event.remove(store._engine, "commit", hook)


async def test_a_store_that_fails_to_commit_promises_nothing(
    here: World, upstream: Upstream
) -> None:
    """The answer is 503 with `Retry-After: 1`, and nothing is stored. The same callback is accepted
    once the store is back.
    """
    task = await here.submit()
    upstream.queries[task["upstream_id"]] = [failed("service_error")]

    def full(_: Connection) -> None:
        raise OperationalError("COMMIT", {}, sqlite3.OperationalError("database or disk is full"))

    before = counted(here, "unavailable")
    with commits(here, full):
        answer = await call(here, task, said(task, "failed"))
        assert (
            answer.status_code,
            answer.headers["retry-after"],
            answer.json()["error"]["code"],
        ) == (503, "1", "unavailable")
        assert counted(here, "unavailable") == before + 1
    assert await heard(here, task) == []
    assert await verdict(here, task, said(task, "failed")) == "accepted"
    await here.ended(task["id"])


async def test_a_store_that_takes_too_long_promises_nothing(
    here: World, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer is 503 when the commit takes over 8 s (shorter here). If the commit still
    succeeds, the repeated callback is a duplicate.
    """
    task = await here.submit()
    upstream.queries[task["upstream_id"]] = [failed("service_error")]
    quick = threading.Event()

    def wait(_: Connection) -> None:
        quick.wait(20)

    with commits(here, wait), monkeypatch.context() as patch:
        patch.setattr(inbox_worker, "COMMIT_S", 0.05)
        answer = await call(here, task, said(task, "failed"))
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        quick.set()
    assert await verdict(here, task, said(task, "failed")) in ("accepted", "duplicate")
    assert (await here.ended(task["id"]))["error"]["code"] == "service_error"
    assert await types(here, task) == ["image.task.submitted", "image.task.failed"]


# --- rules for all of them
# ---------------------------------------------------------------------------------------------


async def test_the_answer_comes_before_anything_else(here: World, upstream: Upstream) -> None:
    """The upstream does not answer and its files stall, but callbacks are answered. The request
    itself makes no query and fetches no file.
    """
    task, silence = await here.submit(), asyncio.Event()
    upstream.queries[task["upstream_id"]] = [
        After(silence.wait, document("completed", f"{here.sandbox_url}/files/stalled.png"))
    ]
    upstream.files["stalled.png"] = [After(silence.wait, document("later"))]
    result = f"{here.sandbox_url}/files/stalled.png"
    assert await verdict(here, task, said(task, "completed", results=[result])) == "accepted"
    assert await verdict(here, task, said(task, "completed", results=[result])) == "duplicate"
    await wait_until(
        lambda: upstream.asked["stalled.png"] == 1 and upstream.asked[task["upstream_id"]] == 1
    )
    assert (await here.task(task["id"]))["state"] == "submitted"
    answer = await here.client.post(f"/v1/tasks/{task['id']}/cancel")
    assert answer.json()["state"] == "cancelled"
    silence.set()


async def test_a_flood_of_different_bodies_is_kept_in_part(here: World) -> None:
    """The service stores a few different callbacks of one task and counts the rest. Each gets its
    answer.
    """
    task = await here.submit()
    verdicts = await asyncio.gather(
        *(verdict(here, task, b"garbage %d" % number) for number in range(40))
    )
    assert verdicts == ["unreadable"] * 40
    counts = [count for _, _, count in await heard(here, task)]
    assert (len(counts), sum(counts)) == (20, 40)


async def test_a_callback_asked_for_again_while_the_query_runs_is_not_lost(
    here: World, upstream: Upstream
) -> None:
    """A callback during a query may be newer than its answer, so the service queries the upstream
    once more.
    """
    task, answer = await here.submit(), asyncio.Event()
    upstream.queries[task["upstream_id"]] = [
        After(answer.wait, document("processing")),
        failed("service_error"),
    ]
    assert await verdict(here, task, b"garbage") == "unreadable"
    await asked(upstream, task)
    assert await verdict(here, task, said(task, "failed")) == "accepted"
    answer.set()
    assert (await here.ended(task["id"]))["error"]["code"] == "service_error"
