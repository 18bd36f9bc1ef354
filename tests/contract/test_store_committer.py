"""Group commit: the writes that wait share one transaction, a bad item fails alone, and a write
that is not committed promises nothing (docs/decisions/0002-writes-are-gathered.md).
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import insert, text
from structlog.testing import capture_logs

from service.db import postgres
from service.db.batching import BESIDE_URGENT, MAX_BATCH, MAX_PATIENT, Batch, BatchingStore, Call
from service.db.sqlite import QUICK_S, SqliteStore
from service.db.tables import counters, owners, tasks
from service.db.transaction import Transaction
from service.errors import StoreUnavailable
from service.tasks import task_queries
from service.tasks.accept import insert_tasks
from service.tasks.rows import TaskRow
from service.upkeep import store_figures
from tests.contract.subject import MINUTE, Clock, Opener, Subject, completed, new_id
from tests.servers import execute
from tests.stores import open_postgres
from tests.waiting import wait_until

Outage = AbstractAsyncContextManager[None]


def echo(tx: Transaction, items: Sequence[int]) -> list[int]:
    """Returns ten times each item and fails on 7."""
    if 7 in items:
        raise ValueError("seven")
    for item in items:
        tx.step(f"task_{item}", "task.queued")
    return [item * 10 for item in items]


async def test_each_caller_gets_the_result_of_its_own_item(subject: Subject) -> None:
    numbers = [number for number in range(300) if number != 7]
    assert await asyncio.gather(*(subject.write(echo, number) for number in numbers)) == [
        number * 10 for number in numbers
    ]


async def test_a_bad_item_fails_alone(subject: Subject) -> None:
    """Its caller gets the exception. The other items of its batch are committed, of the same
    operation and of different ones.
    """
    wishes = [subject.wish() for _ in range(10)]
    wishes[3] = subject.wish(id=None)
    results = await asyncio.gather(
        *(subject.write(insert_tasks, wish) for wish in wishes),
        *(subject.write(echo, number) for number in range(10)),
        return_exceptions=True,
    )
    assert [number for number, result in enumerate(results) if isinstance(result, Exception)] == [
        3,
        17,
    ]
    assert isinstance(results[17], ValueError)
    assert {row["id"] for row in await subject.rows(tasks)} == {
        wish.id for wish in wishes if wish.id
    }


async def test_an_operation_that_fails_leaves_no_rows(subject: Subject) -> None:
    """The transaction rolls back everything that the operation wrote before it failed."""

    def half(tx: Transaction, wishes: Sequence[TaskRow]) -> list[None]:
        insert_tasks(tx, wishes)
        tx.write()
        raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        await subject.write(half, subject.wish())
    assert await subject.rows(tasks) == []


async def test_a_write_is_visible_when_it_returns(subject: Subject) -> None:
    """A read that begins after a write sees it, on any connection."""
    for _ in range(20):
        task_id = await subject.queued()
        assert await subject.store.read(task_queries.task_row, task_id, None) is not None


async def test_a_cancelled_caller_does_not_undo_its_write(subject: Subject) -> None:
    """Its item is committed with its batch, and the other callers get their results."""
    wishes = [subject.wish() for _ in range(3)]
    writing = [asyncio.ensure_future(subject.write(insert_tasks, wish)) for wish in wishes]
    await asyncio.sleep(0)
    writing[1].cancel()
    assert [(await writing[number]).task_id for number in (0, 2)] == [wishes[0].id, wishes[2].id]
    assert writing[1].cancelled()
    await wait_until(lambda: subject.store.read(task_queries.task_row, wishes[1].id, None))


async def test_writes_that_wait_at_the_close_are_committed(opener: Opener, clock: Clock) -> None:
    """A clean stop loses no write. After the close, the store accepts none."""
    async with opener() as store:
        subject = Subject(store, clock)
        writing = [asyncio.ensure_future(subject.queued()) for _ in range(250)]
        await asyncio.sleep(0)
    assert len({await task for task in writing}) == 250
    with pytest.raises(StoreUnavailable, match="closed"):
        await subject.queued()
    async with opener() as store:
        assert len(await Subject(store, clock).rows(tasks)) == 250


@asynccontextmanager
async def full(store: SqliteStore) -> AsyncIterator[None]:
    """Fills the disk of a SQLite store."""
    connection = store._connection
    assert connection is not None
    driver = connection.connection.driver_connection
    assert driver is not None
    # No free page is left over from earlier tests.
    driver.execute("VACUUM")
    with connection.begin():
        connection.exec_driver_sql(
            f"PRAGMA max_page_count={connection.exec_driver_sql('PRAGMA page_count').scalar()}"
        )
    try:
        yield
    finally:
        with connection.begin():
            connection.exec_driver_sql("PRAGMA max_page_count=1073741823")


@asynccontextmanager
async def outage_of(server: str, database: str) -> AsyncIterator[None]:
    """Cuts every connection to a PostgreSQL database and refuses new ones."""
    name = database.split("?", maxsplit=1)[0].rsplit("/", 1)[1]
    await execute(server, f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
    try:
        await execute(
            server,
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'",
        )
        yield
    finally:
        await execute(server, f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')


@pytest.fixture
async def outage(request: pytest.FixtureRequest, subject: Subject) -> Outage:
    """A real fault that keeps the store from committing for a while."""
    if isinstance(subject.store, SqliteStore):
        await subject.write(echo, 0)
        return full(subject.store)
    return outage_of(
        request.getfixturevalue("postgres_server"), request.getfixturevalue("migrated_database")
    )


async def test_a_store_that_does_not_commit_promises_nothing_and_recovers(
    subject: Subject, outage: Outage
) -> None:
    """Each waiting caller gets `StoreUnavailable`, no row is written and no place stays reserved.
    After the fault, the store commits again without a restart.
    """
    big = [subject.wish(body=bytes(200_000)) for _ in range(30)]
    subject.places.free = {"submit": 5}
    async with outage:
        results = await asyncio.gather(
            *(subject.write(insert_tasks, wish) for wish in big), return_exceptions=True
        )
        assert {type(result) for result in results} == {StoreUnavailable}
        assert (subject.places.free, subject.places.leased) == ({"submit": 5}, [])
    assert await subject.rows(tasks) == []
    assert all(
        result.created
        for result in await asyncio.gather(*(subject.write(insert_tasks, wish) for wish in big))
    )
    assert subject.places.leased
    assert len(subject.places.leased) + subject.places.free["submit"] == 5


async def test_a_read_during_an_outage_raises_store_unavailable(
    postgres_opener: Opener, migrated_database: str, postgres_server: str
) -> None:
    """The first read after the outage works."""
    async with postgres_opener() as store:
        async with outage_of(postgres_server, migrated_database):
            with pytest.raises(StoreUnavailable, match="cannot be read"):
                await store.read(store_figures.figures)
        assert (await store.read(store_figures.figures))["dead_letters"] == 0


async def test_sessions_that_the_server_ended_are_replaced(
    postgres_opener: Opener, migrated_database: str, postgres_server: str, clock: Clock
) -> None:
    """A server that restarts ends the sessions of the pool. The next read and the next write work,
    on new ones.
    """
    async with postgres_opener() as store:
        subject = Subject(store, clock)
        await asyncio.gather(*(subject.queued() for _ in range(5)), subject.rows(tasks))
        async with outage_of(postgres_server, migrated_database):
            pass
        assert len(await subject.rows(tasks)) == 5
        async with outage_of(postgres_server, migrated_database):
            pass
        await asyncio.gather(*(subject.queued() for _ in range(3)))
        async with outage_of(postgres_server, migrated_database):
            pass
        await subject.queued()
        assert len(await subject.rows(tasks)) == 9


async def test_a_query_that_fails_raises_store_unavailable(subject: Subject) -> None:
    """The caller never sees the driver's own exception."""
    with pytest.raises(StoreUnavailable, match="cannot be read"):
        await subject.store.read(
            lambda connection: connection.execute(text("SELECT * FROM nowhere"))
        )


