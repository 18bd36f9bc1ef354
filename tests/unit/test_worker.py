"""The workers of a process over a real embedded store: nothing is worked on twice, dropped, or
tried for ever.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import structlog
from sqlalchemy import Connection, event, select
from structlog.testing import capture_logs

from service.db.sqlite import REMEMBERED, SqliteStore
from service.db.tables import events, tasks
from service.db.transaction import Lease, Transaction
from service.errors import StoreUnavailable
from service.ops.metrics import Metrics
from service.queue import leases, worker
from service.queue.crashes import CRASH_LIMIT
from service.queue.leases import LEASE_MS
from service.queue.worker import Stage, WorkerPool
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

START = 1_757_165_031_000


async def at_once() -> None:
    """A turn that comes without waiting."""


@dataclass(slots=True)
class Shop:
    """A store on a clock of its own; `pools` works in it."""

    store: SqliteStore
    now: list[int]
    metrics: Metrics = field(default_factory=Metrics)
    told: list[Transaction] = field(default_factory=list)

    async def queue(self, *ids: str) -> None:
        """Tasks that want to be submitted."""
        made = [TaskRow(id, "acme", "evolink", "m", State.QUEUED, 0, body=b"{}") for id in ids]
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
    ) -> AsyncIterator[WorkerPool]:
        pool = WorkerPool(
            self.store,
            [Stage("submit", places, run, dead_letter_task)],
            self.metrics,
            self.told.append,
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
async def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Shop]:
    monkeypatch.setattr(worker, "LOOK_S", 0.02)
    now = [START]
    async with open_sqlite(
        tmp_path / "shop.db", process="here", new_id=new_id, clock=lambda: now[0]
    ) as store:
        yield Shop(store, now)


def finishing(store: SqliteStore, done: list[str]) -> Callable[[Lease], Awaitable[None]]:
    async def run(lease: Lease) -> None:
        done.append(lease.key)
        await store.write(leases.done, lease)

    return run


async def test_a_grant_that_is_given_twice_costs_no_place(shop: Shop) -> None:
    """Whatever granted it again: both jobs end, and each frees the place it had."""
    stage = Stage("submit", 2, lambda _: at_once(), dead_letter_task)
    pool = WorkerPool(shop.store, [stage], shop.metrics, shop.told.append, at_once)
    assert pool.reserve() == {"submit": 2}
    pool.take([Lease("submit", "task", 1, 1)] * 2, {})
    await wait_until(lambda: stage.free == 2)


async def test_all_that_is_due_is_worked_on_once(shop: Shop) -> None:
    """Work that was there before, work that is born leased and work beyond the places are each done
    once.
    """
    done: list[str] = []
    await shop.queue("task_a", "task_b", "task_c")
    async with shop.working(finishing(shop.store, done)):
        await shop.queue(*(f"task_{number}" for number in range(20)))
        await wait_until(lambda: len(done) == 23)
    assert len(set(done)) == 23
    assert sum(len(tx.due) for tx in shop.told) > 0  # what committed was told


async def test_a_busy_stage_keeps_no_other_from_looking(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes due by time alone is claimed within a look, while another stage's backlog wakes
    the workers all the time.
    """
    monkeypatch.setattr(worker, "LOOK_S", 0.2)
    clock, reconciled = asyncio.get_running_loop().time, asyncio.Event()
    jobs, busy_until = [0], clock() + 5

    async def submit(lease: Lease) -> None:
        jobs[0] += 1
        if not reconciled.is_set() and clock() < busy_until:
            await shop.queue(f"task_more_{jobs[0]}")
        await shop.store.write(leases.done, lease)

    async def run(lease: Lease) -> None:
        await shop.store.write(leases.done, lease)
        reconciled.set()

    await shop.queue("task_silent", "task_a", "task_b", "task_c")
    pool = WorkerPool(
        shop.store,
        [
            Stage("submit", 1, submit, dead_letter_task),
            Stage("reconcile", 1, run, dead_letter_task),
        ],
        shop.metrics,
        shop.told.append,
        at_once,
    )
    async with at_work(pool):
        accepted = SubmissionResult(
            Lease("submit", "task_silent", 0, 0), Accepted(Report(upstream_id="u-1")), wait_ms=0
        )
        await shop.store.write(record_submissions, accepted)
        await reconciled.wait()
    assert clock() < busy_until


