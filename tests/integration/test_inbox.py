"""Callbacks in the inbox of real processes: without a worker, and beside rows that cannot be
judged.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event
from structlog.testing import capture_logs

from service.app import Role
from service.db.postgres import PostgresStore
from service.db.tables import inbox
from service.tasks import inbox_worker
from service.tasks.inbox_worker import Waiting, insert_callbacks, judge_callbacks
from tests.callbacks import counted, heard, said, verdict
from tests.upstream import Upstream, failed
from tests.waiting import wait_until
from tests.world import World, world

WEB, WORKER = Role(workers=False), Role(web=False)


async def sent(here: World, task_id: str, body: bytes) -> None:
    """Sends a callback, and does not wait for its verdict."""
    answer = await here.stranger.post(here.callback_url(task_id), content=body)
    assert (answer.status_code, answer.json()) == (200, {"status": "accepted"})


async def rows(here: World) -> list[dict[str, Any]]:
    select = inbox.select().order_by(inbox.c.sequence)
    read = here.context.resources.store.read
    return await read(lambda connection: [dict(r) for r in connection.execute(select).mappings()])


async def submitted(folder: Path, upstream: Upstream, count: int) -> list[dict[str, Any]]:
    """The tasks of a store whose process has stopped."""
    async with world(folder, upstream=upstream.app, reconcile_after_s=600) as here:
        return [await here.submit() for _ in range(count)]


async def test_without_a_worker_callbacks_wait_and_a_start_judges_them(tmp_path: Path) -> None:
    """Every kind gets 200 `accepted`. `queue_depth` counts the rows. A start of workers judges
    them first, in their order, and the log and the metrics have the verdicts.
    """
    upstream = Upstream()
    first, other = await submitted(tmp_path, upstream, 2)
    upstream.queries[first["upstream_id"]] = [failed("service_error")]
    bodies = [said(first, "completed"), b"garbage", said(first, "failed"), said(first, "completed")]
    async with world(tmp_path, upstream=upstream.app, role=WEB) as here:
        for body in bodies:
            await sent(here, first["id"], body)
        await sent(here, other["id"], said(other, "processing"))
        await sent(here, "task_gone", b"{}")
        assert await heard(here, first) == []
        metrics = (await here.client.get("/metrics")).text
        assert 'darkroom_queue_depth{stage="inbox"} 6.0' in metrics
        assert 'darkroom_callbacks_total{verdict="accepted"} 0.0' in metrics
    with capture_logs() as lines:
        async with world(tmp_path, upstream=upstream.app, reconcile_after_s=600) as here:
            assert await rows(here) == []
            assert (await here.ended(first["id"]))["error"]["code"] == "service_error"
            assert counted(here, "accepted") == 2
            assert counted(here, "unknown") == 1
            kept = await heard(here, first)
    assert [verdict for verdict, _, _ in kept] == ["accepted", "unreadable", "conflict"]
    of_first = [line for line in lines if line["event"] == "callback.received"]
    assert [line["verdict"] for line in of_first if line["task_id"] == first["id"]] == [
        "accepted",
        "unreadable",
        "conflict",
        "duplicate",
    ]
    started = next(n for n, line in enumerate(lines) if line["event"] == "service.started")
    assert all(lines.index(line) < started for line in of_first)


async def test_one_transaction_judges_at_most_fifty_rows(tmp_path: Path) -> None:
    """Thousands of large ones would stop the event loop for seconds. They keep their order."""
    upstream = Upstream()
    [task] = await submitted(tmp_path, upstream, 1)
    async with world(tmp_path, upstream=upstream.app, role=WEB) as here:
        for _ in range(120):
            await sent(here, task["id"], said(task, "processing"))
        waiting = [row["id"] for row in await rows(here)]
        resources = here.context.resources
        item = Waiting(task["id"], resources.upstreams, 1000)
        judged = [await resources.store.write(judge_callbacks, item) for _ in range(4)]
    assert [len(each) for each in judged] == [50, 50, 20, 0]
    assert [callback.id for each in judged for callback, _ in each] == waiting


async def test_a_row_that_cannot_be_judged_holds_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker logs and counts the failure, and tries again later. The row stays."""
    monkeypatch.setattr(inbox_worker, "ROWS", 1)
    upstream, foreign = Upstream(), {"size": 2, "digest": "", "body": b"{}", "upstream": "another"}
    async with world(tmp_path, upstream=upstream.app, reconcile_after_s=600) as here:
        stuck, task = [await here.submit() for _ in range(2)]
        upstream.queries[task["upstream_id"]] = [failed("service_error")]
        store = here.context.resources.store
        with capture_logs() as lines:
            await store.write(insert_callbacks, {"id": "cb_1", "task_id": stuck["id"], **foreign})
            await sent(here, task["id"], said(task, "failed"))
            await here.ended(task["id"])
        line = next(line for line in lines if line["event"] == "worker.failed")
        assert (line["stage"], line["key"], line["attempt"]) == ("inbox", stuck["id"], 1)
        assert [row["task_id"] for row in await rows(here)] == [stuck["id"]]


