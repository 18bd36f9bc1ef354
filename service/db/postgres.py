"""PostgreSQL: the engine at scale. The same operations run on asyncpg connections, several
committers at once.

Times are the database's. What another process committed is found by polling; NOTIFY, once a
transaction, only tells of it sooner.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, closing, suppress
from typing import Any, Concatenate

import asyncpg
import structlog
from sqlalchemy import Connection, event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as NoConnection
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from service.db import schema
from service.db.batching import BatchingStore, Run
from service.db.clock import steady_ns, wall_clock
from service.db.failover import connecting
from service.db.stalled_sessions import NAME, end_still
from service.db.store import P, Result
from service.db.transaction import Transaction
from service.errors import ConfigurationError, StoreUnavailable

log = structlog.get_logger()

COMMITTERS = 3
READERS = 5
CHANNEL, HINT_BYTES = "darkroom", 7999  # PostgreSQL's limit
LISTEN_AGAIN_S = 1.0
# Milliseconds. A process that stands still inside a transaction, whose locks others wait for, loses
# it; a callback waits 8 s at most.
STILL_MS = 10_000
LIMITS = {
    "lock_timeout": "5000",
    "statement_timeout": "30000",
    "idle_in_transaction_session_timeout": str(STILL_MS),
}
LOOK_FOR_STILL_S = 5.0
# A migration may run and wait for long. If its process stops, the server still ends its session.
MIGRATION_UNLIMITED = ("lock_timeout", "statement_timeout")
TURN_MS, BETWEEN_S, TURNS = 2000, 2.0, 150  # a migration's: for ten minutes
LOCKED, NOT_YET = "55P03", "57P03"  # somebody else has the table; the server is starting up
MIGRATION_LOCK = (
    0x6461726B726F6F6D  # "darkroom": any constant that nobody else in this database takes
)
NOTIFY = text(f"SELECT pg_notify('{CHANNEL}', :hint)")
# What was answered 200 outlives the server, whatever the role, the database or the server has as
# its default. Said in every session, also where it is the default: that may be changed while the
# session lasts.
DURABLE = """SELECT set_config('synchronous_commit',
    CASE current_setting('synchronous_commit') WHEN 'remote_apply' THEN 'remote_apply'
    ELSE 'on' END, false)"""
NOW = text("SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint")


class PostgresStore(BatchingStore):
    """`Store` on PostgreSQL; made by `open_postgres`."""

    committers = COMMITTERS

    def __init__(
        self,
        engine: AsyncEngine,
        *,
        process: str,
        new_id: Callable[[str, int], str],
        flush: Callable[[Transaction], None],
        clock: Callable[[int], int] = lambda now: now,
    ) -> None:
        super().__init__(process, new_id, flush)
        self._engine = engine
        self._clock = clock  # what to make of the database's time; a test shifts it
        self._looked = (wall_clock(), steady_ns())  # the database's time, and when it said so
        self._reading = asyncio.Semaphore(
            READERS
        )  # slow reads leave the committers their connections

    def now(self, connection: Connection) -> int:
        self._looked = (connection.execute(NOW).scalar_one(), steady_ns())
        return self._clock(self._looked[0])

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Run]:
        async with self._engine.begin() as connection:

            async def run(
                function: Callable[..., tuple[list[Any], Transaction]], *args: Any
            ) -> tuple[list[Any], Transaction]:
                results, tx = await connection.run_sync(function, *args)
                if tx.touched or tx.emitted or tx.due:
                    hint = {
                        "from": self.process,
                        "tasks": sorted(tx.touched),
                        "events": bool(tx.emitted),
                        "due": sorted(tx.due),
                    }
                    text = json.dumps(hint, separators=(",", ":"))
                    await connection.execute(
                        NOTIFY, {"hint": text if len(text) <= HINT_BYTES else "{}"}
                    )
                return results, tx

            yield run

    async def _listen(self) -> None:
        """Passes on what other processes tell, on a connection of its own, for ever."""
        while True:
            with suppress(
                DBAPIError, NoConnection, OSError, asyncpg.PostgresError, asyncpg.InterfaceError
            ):  # the last two from LISTEN
                async with self._engine.connect() as connection:
                    driver = (await connection.get_raw_connection()).driver_connection
                    assert driver is not None
                    lost = asyncio.Event()
                    driver.add_termination_listener(lambda _, lost=lost: lost.set())
                    await driver.add_listener(
                        CHANNEL, lambda _connection, _pid, _channel, hint: self._told(hint)
                    )
                    self._told("{}")  # who knows what was missed
                    await lost.wait()
                    await connection.invalidate()
            await asyncio.sleep(LISTEN_AGAIN_S)

    def _told(self, text: str) -> None:
        """A hint from a process, maybe this one; one that says nothing stands for everything."""
        hint = json.loads(text)
        if hint.get("from") == self.process:
            return
        self.signals.notify(hint.get("tasks", ()))
        if hint.get("events", True):
            self.signals.notify(["events"])
        if self.workers and hint.get("due", True):
            self.workers.hinted(hint.get("due"))

    async def end_stalled_sessions(self) -> None:
        """Ends sessions of stopped processes, and so releases their locks, until it is cancelled.

        A starting process needs this before it can migrate. A stopped process may hold the lock of
        the migration, or the row with the time. If all other processes are starting too, no
        process at work is there to end that session.
        """
        while True:
            await asyncio.sleep(LOOK_FOR_STILL_S)
            with suppress(StoreUnavailable):
                for pid in await self.read(end_still, STILL_MS / 1000):
                    log.warning("store.freed", session=pid)

    async def read(
        self, query: Callable[Concatenate[Connection, P], Result], *args: P.args, **kwargs: P.kwargs
    ) -> Result:
        def run(connection: Connection) -> Result:
            return query(connection, *args, **kwargs)

        try:
            async with self._reading, self._engine.connect() as connection:
                return await connection.run_sync(run)
        except (DBAPIError, NoConnection, OSError) as error:
            raise StoreUnavailable(f"the store cannot be read: {type(error).__name__}") from error

    def clock(self) -> int:
        seen, when = self._looked
        return self._clock(
            seen + (steady_ns() - when) // 1_000_000
        )  # the server is not asked for it

    async def prepare(self, *, migrate: bool) -> None:
        """Migrates the schema; processes that start together do it one after another.

        Waits for a server that starts up, and for whoever has a table. Warns of a server that may
        lose what it committed."""

        def run(connection: Connection) -> None:
            for name in ("fsync", "full_page_writes"):  # the server's alone to set
                if (
                    connection.execute(
                        text("SELECT current_setting(:name)"), {"name": name}
                    ).scalar_one()
                    == "off"
                ):
                    log.warning("store.unsafe", setting=name)
            for name in MIGRATION_UNLIMITED:
                connection.execute(text(f"SET LOCAL {name} = 0"))
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
            connection.execute(
                text(f"SET LOCAL lock_timeout = {TURN_MS}")
            )  # who works queues behind whoever waits for a table
            schema.migrate(connection, allowed=migrate)
            self.now(connection)

        for turn in range(TURNS):
            try:
                async with self._engine.begin() as connection:
                    await connection.run_sync(run)
                    return
            except DBAPIError as error:
                if (
                    getattr(error.orig, "sqlstate", None) not in (LOCKED, NOT_YET)
                    or turn == TURNS - 1
                ):
                    raise
                if turn == 0:
                    log.warning("store.waiting", reason=reason(error), limit_s=TURNS * BETWEEN_S)
            await asyncio.sleep(BETWEEN_S)

    async def run(self) -> None:
        async with until_done(self._listen()):
            await super().run()


@asynccontextmanager
async def until_done(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Runs `work` beside the body and cancels it at the end."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def reason(error: Exception) -> str:
    """The server's own words, in one line."""
    return str(getattr(error, "orig", None) or error).partition("\n")[0].rpartition(">: ")[2]


