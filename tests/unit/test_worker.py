"""The workers of a process on a real embedded store: no row is done twice, dropped, or retried for
ever.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import structlog
from sqlalchemy import Connection, select
from structlog.testing import capture_logs

from service.db import prepared
from service.db.sqlite import REMEMBERED, SqliteStore
from service.db.tables import events, tasks
from service.db.transaction import Lease, Transaction
from service.errors import StoreUnavailable
from service.ops.metrics import Metrics
from service.queue import leases, worker
from service.queue.crashes import CRASH_LIMIT
from service.queue.leases import LEASE_MS
from service.queue.outlook import Outlook
from service.queue.stage import Stage
from service.queue.worker import WorkerPool
from service.resources import new_id
from service.tasks import task_queries
from service.tasks.accept import insert_tasks
from service.tasks.rows import TaskRow
from service.tasks.state import State
from service.tasks.submissions import SubmissionResult, record_submissions
from service.tasks.transitions import dead_letter_task
from service.upstreams.base import Accepted, Report
from tests.stores import open_sqlite
from tests.waiting import wait_until
from tests.world import new_store

START = 1_757_165_031_000


async def at_once() -> None:
    """Waits for nothing before a job starts."""


@dataclass(slots=True)
class Harness:
    """A store on a clock of the test. `working` runs workers in it."""

    store: SqliteStore
    now: list[int]
    metrics: Metrics = field(default_factory=Metrics)
    transactions: list[Transaction] = field(default_factory=list)

    async def queue(self, *ids: str) -> None:
        """Inserts tasks that are due to be submitted."""
        made = [
            TaskRow(id, "acme", "evolink", "m", State.QUEUED, 0, body=b"{}", request_id="req-1")
            for id in ids
        ]
        await asyncio.gather(*(self.store.write(insert_tasks, task) for task in made))

    async def row(self, task_id: str) -> Any:
        return await self.store.read(task_queries.task_row, task_id, None)

    async def types(self) -> list[str]:
        def read(connection: Connection) -> list[str]:
            return list(
                connection.execute(select(events.c.type).order_by(events.c.sequence)).scalars()
            )

        return await self.store.read(read)

    @asynccontextmanager
    async def working(
        self,
        run: Callable[[Lease], Awaitable[None]],
        places: int = 2,
        turn: Callable[[], Awaitable[None]] = at_once,
        rows: leases.Rows | None = None,
    ) -> AsyncIterator[WorkerPool]:
        pool = WorkerPool(
            self.store,
            [Stage("submit", places, run, dead_letter_task, rows=rows)],
            self.metrics,
            self.transactions.append,
            turn,
        )
        async with at_work(pool):
            yield pool

    def counted(self, stage: str) -> float:
        return (
            self.metrics.registry.get_sample_value("darkroom_worker_faults_total", {"stage": stage})
            or 0
        )


@asynccontextmanager
async def at_work(pool: WorkerPool) -> AsyncIterator[None]:
    claiming = asyncio.create_task(pool.run())
    await wait_until(lambda: pool.alive)
    try:
        yield
    finally:
        claiming.cancel()
        with suppress(asyncio.CancelledError):
            await claiming
        await pool.stop(5)


@pytest.fixture
async def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Harness]:
    monkeypatch.setattr(worker, "LOOK_S", 0.02)
    now, path = [START], tmp_path / "darkroom.db"
    path.write_bytes(new_store())
    async with open_sqlite(path, process="here", new_id=new_id, clock=lambda: now[0]) as store:
        yield Harness(store, now)


def finishing(store: SqliteStore, done: list[str]) -> Callable[[Lease], Awaitable[None]]:
    async def run(lease: Lease) -> None:
        done.append(lease.key)
        await store.write(leases.done, lease)

    return run


async def test_a_lease_that_is_handed_over_twice_costs_no_place(harness: Harness) -> None:
    """Both jobs end, and each frees its place."""
    stage = Stage("submit", 2, lambda _: at_once(), dead_letter_task)
    pool = WorkerPool(harness.store, [stage], harness.metrics, harness.transactions.append, at_once)
    assert pool.reserve() == {"submit": 2}
    pool.take([Lease("submit", "task", 1, 1)] * 2, {})
    await wait_until(lambda: stage.free == 2)


async def test_every_due_row_is_done_once(harness: Harness) -> None:
    """Some rows were due before, some are leased when they are inserted, and some exceed the
    places.
    """
    done: list[str] = []
    await harness.queue("task_a", "task_b", "task_c")
    async with harness.working(finishing(harness.store, done)):
        await harness.queue(*(f"task_{number}" for number in range(20)))
        await wait_until(lambda: len(done) == 23)
    assert len(set(done)) == 23
    assert (
        sum(len(tx.due) for tx in harness.transactions) > 0
    )  # the pool saw the committed transactions


async def test_a_busy_stage_does_not_keep_another_stage_from_looking(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that becomes due by time alone is claimed within one look, while another stage's
    backlog wakes the workers all the time.
    """
    monkeypatch.setattr(worker, "LOOK_S", 0.2)
    clock, reconciled = asyncio.get_running_loop().time, asyncio.Event()
    jobs, busy_until = [0], clock() + 30

    async def submit(lease: Lease) -> None:
        jobs[0] += 1
        if not reconciled.is_set() and clock() < busy_until:
            await harness.queue(f"task_more_{jobs[0]}")
        await harness.store.write(leases.done, lease)

    async def run(lease: Lease) -> None:
        await harness.store.write(leases.done, lease)
        reconciled.set()

    await harness.queue("task_silent", "task_a", "task_b", "task_c")
    pool = WorkerPool(
        harness.store,
        [
            Stage("submit", 1, submit, dead_letter_task),
            Stage("reconcile", 1, run, dead_letter_task),
        ],
        harness.metrics,
        harness.transactions.append,
        at_once,
    )
    async with at_work(pool):
        accepted = SubmissionResult(
            Lease("submit", "task_silent", 0, 0), Accepted(Report(upstream_id="u-1")), wait_ms=0
        )
        await harness.store.write(record_submissions, accepted)
        await reconciled.wait()
        assert clock() < busy_until


