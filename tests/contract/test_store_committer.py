"""Group commit (design, decision 2): what waits is one transaction, a bad item fails alone, no
commit is no promise.
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
from service.tasks.accept import NewTask, insert_tasks
from service.upkeep import store_figures
from tests.contract.subject import Clock, Opener, Subject, completed, new_id
from tests.servers import execute
from tests.stores import open_postgres
from tests.waiting import wait_until

Outage = AbstractAsyncContextManager[None]


def echo(tx: Transaction, items: Sequence[int]) -> list[int]:
    """Ten times each item; 7 is more than it can bear."""
    if 7 in items:
        raise ValueError("seven")
    for item in items:
        tx.step(f"task_{item}", "task.queued")
    return [item * 10 for item in items]


async def test_everybody_gets_the_result_of_his_own_item(subject: Subject) -> None:
    """In whatever batches they ran."""
    numbers = [number for number in range(300) if number != 7]
    assert await asyncio.gather(*(subject.write(echo, number) for number in numbers)) == [
        number * 10 for number in numbers
    ]


async def test_a_bad_item_fails_alone(subject: Subject) -> None:
    """Its caller gets the exception, its neighbours are committed, of the same operation and of
    others.
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


async def test_a_failed_batch_leaves_nothing_behind(subject: Subject) -> None:
    """What an operation wrote before it failed is not there."""

    def half(tx: Transaction, wishes: Sequence[NewTask]) -> list[None]:
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


async def test_a_caller_who_leaves_takes_nothing_back(subject: Subject) -> None:
    """Cancelled while it waits: the item is committed with its batch, and the others get their
    results.
    """
    wishes = [subject.wish() for _ in range(3)]
    writing = [asyncio.ensure_future(subject.write(insert_tasks, wish)) for wish in wishes]
    await asyncio.sleep(0)
    writing[1].cancel()
    assert [(await writing[number]).task_id for number in (0, 2)] == [wishes[0].id, wishes[2].id]
    assert writing[1].cancelled()
    await wait_until(lambda: subject.store.read(task_queries.task_row, wishes[1].id, None))


async def test_what_waits_at_the_close_is_committed(opener: Opener, clock: Clock) -> None:
    """A clean stop loses nothing; later nothing is promised any more."""
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
    """The disk is full."""
    connection = store._connection
    assert connection is not None
    driver = connection.connection.driver_connection
    assert driver is not None
    driver.execute("VACUUM")  # no page is left over from the tests before
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
async def away(server: str, database: str) -> AsyncIterator[None]:
    """Every connection is cut and no new one is let in."""
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
    """Makes the store unable to commit for a while, for real."""
    if isinstance(subject.store, SqliteStore):
        await subject.write(echo, 0)
        return full(subject.store)
    return away(
        request.getfixturevalue("postgres_server"), request.getfixturevalue("migrated_database")
    )


async def test_a_store_that_does_not_commit_promises_nothing_and_recovers(
    subject: Subject, outage: Outage
) -> None:
    """`StoreUnavailable` for everybody who waits, nothing written, no place kept; afterwards it
    commits without a restart.
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


async def test_a_store_that_is_away_cannot_be_read(
    postgres_opener: Opener, migrated_database: str, postgres_server: str
) -> None:
    """`StoreUnavailable` as well; the first read after it works."""
    async with postgres_opener() as store:
        async with away(postgres_server, migrated_database):
            with pytest.raises(StoreUnavailable, match="cannot be read"):
                await store.read(store_figures.figures)
        assert (await store.read(store_figures.figures))["dead_letters"] == 0


async def test_a_query_that_fails_in_the_store_is_no_answer(subject: Subject) -> None:
    """`StoreUnavailable`, not the driver's own exception."""
    with pytest.raises(StoreUnavailable, match="cannot be read"):
        await subject.store.read(
            lambda connection: connection.execute(text("SELECT * FROM nowhere"))
        )


async def test_what_is_read_cannot_write_on_sqlite(sqlite_opener: Opener) -> None:
    """There is one writer: readers' connections refuse."""
    async with sqlite_opener() as store:
        with pytest.raises(StoreUnavailable):
            await store.read(
                lambda connection: connection.execute(
                    insert(owners).values(name="x", callback_secret=b"", created_at=0)
                )
            )