@asynccontextmanager
async def open_postgres(
    url: str,
    *,
    process: str,
    new_id: Callable[[str, int], str],
    flush: Callable[[Transaction], None],
    clock: Callable[[int], int] = lambda now: now,
    migrate: bool = True,
) -> AsyncIterator[PostgresStore]:
    """Connects and migrates; ConfigurationError when the server cannot be reached or the database
    is not ours.
    """
    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=connecting(url, {**LIMITS, "application_name": NAME}),
        pool_size=COMMITTERS + READERS + 1,  # who listens
        max_overflow=0,
        pool_timeout=5,
        pool_pre_ping=True,
        hide_parameters=True,  # they hold prompts and tokens, and errors are logged
    )

    @event.listens_for(engine.sync_engine, "connect")
    def prepare(connection: Any, _: object) -> None:
        with closing(connection.cursor()) as cursor:
            cursor.execute(DURABLE)
        connection.commit()

    store = PostgresStore(engine, process=process, new_id=new_id, flush=flush, clock=clock)
    try:
        async with until_done(store.end_stalled_sessions()):
            try:
                await store.prepare(migrate=migrate)
            except (DBAPIError, OSError) as error:
                raise ConfigurationError(
                    f"DARKROOM_DATABASE_URL: PostgreSQL cannot be used: {reason(error)}"
                ) from error
            committing = asyncio.create_task(store.run(), name="committers")
            try:
                yield store
            finally:
                store.close()
                await committing
    finally:
        await engine.dispose()
