"""PostgreSQL: several processes and several committers. The same operations run on asyncpg
connections.

Times are the database's. Polling finds what another process committed. NOTIFY, sent once a
transaction, only shortens the wait.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing, suppress
from typing import Any, Concatenate

import asyncpg
import structlog
from sqlalchemy import Connection, event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as NoConnection
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from service.db import schema
from service.db.batching import BatchingStore, P, Result, Run
from service.db.clock import steady_ns, wall_clock
from service.db.failover import CHANNEL, connecting
from service.db.transaction import Transaction
from service.errors import ConfigurationError, StoreUnavailable
from service.fair_slots import FairSlots

log = structlog.get_logger()

COMMITTERS = 3
READERS = 5
HINT_BYTES = 7999  # PostgreSQL's limit of a notification
WATCH_AGAIN_S = 1.0
# The database's clock is read again after FRESH_NS, or by the next transaction if its answer took
# longer than SLOW_NS. The answer's time is halved, so a process's clock is wrong by at most the
# other half. A row that is due by one process's clock and not yet by another's waits for the other
# one's next look.
FRESH_NS, SLOW_NS = 1_000_000_000, 10_000_000
STALLED_MS = 10_000
STALLED_LOOK_S = 5.0
SESSION = {
    "application_name": "darkroom",
    "lock_timeout": "5000",
    "statement_timeout": "30000",
    "idle_in_transaction_session_timeout": str(STALLED_MS),
}
# A process that stops (SIGSTOP, a virtual machine that is moved) keeps its locks. Between two
# statements the server ends its session after `idle_in_transaction_session_timeout`. Within a
# statement it waits for the client without a limit, so every living process looks for such
# sessions. `transaction_timeout` of PostgreSQL 17 would do the same (see docs/decisions/0026).
END_STALLED = """SELECT pid FROM (
    SELECT pid, pg_terminate_backend(pid) AS ended FROM pg_stat_activity
    WHERE datname = current_database() AND usename = current_user
    AND application_name = 'darkroom' AND state = 'active'
    AND wait_event IN ('ClientRead', 'ClientWrite')
    AND state_change < clock_timestamp() - make_interval(secs => $1)) AS stalled WHERE ended"""
# A migration may run and wait for long. If its process stops, the server still ends its session.
MIGRATION_UNLIMITED = ("lock_timeout", "statement_timeout")
# Milliseconds that a migration waits for a table, seconds between its tries, and their number.
TURN_MS, BETWEEN_S, TURNS = 2000, 2.0, 150
# Another session has the table, or waits for one of ours. The server is starting up.
LOCKED, DEADLOCK, NOT_YET = "55P03", "40P01", "57P03"
MIGRATION_LOCK = 0x6461726B726F6F6D  # "darkroom": no other program in this database takes it
# An acknowledged commit outlives the server, whatever default the role, the database or the server
# has. Every session sets it, because a default may change while the session lasts.
DURABLE = """SELECT set_config('synchronous_commit',
    CASE current_setting('synchronous_commit') WHEN 'remote_apply' THEN 'remote_apply'
    ELSE 'on' END, false)"""
NOW = text("SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint")


class PostgresStore(BatchingStore):
    """`BatchingStore` on PostgreSQL. `open_postgres` makes it."""

    committers = COMMITTERS

    def __init__(
        self,
        engine: AsyncEngine,
        process: str,
        new_id: Callable[[str, int], str],
        flush: Callable[[Transaction], None],
        clock: Callable[[int], int],
    ) -> None:
        super().__init__(process, new_id, flush)
        self._engine = engine
        # Without a transaction around it, a query is one round trip. Each statement has a snapshot
        # of its own anyway.
        self._queries = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._clock = clock  # of the database's time; a test shifts it
        self._looked = (wall_clock(), steady_ns())  # the database's time, and when it was read
        self._fresh_until = 0
        self._read_slots = FairSlots(READERS)  # slow reads leave the committers connections

    def now(self, connection: Connection) -> int:
        """The database's time. For a second after it was read, it costs no round trip."""
        if (started := steady_ns()) >= self._fresh_until:
            time = connection.execute(NOW).scalar_one()
            took = steady_ns() - started
            self._looked = (time, started + took // 2)
            self._fresh_until = started + FRESH_NS if took < SLOW_NS else 0
        return self.clock()

    def clock(self) -> int:
        time, when = self._looked
        return self._clock(time + (steady_ns() - when) // 1_000_000)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Run]:
        async with self._engine.begin() as connection:
            driver: Any = (await connection.get_raw_connection()).driver_connection
            driver.hint = None

            async def run(
                function: Callable[..., tuple[list[Any], Transaction]], *args: Any
            ) -> tuple[list[Any], Transaction]:
                results, tx = await connection.run_sync(function, *args)
                changed = tx.touched or tx.emitted or tx.due
                driver.hint = self._hint(tx) if changed else None
                return results, tx

            yield run

    def _hint(self, tx: Transaction) -> str:
        """The changes that other processes may want to know. `{}` stands for everything."""
        hint = {
            "from": self.process,
            "tasks": sorted(tx.touched),
            "events": bool(tx.emitted),
            "due": sorted(tx.due),
        }
        text = json.dumps(hint, separators=(",", ":"))
        return text if len(text) <= HINT_BYTES else "{}"

    def _take_hint(self, text: str) -> None:
        hint = json.loads(text)
        if hint.get("from") == self.process:
            return
        self.signals.notify(hint.get("tasks", ()))
        if hint.get("events", True):
            self.signals.notify(["events"])
        if self.workers and hint.get("due", True):
            self.workers.hinted(hint.get("due"))

    async def read(
        self, query: Callable[Concatenate[Connection, P], Result], *args: P.args, **kwargs: P.kwargs
    ) -> Result:
        def run(connection: Connection) -> Result:
            return query(connection, *args, **kwargs)

        try:
            async with self._read_slots.slot():
                for last in (False, True):
                    try:
                        async with self._queries.connect() as connection:
                            return await connection.run_sync(run)
                    except DBAPIError as error:
                        # The server ended it. The next connection is a new one.
                        if last or not error.connection_invalidated:
                            raise
            raise AssertionError("the second try returns or raises")
        except (DBAPIError, NoConnection, OSError) as error:
            raise StoreUnavailable(f"the store cannot be read: {type(error).__name__}") from error

    async def watch(self) -> None:
        """Listens for hints and ends stalled sessions, on a connection of its own, until cancelled.

        A starting process needs this before it migrates. A stopped process may hold the lock of
        the migration while no process at work is there to end its session.
        """
        # A connection that ends during a call can raise an InternalClientError of asyncpg.
        asyncpg_errors = (
            asyncpg.PostgresError,
            asyncpg.InterfaceError,
            asyncpg.InternalClientError,
        )
        while True:
            try:
                async with self._engine.connect() as connection:
                    driver = (await connection.get_raw_connection()).driver_connection
                    assert driver is not None
                    lost = asyncio.Event()
                    driver.add_termination_listener(lambda _, lost=lost: lost.set())
                    await driver.add_listener(CHANNEL, lambda *args: self._take_hint(args[-1]))
                    self._take_hint("{}")  # hints may have been missed
                    try:
                        while not lost.is_set():
                            for row in await driver.fetch(END_STALLED, STALLED_MS / 1000):
                                log.warning("store.freed", session=row["pid"])
                            with suppress(TimeoutError):
                                async with asyncio.timeout(STALLED_LOOK_S):
                                    await lost.wait()
                    finally:
                        await connection.invalidate()
            except (DBAPIError, NoConnection, OSError, *asyncpg_errors):
                pass  # the next connection makes up for what this one missed
            except Exception as error:  # without a watch, hints are lost and locks may stay
                fields = {"stage": "watch", "key": None, "attempt": 1, "wait_s": WATCH_AGAIN_S}
                log.exception("worker.failed", **fields, exception=repr(error))
            await asyncio.sleep(WATCH_AGAIN_S)

    async def prepare(self, *, migrate: bool) -> None:
        """Migrates the schema, one process after another. Waits for a server that starts up, and
        for a session that has locked a table.
        """
        for turn in range(TURNS):
            try:
                async with self._engine.begin() as connection:
                    await connection.run_sync(self._migrate, allowed=migrate)
                    return
            except DBAPIError as error:
                passing = getattr(error.orig, "sqlstate", None) in (LOCKED, DEADLOCK, NOT_YET)
                if not passing or turn == TURNS - 1:
                    raise
                if turn == 0:
                    log.warning("store.waiting", reason=reason(error), limit_s=TURNS * BETWEEN_S)
            await asyncio.sleep(BETWEEN_S)

    def _migrate(self, connection: Connection, *, allowed: bool) -> None:
        for name in ("fsync", "full_page_writes"):  # without them a commit may be lost
            current = text("SELECT current_setting(:name)")
            if connection.execute(current, {"name": name}).scalar_one() == "off":
                log.warning("store.unsafe", setting=name)
        for name in MIGRATION_UNLIMITED:
            connection.execute(text(f"SET LOCAL {name} = 0"))
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
        # Every statement of other processes queues behind a migration that waits for a table.
        connection.execute(text(f"SET LOCAL lock_timeout = {TURN_MS}"))
        schema.migrate(connection, allowed=allowed)
        self.now(connection)


def reason(error: Exception) -> str:
    """The server's own message, in one line."""
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
    """Connects and migrates. ConfigurationError: the server cannot be reached, or the database
    holds other tables.
    """
    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=connecting(url, SESSION),
        pool_size=COMMITTERS + READERS + 1,  # one more to watch
        max_overflow=0,
        pool_timeout=5,
        # No ping before each use: `read` and `execute` try again on a new connection.
        hide_parameters=True,  # errors are logged, and parameters hold prompts and tokens
    )

    @event.listens_for(engine.sync_engine, "connect")
    def make_durable(connection: Any, _: object) -> None:
        with closing(connection.cursor()) as cursor:
            cursor.execute(DURABLE)
        connection.commit()

    store = PostgresStore(engine, process, new_id, flush, clock)
    watching = asyncio.create_task(store.watch(), name="watch-store")
    try:
        try:
            await store.prepare(migrate=migrate)
        except (DBAPIError, OSError, asyncpg.InterfaceError) as error:
            said = reason(error)
            if "startup parameter" in said:  # as PgBouncer says it
                said += ": use the address of the server itself, not that of its pooler"
            raise ConfigurationError(
                f"DARKROOM_DATABASE_URL: PostgreSQL cannot be used: {said}"
            ) from error
        async with store.committing():
            yield store
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
        await engine.dispose()