async def test_a_slow_disk_is_waited_for_on_a_thread(sqlite_opener: Opener, clock: Clock) -> None:
    """The event loop goes on; which way a commit goes makes no difference to what it promises."""
    async with sqlite_opener() as store:
        assert isinstance(store, SqliteStore)
        subject = Subject(store, clock)
        for seconds in (QUICK_S * 100, 0.0):
            store._commits.clear()
            store._commits.append(seconds)
            assert await subject.state(await subject.queued()) == "queued"


async def test_the_database_tells_the_time_on_postgres(migrated_database: str) -> None:
    """Times are the database's own, not the process's, so that all processes agree."""
    now = text("SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint")
    async with open_postgres(migrated_database, process="one", new_id=new_id) as store:
        before = await store.read(lambda connection: connection.execute(now).scalar_one())
        tx_time = await store.write(lambda tx, items: [tx.now for _ in items], None)
        assert (
            before
            <= tx_time
            <= await store.read(lambda connection: connection.execute(now).scalar_one())
        )


# --- the queue alone ---


class Recorder(SqliteStore):
    """A store that writes nothing: it keeps the batches, and each waits for its turn."""

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


async def test_what_is_urgent_goes_first(record: Recorder) -> None:
    """Whatever waits already: urgent ones fill a batch with only a few others beside, which never
    starve.
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


async def test_what_comes_while_a_batch_runs_is_the_next_one(record: Recorder) -> None:
    """One batch at a time; whatever waited meanwhile is gathered."""
    first = asyncio.ensure_future(record.write(echo, 1))
    await wait_until(lambda: record.busy)
    others = [asyncio.ensure_future(record.write(echo, number)) for number in range(2, 6)]
    record.turn.release()
    await first
    record.turn.release()
    await asyncio.gather(*others)
    assert record.batches == [[1], [2, 3, 4, 5]]


async def test_a_batch_that_cannot_be_run_at_all_is_told_to_everybody(record: Recorder) -> None:
    """No connection to be had: nobody waits for ever, and the next batch is tried anew."""
    record.failing = True
    results = await asyncio.gather(
        *(record.write(echo, number) for number in range(3)), return_exceptions=True
    )
    assert {type(result) for result in results} == {StoreUnavailable}
    record.failing = False
    record.turn.release()
    assert await record.write(echo, 1) == 1


async def test_a_process_that_stands_still_in_a_transaction_loses_it(
    two: tuple[Subject, Subject],
) -> None:
    """Its locks end with the server's patience: the others commit again, and what it began is not
    there.
    """
    still = two[1].store
    assert isinstance(still, postgres.PostgresStore)
    async with still._engine.connect() as connection:
        assert (
            await connection.execute(text("SHOW idle_in_transaction_session_timeout"))
        ).scalar_one() == "10s"
        await connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = 200"))
        await connection.execute(counters.update().values(value=counters.c.value + 1_000_000))
        task_id = await two[0].uncertain()
        await two[0].callback(
            task_id, completed(task_id, "https://r.test/0")
        )  # an event needs the counter
        await connection.invalidate()
    assert max(event["sequence"] for event in await two[0].events()) < 1_000_000


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "STALLED_LOOK_S", 0.05)
    monkeypatch.setattr(
        postgres, "STALLED_MS", 3000
    )  # longer than this very process may stand still on a busy machine


@pytest.mark.usefixtures("hasty")
async def test_a_process_that_stands_still_within_a_statement_loses_its_locks_too(
    two: tuple[Subject, Subject],
) -> None:
    """The server itself would wait for the statement's other half; sessions at work, idle and in a
    transaction are left alone.
    """
    still = two[1].store
    assert isinstance(still, postgres.PostgresStore)
    task_id = await two[0].uncertain()
    async with still._engine.connect() as connection, still._engine.connect() as idle:
        mine, other = [
            (await each.execute(text("SELECT pg_backend_pid()"))).scalar_one()
            for each in (connection, idle)
        ]
        await connection.execute(counters.update().values(value=counters.c.value + 1_000_000))
        driver = (await connection.get_raw_connection()).driver_connection
        assert driver is not None
        parse = b"\0SELECT 1\0\0\0"
        driver._transport.write(
            b"P" + (4 + len(parse)).to_bytes(4, "big") + parse + b"H\0\0\0\4"
        )  # and no Sync
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
async def test_a_process_that_stands_still_while_it_takes_a_result_loses_its_locks_too(
    two: tuple[Subject, Subject],
) -> None:
    """The server would wait for it to read on."""
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