async def test_a_stage_never_has_more_work_than_places(shop: Shop) -> None:
    """Two places: of ten rows two are leased, and each that ends makes room for one more."""
    gate, started, most = asyncio.Event(), set[str](), [0]

    async def run(lease: Lease) -> None:
        started.add(lease.key)
        most[0] = max(most[0], len(started))
        await gate.wait()
        started.discard(lease.key)
        await shop.store.write(leases.done, lease)

    async with shop.working(run):
        await shop.queue(*(f"task_{number}" for number in range(10)))
        await wait_until(lambda: len(started) == 2)
        await shop.queue("task_later")
        assert len(started) == 2
        leased = [(await shop.row(f"task_{number}")).submit_lease_owner for number in range(10)]
        assert leased.count("here") == 2
        gate.set()
        await wait_until(lambda: not started)
    assert most == [2]


async def test_places_that_a_transaction_did_not_need_go_to_waiting_work(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a transaction holds every place nothing can be claimed; once they are back the next
    look isn't waited for.
    """
    monkeypatch.setattr(worker, "LOOK_S", 60)
    done: list[str] = []
    async with shop.working(finishing(shop.store, done)) as pool:
        await shop.queue("task_first")
        await wait_until(lambda: done == ["task_first"] and not pool._jobs)
        held = pool.reserve()
        await shop.queue("task_a")
        assert pool._stages["submit"].free == 0
        pool.take([], held)
        await wait_until(lambda: done == ["task_first", "task_a"])


async def test_an_exception_nobody_foresaw_is_logged_counted_and_tried_again(shop: Shop) -> None:
    """Each is one line with its traceback and one count; the row is due again later, and the tenth
    parks it.
    """
    tried: list[int] = []

    async def run(lease: Lease) -> None:
        tried.append(lease.attempts)
        raise KeyError("nobody thought of this")

    with capture_logs() as lines:
        async with shop.working(run):
            await shop.queue("task_a")
            for count in range(1, 10):
                row = await wait_for_faults(shop, count)
                assert row.submit_due_at == shop.now[0] + min(2 ** (count - 1), 300) * 1000
                shop.now[0] = row.submit_due_at
            row = await wait_for_faults(shop, 10)
    assert tried == list(range(1, 11))
    assert row.state == "failed"
    assert row.error["code"] == "internal_error"
    assert row.submit_due_at is None
    assert await shop.types() == ["image.task.failed", "task.parked"]
    failures = [line for line in lines if line["event"] == "worker.failed"]
    assert [line["attempt"] for line in failures] == tried
    assert failures[0]["exception"] == "KeyError: 'nobody thought of this'"
    assert isinstance(failures[0]["exc_info"], KeyError)
    assert [line["cause"] for line in lines if line["event"] == "task.parked"] == ["10 faults"]
    assert shop.counted("submit") == 10


async def wait_for_faults(shop: Shop, count: int) -> Any:
    async def look() -> Any:
        row = await shop.row("task_a")
        return row if row.submit_faults == count else None

    return await wait_until(look)


async def test_a_store_that_is_away_is_no_fault_of_the_row(shop: Shop) -> None:
    """Nothing can be recorded then: it is given back when that goes again and worked on anew,
    unblamed, before its lease ends.
    """
    tried: list[int] = []

    async def run(lease: Lease) -> None:
        tried.append(lease.attempts)
        if len(tried) == 1:
            raise StoreUnavailable("away")
        await shop.store.write(leases.done, lease)

    with capture_logs() as lines:
        async with shop.working(run):
            await shop.queue("task_a")
            await wait_until(lambda: len(tried) == 2)
    row = await shop.row("task_a")
    assert (row.submit_faults, row.submit_deaths) == (0, 0)
    assert [line["exc_info"] for line in lines if line["event"] == "worker.failed"] == [None]


async def test_what_cannot_be_recorded_during_a_stop_is_given_back(shop: Shop) -> None:
    """The store was away for a moment only: nobody waits for the lease's end, and no death is
    counted.
    """
    stopped = asyncio.Event()

    async def run(_: Lease) -> None:
        await stopped.wait()
        raise StoreUnavailable("away")

    async with shop.working(run) as pool:
        await shop.queue("task_a")
        await wait_until(lambda: pool._jobs)
        pool.quiesce()
        stopped.set()
    row = await shop.row("task_a")
    assert (row.submit_lease_until, row.submit_attempts) == (None, 0)


def refuse(_tx: Transaction, _items: Sequence[Any]) -> list[Any]:
    """Stands for a store that does not commit."""
    raise StoreUnavailable("away")


async def test_a_row_whose_fault_cannot_be_recorded_is_given_back(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store goes away between the exception and its record: it is worked on anew as soon as
    that commits, and no death is counted.
    """
    tried: list[int] = []
    monkeypatch.setattr(worker, "record_faults", refuse)

    async def run(lease: Lease) -> None:
        tried.append(lease.attempts)
        if len(tried) == 1:
            raise KeyError(lease.key)
        await shop.store.write(leases.done, lease)

    async with shop.working(run):
        await shop.queue("task_a")
        await wait_until(lambda: len(tried) == 2)
    row = await shop.row("task_a")
    assert (shop.counted("submit"), row.submit_faults, row.submit_deaths) == (1, 0, 0)


async def test_rows_that_the_store_will_not_take_down_keep_no_others_waiting(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as the stage has places fail as if the store were away: the one behind them has its
    turn all the same.
    """
    monkeypatch.setattr(worker, "LOOK_S", 0.02)
    done: list[str] = []

    async def run(lease: Lease) -> None:
        if lease.key != "task_good":
            raise StoreUnavailable("away")
        done.append(lease.key)
        await shop.store.write(leases.done, lease)

    async with shop.working(run):
        await shop.queue("task_bad_1", "task_bad_2")
        await shop.queue("task_good")
        await wait_until(lambda: done)
    assert (await shop.row("task_bad_1")).submit_faults == 0


@pytest.mark.parametrize("trouble", [StoreUnavailable("away"), RuntimeError("nobody foresaw")])
async def test_claiming_outlives_whatever_the_store_does(
    trouble: Exception, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim that fails is logged, counted and made again at the next look; only the unforeseen
    has a traceback.
    """
    failing = [True]

    def claim(tx: Transaction, stages: Sequence[str]) -> list[int]:
        if failing[0]:
            raise trouble
        return leases.claim(tx, stages)

    done: list[str] = []
    await shop.queue("task_a")
    monkeypatch.setattr(worker, "claim", claim)
    with capture_logs() as lines:
        async with shop.working(finishing(shop.store, done)):
            await wait_until(lambda: shop.counted("claim") >= 2)
            failing[0] = False
            await wait_until(lambda: done == ["task_a"])
    logged = [line for line in lines if line["event"] == "worker.failed"]
    assert {line["stage"] for line in logged} == {"claim"}
    assert {line["exc_info"] for line in logged} == {
        None if isinstance(trouble, StoreUnavailable) else trouble
    }


async def test_work_in_flight_is_finished_at_a_stop(shop: Shop) -> None:
    """What ends within the limit is recorded; nothing new is begun."""
    gate, started, done = asyncio.Event(), asyncio.Event(), list[str]()

    async def run(lease: Lease) -> None:
        started.set()
        await gate.wait()
        await finishing(shop.store, done)(lease)

    async with shop.working(run) as pool:
        await shop.queue("task_a")
        await started.wait()
        stopping = asyncio.create_task(pool.stop(10))
        await asyncio.sleep(0)
        await shop.queue("task_b")
        gate.set()
        assert await stopping == 0
    assert done == ["task_a"]
    row = await shop.row("task_b")
    assert (row.submit_lease_until, row.submit_due_at) == (None, START)


async def test_what_is_not_finished_at_a_stop_is_given_back(shop: Shop) -> None:
    """After the limit work is cancelled and its lease freed: another process begins at once, and
    the attempt does not count.
    """
    started = asyncio.Event()

    async def run(_: Lease) -> None:
        started.set()
        await asyncio.Event().wait()

    async with shop.working(run) as pool:
        await shop.queue("task_a")
        await started.wait()
        assert (await shop.row("task_a")).submit_lease_owner == "here"
        assert await pool.stop(0.01) == 1
    row = await shop.row("task_a")
    assert (
        row.submit_lease_until,
        row.submit_lease_owner,
        row.submit_due_at,
        row.submit_attempts,
    ) == (None, None, START, 0)


async def test_work_that_waits_for_its_turn_at_a_stop_is_not_begun(shop: Shop) -> None:
    """It is given back untouched, at once: the stop waits for nothing that has not begun."""
    done, waiting, turn = list[str](), asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        waiting.set()
        await turn.wait()

    async with shop.working(finishing(shop.store, done), turn=wait) as pool:
        await shop.queue("task_a")
        await waiting.wait()
        pool.quiesce()
        turn.set()
        assert await pool.stop(10) == 0
    row = await shop.row("task_a")
    assert done == []
    assert (row.submit_lease_until, row.submit_due_at, row.submit_attempts) == (None, START, 0)


async def test_what_a_transaction_under_way_grants_after_a_stop_is_given_back(shop: Shop) -> None:
    """The store may still be committing when the stop begins: what it grants then is nobody's, and
    is freed.
    """
    done, under_way, go_on = list[str](), threading.Event(), threading.Event()

    def wait(connection: Connection) -> None:
        if connection.scalar(select(tasks.c.id)):
            under_way.set()
            go_on.wait(20)

    async with shop.working(finishing(shop.store, done)) as pool:
        shop.store._commits.extend([1.0] * REMEMBERED)  # a slow disk: commits run on their thread
        event.listen(shop.store._engine, "commit", wait)
        queueing = asyncio.create_task(shop.queue("task_a"))
        await wait_until(under_way.is_set)
        stopping = asyncio.create_task(pool.stop(10))
        await wait_until(lambda: pool._stopping)
        go_on.set()
        await queueing
        event.remove(shop.store._engine, "commit", wait)
        await stopping
    row = await shop.row("task_a")
    assert done == []
    assert (row.submit_lease_until, row.submit_due_at, row.submit_attempts) == (None, START, 0)


async def test_leases_are_renewed_while_a_call_runs(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call longer than a lease keeps its row: nobody else may begin it."""
    monkeypatch.setattr(worker, "RENEW_S", 0.01)
    gate, began = asyncio.Event(), list[int]()

    async def run(lease: Lease) -> None:
        began.append(lease.fence)
        await gate.wait()
        await shop.store.write(leases.done, lease)

    async with shop.working(run):
        await shop.queue("task_a")
        await wait_until(lambda: began)
        for _ in range(3):
            shop.now[0] += LEASE_MS - 1
            await wait_until(renewed(shop))
        gate.set()
    assert began == [1]


def renewed(shop: Shop) -> Callable[[], Awaitable[bool]]:
    async def look() -> bool:
        until: int = (await shop.row("task_a")).submit_lease_until
        return until == shop.now[0] + LEASE_MS

    return look


async def test_a_job_knows_in_its_log_lines_what_it_works_on(shop: Shop) -> None:
    """Whatever is logged inside a job carries the row's id."""
    seen: list[dict[str, Any]] = []

    async def run(lease: Lease) -> None:
        seen.append(structlog.contextvars.get_contextvars())
        await shop.store.write(leases.done, lease)

    async with shop.working(run):
        await shop.queue("task_a")
        await wait_until(lambda: seen)
    assert seen == [{"task_id": "task_a"}]


def deadly(tx: Transaction, items: Sequence[tuple[int, int]]) -> list[None]:
    """Gives the task `task_deadly` so many deaths, and makes it due then."""
    for deaths, due_at in items:
        tx.connection.execute(
            tasks.update()
            .where(tasks.c.id == "task_deadly")
            .values(submit_deaths=deaths, submit_due_at=due_at)
        )
    return [None] * len(items)


async def test_what_outlived_deaths_of_its_process_runs_alone(shop: Shop) -> None:
    """Others in flight end first, none begin beside it, and afterwards all goes on."""
    beside: list[set[str]] = []
    running: set[str] = set()
    release = asyncio.Event()

    async def run(lease: Lease) -> None:
        running.add(lease.key)
        beside.append(set(running))
        if lease.key == "task_busy":
            await release.wait()
        running.discard(lease.key)
        await shop.store.write(leases.done, lease)

    await shop.queue("task_deadly")
    await shop.store.write(deadly, (2, START + 1_000_000))
    async with shop.working(run, places=3) as pool:
        await shop.queue("task_busy")
        await wait_until(lambda: running)
        await shop.store.write(deadly, (2, START))
        await wait_until(lambda: pool._alone)
        assert (await shop.row("task_deadly")).submit_lease_until is None, (
            "no death before it is begun is its own"
        )
        await shop.queue("task_new")
        assert beside == [{"task_busy"}]
        release.set()
        await wait_until(lambda: len(beside) == 3)
    assert beside == [{"task_busy"}, {"task_deadly"}, {"task_new"}]


async def test_what_brought_its_process_down_too_often_is_parked(shop: Shop) -> None:
    """It runs no more; its task has failed, and a line says so."""

    async def run(_: Lease) -> None:
        raise AssertionError("it was to run no more")

    await shop.queue("task_deadly")
    await shop.store.write(deadly, (CRASH_LIMIT, START))
    with capture_logs() as lines:
        async with shop.working(run):
            await wait_until(lambda: any(line["event"] == "task.parked" for line in lines))
    assert await shop.types() == ["image.task.failed", "task.parked"]
    assert [line["cause"] for line in lines if line["event"] == "task.parked"] == [
        f"{CRASH_LIMIT} deaths"
    ]


async def test_a_suspect_that_another_process_took_is_left_to_it(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look and the claim it may be gone: nobody is alone then, and work goes on."""
    done, looked = list[str](), threading.Event()

    def candidate_stages(_connection: Connection, _now: int) -> list[str]:
        looked.set()
        return ["submit"]

    monkeypatch.setattr(worker, "candidate_stages", candidate_stages)
    async with shop.working(finishing(shop.store, done)):
        await wait_until(looked.is_set)
        await shop.queue("task_a")
        await wait_until(lambda: done == ["task_a"])


async def test_what_could_not_be_recorded_at_a_stop_is_left_to_its_lease(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop does not wait for a store that is away; what came back before is not remembered for
    ever.
    """
    monkeypatch.setattr(worker, "RETURNED", 1)
    pool = WorkerPool(shop.store, [], shop.metrics, shop.told.append, at_once)
    pool.quiesce()
    for key in ("task_a", "task_b", "task_c"):
        await asyncio.wait_for(pool._give_back(Lease("submit", key, 1, 1)), 10)
    assert set(pool._returned) == {"task_c"}
