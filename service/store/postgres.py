"""PostgreSQL: the engine at scale. The same operations run on asyncpg connections, several committers at once.

Times are the database's. What another process committed is found by polling; nothing depends on being told.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Concatenate

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as NoConnection
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from service.errors import ConfigurationError, StoreUnavailable
from service.store import Item, P, Result, Signals, Transaction, Workers, schema
from service.store.committer import Batch, Call, Committer, Run, execute

COMMITTERS = 3
READERS = 5
MIGRATION_LOCK = 0x6461726B726F6F6D  # "darkroom": any constant that nobody else in this database takes
NOW = text("SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint")


def async_url(url: str) -> str:
    """`postgresql://…`, `postgres://…` or with a driver of its own, for asyncpg."""
    return "postgresql+asyncpg://" + url.split("://", 1)[1]


class PostgresStore:
    """`Store` on PostgreSQL; made by `open_postgres`."""

    def __init__(
        self, engine: AsyncEngine, *, process: str, new_id: Callable[[str, int], str], clock: Callable[[int], int] = lambda now: now
    ) -> None:
        self.signals = Signals()
        self.process = process
        self._engine = engine
        self._new_id = new_id
        self._clock = clock  # what to make of the database's time; a test shifts it
        self._committers = [Committer(self._run_batch, self.signals, self._busy_ones) for _ in range(COMMITTERS)]
        self._turn = 0
        self._reading = asyncio.Semaphore(READERS)  # slow reads leave the committers their connections

    def _begin(self, connection: Connection, slots: dict[str, int]) -> Transaction:
        now = self._clock(connection.execute(NOW).scalar_one())
        return Transaction(connection, now, self.process, self._new_id, slots)

    async def _run_batch(self, calls: Sequence[Call], slots: dict[str, int]) -> Batch:
        return await execute(self._transaction, self._begin, calls, slots)

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[Run]:
        async with self._engine.begin() as connection:
            yield connection.run_sync

    async def write(
        self, operation: Callable[[Transaction, Sequence[Item]], Sequence[Result]], item: Item, *, urgent: bool = False
    ) -> Result:
        committers = self._committers
        idle = next((committer for committer in committers if committer.idle), None)
        self._turn = (self._turn + 1) % len(committers)
        return await (idle or committers[self._turn]).write(operation, item, urgent=urgent)

    async def read(self, query: Callable[Concatenate[Connection, P], Result], *args: P.args, **kwargs: P.kwargs) -> Result:
        def run(connection: Connection) -> Result:
            return query(connection, *args, **kwargs)

        try:
            async with self._reading, self._engine.connect() as connection:
                return await connection.run_sync(run)
        except (DBAPIError, NoConnection, OSError) as error:
            raise StoreUnavailable(f"the store cannot be read: {type(error).__name__}") from error

    def _busy_ones(self) -> int:
        return sum(not committer.idle for committer in self._committers)

    def attach(self, workers: Workers) -> None:
        for committer in self._committers:
            committer.workers = workers

    def detach(self) -> None:
        for committer in self._committers:
            committer.workers = None

    async def prepare(self, *, migrate: bool) -> None:
        """Migrates the schema; processes that start together do it one after another."""

        def run(connection: Connection) -> None:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
            schema.migrate(connection, allowed=migrate)

        async with self._engine.begin() as connection:
            await connection.run_sync(run)

    async def run(self) -> None:
        await asyncio.gather(*(committer.run() for committer in self._committers))

    def close(self) -> None:
        for committer in self._committers:
            committer.close()


def reason(error: Exception) -> str:
    """The server's own words, in one line."""
    return str(getattr(error, "orig", None) or error).partition("\n")[0].rpartition(">: ")[2]


@asynccontextmanager
async def open_postgres(
    url: str, *, process: str, new_id: Callable[[str, int], str], clock: Callable[[int], int] = lambda now: now, migrate: bool = True
) -> AsyncIterator[PostgresStore]:
    """Connects and migrates; ConfigurationError when the server cannot be reached or the database is not ours."""
    engine = create_async_engine(
        async_url(url),
        pool_size=COMMITTERS + READERS,
        max_overflow=0,
        pool_timeout=5,
        pool_pre_ping=True,
        hide_parameters=True,  # they hold prompts and tokens, and errors are logged
    )
    try:
        store = PostgresStore(engine, process=process, new_id=new_id, clock=clock)
        try:
            await store.prepare(migrate=migrate)
        except (DBAPIError, OSError) as error:
            raise ConfigurationError(f"DARKROOM_DATABASE_URL: PostgreSQL cannot be used: {reason(error)}") from error
        committing = asyncio.create_task(store.run(), name="committers")
        try:
            yield store
        finally:
            store.close()
            await committing
    finally:
        await engine.dispose()