async def test_a_reading_connection_cannot_write_on_sqlite(sqlite_opener: Opener) -> None:
    """SQLite has one writer, and the connections of readers are read-only."""
    async with sqlite_opener() as store:
        with pytest.raises(StoreUnavailable):
            await store.read(
                lambda connection: connection.execute(
                    insert(owners).values(name="x", callback_secret=b"", created_at=0)
                )
            )


async def test_commits_work_on_the_event_loop_and_on_a_thread(
    sqlite_opener: Opener, clock: Clock
) -> None:
    """After slow commits, the store commits on a thread so that the event loop goes on. A write
    promises the same in both cases.
    """
    async with sqlite_opener() as store:
        assert isinstance(store, SqliteStore)
        subject = Subject(store, clock)
        for seconds in (QUICK_S * 100, 0.0):
            store._commits.clear()
            store._commits.append(seconds)
            assert await subject.state(await subject.queued()) == "queued"


async def test_times_come_from_the_database_on_postgres(
    migrated_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All processes agree on the time, because none uses its own clock."""
    monkeypatch.setattr(postgres, "wall_clock", lambda: 0)
    now = text("SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint")
    async with open_postgres(migrated_database, process="one", new_id=new_id) as store:
        before = await store.read(lambda connection: connection.execute(now).scalar_one())
        tx_time = await store.write(lambda tx, items: [tx.now for _ in items], None)
        after = await store.read(lambda connection: connection.execute(now).scalar_one())
        # The answer to the store's own look may have taken long.
        assert before - MINUTE < tx_time < after + MINUTE


# --- the queue of writes alone ---


class Recorder(SqliteStore):
    """A store that writes nothing. It records each batch, and each batch waits for the test to
    release it.
    """

    def __init__(self) -> None:
        BatchingStore.__init__(self, "one", lambda kind, _: kind, lambda _: None)
        self.batches: list[list[Any]] = []
        self.turn = asyncio.Semaphore(0)
        self.failing = False

    async def execute(self, calls: Sequence[Call], slots: dict[str, int]) -> Batch:
        if self.failing:
            raise OSError("no server")
        await self.turn.acquire()
        self.batches.append([call.item for call in calls])
        return Batch([call.item for call in calls], [], slots)


@pytest.fixture
async def record() -> AsyncIterator[Recorder]:
    record = Recorder()
    async with record.committing():
        yield record
        for _ in range(100):
            record.turn.release()


async def test_urgent_writes_go_first(record: Recorder) -> None:
    """Urgent writes fill a batch before all waiting ones. A few patient writes go beside them, so
    they never starve.
    """
    patient = [asyncio.ensure_future(record.write(echo, number)) for number in range(60)]
    urgent = [
        asyncio.ensure_future(record.write(echo, 1000 + number, urgent=True))
        for number in range(MAX_BATCH + 1)
    ]
    for _ in range(10):
        record.turn.release()
    assert await asyncio.gather(*urgent) == [1000 + number for number in range(MAX_BATCH + 1)]
    await asyncio.gather(*patient)
    first, second, third, *_ = record.batches
    assert first == [1000 + number for number in range(MAX_BATCH)] + list(range(BESIDE_URGENT))
    assert second == [1000 + MAX_BATCH, *range(BESIDE_URGENT, 2 * BESIDE_URGENT)]
    assert third == list(range(2 * BESIDE_URGENT, 2 * BESIDE_URGENT + MAX_PATIENT))


async def test_writes_that_arrive_while_a_batch_runs_form_the_next_one(record: Recorder) -> None:
    """One batch runs at a time."""
    first = asyncio.ensure_future(record.write(echo, 1))
    await wait_until(lambda: record.busy)
    others = [asyncio.ensure_future(record.write(echo, number)) for number in range(2, 6)]
    record.turn.release()
    await first
    record.turn.release()
    await asyncio.gather(*others)
    assert record.batches == [[1], [2, 3, 4, 5]]


async def test_a_batch_that_cannot_run_fails_each_of_its_callers(record: Recorder) -> None:
    """No connection is available. No caller waits for ever, and the store tries the next batch."""
    record.failing = True
    results = await asyncio.gather(
        *(record.write(echo, number) for number in range(3)), return_exceptions=True
    )
    assert {type(result) for result in results} == {StoreUnavailable}
    record.failing = False
    record.turn.release()
    assert await record.write(echo, 1) == 1


async def test_a_process_that_stalls_in_a_transaction_loses_it(
    two: tuple[Subject, Subject],
) -> None:
    """The server ends the stalled session after its timeout. Its locks are released, its writes are
    rolled back, and the other process commits again.
    """
    still = two[1].store
    assert isinstance(still, postgres.PostgresStore)
    task_id = await two[0].uncertain()
    async with still._engine.connect() as connection:
        assert (
            await connection.execute(text("SHOW idle_in_transaction_session_timeout"))
        ).scalar_one() == "10s"
        await connection.execute(counters.update().values(value=counters.c.value + 1_000_000))
        # The last statement, as the session may be over at once.
        await connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = 200"))
        # An event needs the counter, whose row the stalled session has locked.
        await two[0].callback(task_id, completed(task_id, "https://r.test/0"))
        await connection.invalidate()
    assert max(event["sequence"] for event in await two[0].events()) < 1_000_000


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "STALLED_LOOK_S", 0.05)
    # Longer than this process itself may stall on a busy machine.
    monkeypatch.setattr(postgres, "STALLED_MS", 3000)


@pytest.mark.usefixtures("hasty")
async def test_a_process_that_stalls_within_a_statement_loses_its_locks(
    two: tuple[Subject, Subject],
) -> None:
    """The server would wait for the rest of the statement without a limit, so the other process
    ends the session. It leaves working, idle and in-transaction sessions alone.
    """
    still = two[1].store
    assert isinstance(still, postgres.PostgresStore)
    task_id = await two[0].uncertain()
    async with still._engine.connect() as connection, still._engine.connect() as idle:
        mine, other = [
            (await each.execute(text("SELECT pg_backend_pid()"))).scalar_one()
            for each in (connection, idle)
        ]
        await idle.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
        await connection.execute(counters.update().values(value=counters.c.value + 1_000_000))
        driver = (await connection.get_raw_connection()).driver_connection
        assert driver is not None
        parse = b"\0SELECT 1\0\0\0"
        driver._transport.write(
            b"P" + (4 + len(parse)).to_bytes(4, "big") + parse + b"H\0\0\0\4"
        )  # without the Sync message that would end the statement
        with capture_logs() as lines:
            await two[0].callback(task_id, completed(task_id, "https://r.test/0"))
            await wait_until(
                lambda: (
                    mine in [line["session"] for line in lines if line["event"] == "store.freed"]
                ),
                30,
            )
        assert (await idle.execute(text("SELECT pg_backend_pid()"))).scalar_one() == other
        await connection.invalidate()
    assert max(event["sequence"] for event in await two[0].events()) < 1_000_000


@pytest.mark.usefixtures("hasty")
async def test_a_process_that_stalls_while_it_reads_a_result_loses_its_locks(
    two: tuple[Subject, Subject],
) -> None:
    """The server would wait without a limit until the process reads on."""
    still = two[1].store
    assert isinstance(still, postgres.PostgresStore)
    task_id = await two[0].uncertain()
    async with still._engine.connect() as connection:
        mine = (await connection.execute(text("SELECT pg_backend_pid()"))).scalar_one()
        await connection.execute(counters.update().values(value=counters.c.value + 1_000_000))
        driver = (await connection.get_raw_connection()).driver_connection
        assert driver is not None
        query = b"SELECT repeat('x', 50000000)\0"
        driver._transport.pause_reading()
        driver._transport.write(b"Q" + (4 + len(query)).to_bytes(4, "big") + query)
        with capture_logs() as lines:
            await two[0].callback(task_id, completed(task_id, "https://r.test/0"))
            await wait_until(
                lambda: (
                    mine in [line["session"] for line in lines if line["event"] == "store.freed"]
                ),
                30,
            )
        await connection.invalidate()
