"""The upstream's callbacks over real sockets. `tests/contract/test_store_inbox.py` has the table of
docs/callbacks.md row by row.
"""

import asyncio
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
from tests.callbacks import call, counted, heard, quick_world, said, types, verdict
from tests.upstream import After, Upstream, document, failed
from tests.waiting import wait_until
from tests.world import World

WORLD = quick_world


# --- the table
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


async def test_a_callback_for_a_task_that_is_gone_is_answered(here: World) -> None:
    """The right token of a deleted task gets 200 `unknown`. It is logged, and nothing is stored."""
    with capture_logs() as lines:
        assert await verdict(here, "task_gone", b'{"status": "completed"}') == "unknown"
    assert [
        (line["verdict"], line["task_id"]) for line in lines if line["event"] == "callback.received"
    ] == [("unknown", "task_gone")]


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
    """The answer is 503 with `Retry-After: 1`, and nothing is stored. The log has the cause. The
    same callback is accepted once the store is back.
    """
    task = await here.submit()
    upstream.queries[task["upstream_id"]] = [failed("service_error")]

    def full(_: Connection) -> None:
        raise OperationalError("COMMIT", {}, sqlite3.OperationalError("database or disk is full"))

    before = counted(here, "unavailable")
    with commits(here, full), capture_logs() as lines:
        answer = await call(here, task, said(task, "failed"))
        assert (
            answer.status_code,
            answer.headers["retry-after"],
            answer.json()["error"]["code"],
        ) == (503, "1", "unavailable")
        assert counted(here, "unavailable") == before + 1
        (line,) = [line for line in lines if line["event"] == "callback.refused"]
        assert "database or disk is full" in line["exception"]
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