async def test_the_worker_goes_on_after_a_fault_of_its_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream, looks = Upstream(), iter([True])
    look = inbox_worker.waiting_tasks

    def fails_once(connection: Connection, held: Sequence[str]) -> list[str]:
        if next(looks, False):
            raise ValueError("no error of the store")
        return look(connection, held)

    async with world(tmp_path, upstream=upstream.app, reconcile_after_s=600) as here:
        task = await here.submit()
        upstream.queries[task["upstream_id"]] = [failed("service_error")]
        monkeypatch.setattr(inbox_worker, "waiting_tasks", fails_once)
        with capture_logs() as lines:
            await sent(here, task["id"], said(task, "failed"))
            await here.ended(task["id"])
    assert [line["stage"] for line in lines if line["event"] == "worker.failed"] == ["inbox"]


async def test_a_timeline_is_read_while_a_callback_is_judged(tmp_path: Path) -> None:
    """Each of its statements has a snapshot of its own."""
    loop, armed = asyncio.get_running_loop(), [True]
    async with world(tmp_path, upstream=Upstream().app, reconcile_after_s=600) as here:
        task = await here.submit()

        def meanwhile(_connection: object, _cursor: object, statement: str, *_: object) -> None:
            if "callbacks.body" in statement and armed:
                armed.clear()
                judging = verdict(here, task, b"garbage")
                asyncio.run_coroutine_threadsafe(judging, loop).result(30)

        event.listen(Engine, "before_cursor_execute", meanwhile)
        try:
            async with asyncio.timeout(30):
                before, after = await heard(here, task), await heard(here, task)
        finally:
            event.remove(Engine, "before_cursor_execute", meanwhile)
        assert (before, after) == ([], [("unreadable", None, 1)])


async def test_a_worker_of_another_process_hears_of_a_callback(
    tmp_path: Path, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NOTIFY wakes the worker, long before its next look. Only the worker counts the verdict."""
    monkeypatch.setattr(inbox_worker, "LOOK_S", 600)
    hints, take = list[str](), PostgresStore._take_hint

    def heard_hint(store: PostgresStore, text: str) -> None:
        hints.append(text)
        take(store, text)

    monkeypatch.setattr(PostgresStore, "_take_hint", heard_hint)
    upstream = Upstream()
    shared: dict[str, Any] = {"database_url": postgres_url, "secret_key": "k" * 32}
    shared |= {"upstream": upstream.app, "reconcile_after_s": 600}
    async with (
        world(tmp_path / "web", role=WEB, **shared) as web,
        world(tmp_path / "worker", role=WORKER, **shared) as worker,
    ):
        await wait_until(lambda: hints.count("{}") >= 2)  # both listen
        task = await web.submit()
        upstream.queries[task["upstream_id"]] = [failed("service_error")]
        await sent(web, task["id"], said(task, "failed"))
        assert (await web.ended(task["id"]))["error"]["code"] == "service_error"
        assert await heard(web, task) == [("accepted", "failed", 1)]
        await wait_until(lambda: counted(worker, "accepted") == 1)
        assert counted(web, "accepted") == 0


async def test_nothing_is_kept_of_a_callback_that_waited_while_its_task_was_erased(
    tmp_path: Path,
) -> None:
    """The verdict counts, and the body is not kept."""
    upstream = Upstream()
    (task,) = await submitted(tmp_path, upstream, 1)
    async with world(tmp_path, upstream=upstream.app, role=WEB) as here:
        await here.client.post(f"/v1/tasks/{task['id']}/cancel")
        await sent(here, task["id"], said(task, "failed", note="a lighthouse"))
        assert (await here.client.delete(f"/v1/tasks/{task['id']}")).status_code == 204
    async with world(tmp_path, upstream=upstream.app, reconcile_after_s=600) as here:
        answer = await here.client.get(f"/v1/tasks/{task['id']}/callbacks")
        (callback,) = answer.json()["data"]
        assert (callback["verdict"], callback["body"]) == ("accepted", None)