async def test_a_stage_never_has_more_jobs_than_places(harness: Harness) -> None:
    """With two places, two of ten rows are leased. Each job that ends makes room for one more."""
    gate, started, most = asyncio.Event(), set[str](), [0]

    async def run(lease: Lease) -> None:
        started.add(lease.key)
        most[0] = max(most[0], len(started))
        await gate.wait()
        started.discard(lease.key)
        await harness.store.write(leases.done, lease)

    async with harness.working(run):
        await harness.queue(*(f"task_{number}" for number in range(10)))
        await wait_until(lambda: len(started) == 2)
        await harness.queue("task_later")
        assert len(started) == 2
        leased = [(await harness.row(f"task_{number}")).submit_lease_owner for number in range(10)]
        assert leased.count("here") == 2
        gate.set()
        await wait_until(lambda: not started)
    assert most == [2]


async def test_unused_places_of_a_transaction_go_to_waiting_rows(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a transaction reserves every place, no row can be claimed. When it returns them, the
    workers do not wait for the next look.
    """
    monkeypatch.setattr(worker, "LOOK_S", 60)
    done: list[str] = []
    async with harness.working(finishing(harness.store, done)) as pool:
        await harness.queue("task_first")
        await wait_until(lambda: done == ["task_first"] and not pool._jobs)
        held = pool.reserve()
        await harness.queue("task_a")
        assert pool._stages["submit"].free == 0
        pool.take([], held)
        await wait_until(lambda: done == ["task_first", "task_a"])


async def test_an_unforeseen_exception_is_logged_counted_and_retried(harness: Harness) -> None:
    """Each one has a log line with its traceback and one count. The row is due again later, and the
    tenth exception parks it.
    """
    tried: list[int] = []

    async def run(lease: Lease) -> None:
        tried.append(lease.attempts)
        raise KeyError("unforeseen")

    with capture_logs() as lines:
        async with harness.working(run):
            await harness.queue("task_a")
            for count in range(1, 10):
                row = await wait_for_faults(harness, count)
                assert row.submit_due_at == harness.now[0] + min(2 ** (count - 1), 300) * 1000
                harness.now[0] = row.submit_due_at
            row = await wait_for_faults(harness, 10)
    assert tried == list(range(1, 11))
    assert row.state == "failed"
    assert row.error["code"] == "internal_error"
    assert row.submit_due_at is None
    assert await harness.types() == ["image.task.failed", "task.parked"]
    failures = [line for line in lines if line["event"] == "worker.failed"]
    assert [line["attempt"] for line in failures] == tried
    assert failures[0]["exception"] == "KeyError: 'unforeseen'"
    assert isinstance(failures[0]["exc_info"], KeyError)
    assert [line["cause"] for line in lines if line["event"] == "task.parked"] == ["10 faults"]
    assert harness.counted("submit") == 10


async def wait_for_faults(harness: Harness, count: int) -> Any:
    async def look() -> Any:
        row = await harness.row("task_a")
        return row if row.submit_faults == count else None

    return await wait_until(look)


async def test_an_outage_of_the_store_is_no_fault_of_the_row(harness: Harness) -> None:
    """The job cannot be recorded. The worker releases the row when the store works again, and the
    row is done before its lease expires.
    """
    tried: list[int] = []

    async def run(lease: Lease) -> None:
        tried.append(lease.attempts)
        if len(tried) == 1:
            raise StoreUnavailable("away")
        await harness.store.write(leases.done, lease)

    with capture_logs() as lines:
        async with harness.working(run):
            await harness.queue("task_a")
            await wait_until(lambda: len(tried) == 2)
    row = await harness.row("task_a")
    assert (row.submit_faults, row.submit_deaths) == (0, 0)
    assert [line["exc_info"] for line in lines if line["event"] == "worker.failed"] == [None]


async def test_a_row_that_fails_to_be_recorded_during_a_stop_is_released(harness: Harness) -> None:
    """The store was unavailable for a moment only. No worker waits for the lease to expire, and no
    crash is counted.
    """
    stopped = asyncio.Event()

    async def run(_: Lease) -> None:
        await stopped.wait()
        raise StoreUnavailable("away")

    async with harness.working(run) as pool:
        await harness.queue("task_a")
        await wait_until(lambda: pool._jobs)
        pool.quiesce()
        stopped.set()
    row = await harness.row("task_a")
    assert (row.submit_lease_until, row.submit_attempts) == (None, 0)


def refuse(_tx: Transaction, _items: Sequence[Any]) -> list[Any]:
    """An operation that the store cannot commit."""
    raise StoreUnavailable("away")


async def test_a_row_whose_fault_cannot_be_recorded_is_released(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store fails between the exception and its record. The row is done as soon as the store
    works again, and no crash is counted.
    """
    tried: list[int] = []
    monkeypatch.setattr(worker, "record_faults", refuse)

    async def run(lease: Lease) -> None:
        tried.append(lease.attempts)
        if len(tried) == 1:
            raise KeyError(lease.key)
        await harness.store.write(leases.done, lease)

    async with harness.working(run):
        await harness.queue("task_a")
        await wait_until(lambda: len(tried) == 2)
    row = await harness.row("task_a")
    assert (harness.counted("submit"), row.submit_faults, row.submit_deaths) == (1, 0, 0)


async def test_rows_that_cannot_be_recorded_do_not_keep_other_rows_waiting(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every place of the stage, a row fails as in an outage. The row behind them still gets its
    turn.
    """
    monkeypatch.setattr(worker, "LOOK_S", 0.02)
    done: list[str] = []

    async def run(lease: Lease) -> None:
        if lease.key != "task_good":
            raise StoreUnavailable("away")
        done.append(lease.key)
        await harness.store.write(leases.done, lease)

    async with harness.working(run):
        await harness.queue("task_bad_1", "task_bad_2")
        await harness.queue("task_good")
        await wait_until(lambda: done)
    assert (await harness.row("task_bad_1")).submit_faults == 0


@pytest.mark.parametrize("trouble", [StoreUnavailable("away"), RuntimeError("unforeseen")])
async def test_claiming_survives_every_failure_of_the_store(
    trouble: Exception, harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed claim is logged, counted and repeated at the next look. Only an unforeseen exception
    has a traceback.
    """
    failing = [True]

    def claim(tx: Transaction, stages: Sequence[str]) -> list[int]:
        if failing[0]:
            raise trouble
        return leases.claim(tx, stages)

    done: list[str] = []
    await harness.queue("task_a")
    monkeypatch.setattr(worker, "claim", claim)
    with capture_logs() as lines:
        async with harness.working(finishing(harness.store, done)):
            await wait_until(lambda: harness.counted("claim") >= 2)
            failing[0] = False
            await wait_until(lambda: done == ["task_a"])
    logged = [line for line in lines if line["event"] == "worker.failed"]
    assert {line["stage"] for line in logged} == {"claim"}
    assert {line["exc_info"] for line in logged} == {
        None if isinstance(trouble, StoreUnavailable) else trouble
    }


def by_key(asked: list[list[str]]) -> leases.Rows:
    def rows(_: Connection, keys: Sequence[str]) -> dict[str, object]:
        asked.append(sorted(keys))
        return {key: f"row of {key}" for key in keys}

    return rows


def noting(store: SqliteStore, given: list[object]) -> Callable[[Lease], Awaitable[None]]:
    async def run(lease: Lease) -> None:
        given.append(lease.row)
        await store.write(leases.done, lease)

    return run


async def test_a_claim_gives_its_jobs_their_rows(harness: Harness) -> None:
    """One call reads them. The first claim of a process reads none: rows whose reading killed the
    process before count as crashes only under a lease.
    """
    asked, given = list[list[str]](), list[object]()
    await harness.queue("task_a", "task_b", "task_c", "task_d")
    run = noting(harness.store, given)
    async with harness.working(run, rows=by_key(asked)):
        await wait_until(lambda: len(given) == 4)
    assert given[:2] == [None, None]
    assert sorted(map(str, given[2:])) == ["row of task_c", "row of task_d"]
    assert sorted(key for keys in asked for key in keys) == ["task_c", "task_d"]


async def test_rows_that_a_claim_cannot_read_are_claimed_without(harness: Harness) -> None:
    """The failure is logged and counted. The job of a row that cannot be read fails alone, and
    later claims read rows again.
    """
    asked, given = list[list[str]](), list[object]()
    readable = by_key(asked)

    def rows(connection: Connection, keys: Sequence[str]) -> Mapping[str, object]:
        if len(given) < 2:
            raise ValueError("a row of these is damaged")
        return readable(connection, keys)

    await harness.queue("task_a", "task_b", "task_c")
    async with harness.working(noting(harness.store, given), places=1, rows=rows):
        await wait_until(lambda: len(given) == 3)
    assert given == [None, None, "row of task_c"]
    assert harness.counted("claim") == 1


async def test_a_stop_waits_for_jobs_in_progress(harness: Harness) -> None:
    """A job that ends within the limit is recorded. No new job starts."""
    gate, started, done = asyncio.Event(), asyncio.Event(), list[str]()

    async def run(lease: Lease) -> None:
        started.set()
        await gate.wait()
        await finishing(harness.store, done)(lease)

    async with harness.working(run) as pool:
        await harness.queue("task_a")
        await started.wait()
        stopping = asyncio.create_task(pool.stop(60))
        await asyncio.sleep(0)
        await harness.queue("task_b")
        gate.set()
        assert await stopping == 0
    assert done == ["task_a"]
    row = await harness.row("task_b")
    assert (row.submit_lease_until, row.submit_due_at) == (None, START)


async def test_a_stop_releases_unfinished_rows(harness: Harness) -> None:
    """After the limit, the job is cancelled and its lease is released. Another process can start at
    once, and the attempt does not count.
    """
    started = asyncio.Event()

    async def run(_: Lease) -> None:
        started.set()
        await asyncio.Event().wait()

    async with harness.working(run) as pool:
        await harness.queue("task_a")
        await started.wait()
        assert (await harness.row("task_a")).submit_lease_owner == "here"
        assert await pool.stop(0.01) == 1
    row = await harness.row("task_a")
    assert (
        row.submit_lease_until,
        row.submit_lease_owner,
        row.submit_due_at,
        row.submit_attempts,
    ) == (None, None, START, 0)


async def test_a_job_that_waits_for_its_turn_at_a_stop_does_not_start(harness: Harness) -> None:
    """The row is released at once. The stop does not wait for a job that has not started."""
    done, waiting, turn = list[str](), asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        waiting.set()
        await turn.wait()

    async with harness.working(finishing(harness.store, done), turn=wait) as pool:
        await harness.queue("task_a")
        await waiting.wait()
        pool.quiesce()
        turn.set()
        assert await pool.stop(60) == 0
    row = await harness.row("task_a")
    assert done == []
    assert (row.submit_lease_until, row.submit_due_at, row.submit_attempts) == (None, START, 0)


async def test_a_lease_that_a_transaction_commits_after_a_stop_is_released(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store may still commit when the stop begins. No worker takes the lease, so it is
    released.
    """
    done, under_way, go_on = list[str](), threading.Event(), threading.Event()

    def late(
        connection: Connection, commit: Callable[[Connection], None] = prepared.commit
    ) -> None:
        if connection.scalar(select(tasks.c.id)):
            under_way.set()
            go_on.wait(20)
        commit(connection)

    async with harness.working(finishing(harness.store, done)) as pool:
        # After slow commits, the store commits on a thread.
        harness.store._commits.extend([1.0] * REMEMBERED)
        monkeypatch.setattr(prepared, "commit", late)
        queueing = asyncio.create_task(harness.queue("task_a"))
        await wait_until(under_way.is_set)
        stopping = asyncio.create_task(pool.stop(10))
        await wait_until(lambda: pool._stopping)
        go_on.set()
        await queueing
        await stopping
    row = await harness.row("task_a")
    assert done == []
    assert (row.submit_lease_until, row.submit_due_at, row.submit_attempts) == (None, START, 0)


async def test_leases_are_renewed_while_a_call_runs(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that is longer than a lease keeps its row, and no other worker can start it."""
    monkeypatch.setattr(worker, "RENEW_S", 0.01)
    gate, began = asyncio.Event(), list[int]()

    async def run(lease: Lease) -> None:
        began.append(lease.fence)
        await gate.wait()
        await harness.store.write(leases.done, lease)

    async with harness.working(run):
        await harness.queue("task_a")
        await wait_until(lambda: began)
        for _ in range(3):
            harness.now[0] += LEASE_MS - 1
            await wait_until(renewed(harness))
        gate.set()
    assert began == [1]


def renewed(harness: Harness) -> Callable[[], Awaitable[bool]]:
    async def look() -> bool:
        until: int = (await harness.row("task_a")).submit_lease_until
        return until == harness.now[0] + LEASE_MS

    return look


async def test_every_log_line_of_a_job_has_the_rows_id(harness: Harness) -> None:
    seen: list[dict[str, Any]] = []

    async def run(lease: Lease) -> None:
        seen.append(structlog.contextvars.get_contextvars())
        await harness.store.write(leases.done, lease)

    async with harness.working(run):
        await harness.queue("task_a")
        await wait_until(lambda: seen)
    assert [fields["task_id"] for fields in seen] == ["task_a"]


def deadly(tx: Transaction, items: Sequence[tuple[int, int]]) -> list[None]:
    """Gives the task `task_deadly` this number of crashes and this due time."""
    for deaths, due_at in items:
        tx.connection.execute(
            tasks.update()
            .where(tasks.c.id == "task_deadly")
            .values(submit_deaths=deaths, submit_due_at=due_at)
        )
    return [None] * len(items)


async def test_a_row_of_several_crashes_runs_alone(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs in progress end first, and none starts beside it. Afterwards work goes on."""
    monkeypatch.setattr(worker, "ALONE_S", 60)
    beside: list[set[str]] = []
    running: set[str] = set()
    release = asyncio.Event()

    async def run(lease: Lease) -> None:
        running.add(lease.key)
        beside.append(set(running))
        if lease.key == "task_busy":
            await release.wait()
        running.discard(lease.key)
        await harness.store.write(leases.done, lease)

    await harness.queue("task_deadly")
    await harness.store.write(deadly, (2, START + 1_000_000))
    async with harness.working(run, places=3) as pool:
        await harness.queue("task_busy")
        await wait_until(lambda: running)
        await harness.store.write(deadly, (2, START))
        await wait_until(lambda: pool._alone)
        assert (await harness.row("task_deadly")).submit_lease_until is None, (
            "a crash before the job starts must not count for the row"
        )
        await harness.queue("task_new")
        assert beside == [{"task_busy"}]
        release.set()
        await wait_until(lambda: len(beside) == 3)
    assert beside == [{"task_busy"}, {"task_deadly"}, {"task_new"}]


async def test_a_row_that_crashed_its_process_too_often_is_parked(harness: Harness) -> None:
    """It does not run again. Its task fails, and a log line with the ids of the task reports it."""

    async def run(_: Lease) -> None:
        raise AssertionError("the row ran again")

    await harness.queue("task_deadly")
    await harness.store.write(deadly, (CRASH_LIMIT, START))
    with capture_logs([structlog.contextvars.merge_contextvars]) as lines:
        async with harness.working(run):
            await wait_until(lambda: any(line["event"] == "task.parked" for line in lines))
    assert await harness.types() == ["image.task.failed", "task.parked"]
    (line,) = [line for line in lines if line["event"] == "task.parked"]
    ids = {"task_id": "task_deadly", "owner": "acme", "request_id": "req-1"}
    assert line.items() >= {"cause": f"{CRASH_LIMIT} deaths", **ids}.items()


async def test_a_poison_candidate_that_another_process_claimed_is_left_to_it(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The candidate is gone between the look and the claim. No job runs alone then, and work goes
    on.
    """
    done, looked = list[str](), threading.Event()

    def outlook(_connection: Connection, _now: int) -> Outlook:
        looked.set()
        return Outlook(frozenset(), frozenset({"submit"}), None)

    monkeypatch.setattr(worker, "outlook", outlook)
    async with harness.working(finishing(harness.store, done)):
        await wait_until(looked.is_set)
        await harness.queue("task_a")
        await wait_until(lambda: done == ["task_a"])


async def test_rows_that_cannot_be_released_at_a_stop_wait_for_their_lease(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop does not wait for an unavailable store. The number of rows that wait to be released is
    bounded.
    """
    monkeypatch.setattr(worker, "RETURNED", 1)
    pool = WorkerPool(harness.store, [], harness.metrics, harness.transactions.append, at_once)
    pool.quiesce()
    for key in ("task_a", "task_b", "task_c"):
        await asyncio.wait_for(pool._give_back(Lease("submit", key, 1, 1)), 30)
    assert set(pool._returned) == {"task_c"}
