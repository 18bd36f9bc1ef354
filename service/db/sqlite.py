"""The embedded store: one SQLite file, one writer, one process.

WAL with `synchronous=FULL`: a commit that returned survives a power cut. One connection writes and
checkpoints, because SQLite before 3.51.3 can corrupt a WAL with two writers. Readers are read-only.

Statements of a batch run in the thread of the event loop, and so do reads by keys. Another thread
would wait for the interpreter's lock after each statement. The commit runs there too while the disk
is quick. A thread waits for a slow disk.
"""

import asyncio
import json
import sqlite3
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Concatenate

import structlog
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DatabaseError
from sqlalchemy.pool import NullPool, QueuePool

from service.db import prepared, schema
from service.db.batching import BatchingStore, P, Result, Run
from service.db.clock import SteadyClock
from service.db.file_lock import store_lock
from service.db.integrity import begin, connecting, damaged, examine
from service.db.queues import release_all
from service.db.transaction import Transaction
from service.errors import ConfigurationError, StoreInUse, StoreUnavailable
from service.fair_slots import FairSlots
from service.folders import make_private

IMMEDIATE = "BEGIN IMMEDIATE"
READERS = 3  # a holder alone has two of them
QUICK_S = 0.003  # a disk that syncs in less is not worth a thread
REMEMBERED = 16  # commits
STALL_S = 0.05  # one such commit is enough to go to the thread

log = structlog.get_logger()


def new_engine(path: Path, *, readonly: bool) -> Engine:
    engine = create_engine(
        "sqlite+pysqlite://",
        creator=connecting(path, "ro" if readonly else "rw"),
        poolclass=QueuePool if readonly else NullPool,
        # SQLite compares the text of names as it stands.
        json_serializer=json.JSONEncoder(ensure_ascii=False).encode,
        hide_parameters=True,  # errors are logged, and parameters hold prompts and tokens
        # One connection more than there are threads, for `look_up`.
        **({"pool_size": READERS + 1, "max_overflow": 0} if readonly else {}),
    )

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, record: Any) -> None:
        record.info[prepared.DRIVER] = connection
        if readonly:
            settings = ["busy_timeout=5000", "query_only=ON"]
        else:  # the writer runs in the event loop, which must not wait
            settings = ["busy_timeout=0", "journal_mode=WAL", "synchronous=FULL"]
        for setting in (*settings, "foreign_keys=ON", "cache_size=-16384"):
            connection.execute(f"PRAGMA {setting}")

    # Without a transaction around them, the statements of a query see a snapshot each, as they do
    # on PostgreSQL.
    if not readonly:

        @event.listens_for(engine, "begin")
        def immediate(connection: Connection) -> None:
            if not connection.info[prepared.DRIVER].in_transaction:
                connection.exec_driver_sql(IMMEDIATE)

    return engine


class SqliteStore(BatchingStore):
    """`BatchingStore` on one SQLite file. `open_sqlite` makes it.

    After SQLite has reported damage, the store writes nothing more until the file is repaired and
    the process restarts.
    """

    def __init__(
        self,
        path: Path,
        process: str,
        new_id: Callable[[str, int], str],
        flush: Callable[[Transaction], None],
        clock: Callable[[], int],
    ) -> None:
        super().__init__(process, new_id, flush)
        self.damaged = False
        self._clock = clock
        self._path = path
        self._committing = ThreadPoolExecutor(1, "store-commit")
        self._readers = ThreadPoolExecutor(READERS, "store-reader")
        self._read_slots = FairSlots(READERS)
        self._engine = new_engine(path, readonly=False)
        self._reading = new_engine(path, readonly=True)
        self._connection: Connection | None = None
        self._looking: Connection | None = None
        # Seconds of the latest commits. The first is invented, so that a slow disk is met on the
        # thread.
        self._commits = deque([1.0], REMEMBERED)

    def clock(self) -> int:
        return self._clock()

    def now(self, connection: Connection) -> int:
        return self._clock()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Run]:
        if self.damaged:
            raise StoreUnavailable("the store is damaged")
        if self._connection is None:
            self._connection = self._engine.connect()
        connection = self._connection

        async def run(function: Callable[..., Any], *arguments: Any) -> Any:
            return function(connection, *arguments)

        prepared.begin(connection, IMMEDIATE)
        try:
            yield run
            await self._end(connection)
        except BaseException as error:
            self._note_damage(error)
            prepared.roll_back(connection)
            raise

    def _note_damage(self, error: BaseException) -> None:
        if damaged(error) and not self.damaged:
            self.damaged = True
            message = (
                f"{self._path}: {getattr(error, 'orig', error)}; nothing more is written to it"
            )
            log.critical("store.damaged", message=message)

    async def _end(self, connection: Connection) -> None:
        """Commits here while the disk is quick, and otherwise on a thread.

        The quickest quarter of the latest commits decides. The other commits measure a busy
        processor and not the disk.
        """

        def commit() -> None:
            started = time.perf_counter()
            prepared.commit(connection)
            took = time.perf_counter() - started
            self._commits.extend([took] * (REMEMBERED if took > STALL_S else 1))

        if sorted(self._commits)[len(self._commits) // 4] <= QUICK_S:
            commit()
        else:
            await asyncio.get_running_loop().run_in_executor(self._committing, commit)

    async def read(
        self, query: Callable[Concatenate[Connection, P], Result], *args: P.args, **kwargs: P.kwargs
    ) -> Result:
        run = partial(self._read, query, *args, **kwargs)
        async with self._read_slots.slot():
            return await asyncio.get_running_loop().run_in_executor(self._readers, run)

    async def look_up(
        self, query: Callable[Concatenate[Connection, P], Result], *args: P.args, **kwargs: P.kwargs
    ) -> Result:
        with self._reads():
            self._looking = self._looking or self._reading.connect()
            try:
                return query(self._looking, *args, **kwargs)
            finally:
                self._looking.rollback()

    def _read(
        self, query: Callable[Concatenate[Connection, P], Result], *args: P.args, **kwargs: P.kwargs
    ) -> Result:
        with self._reads(), self._reading.begin() as connection:
            connection.info["give_way"] = self.give_way
            return query(connection, *args, **kwargs)

    @contextmanager
    def _reads(self) -> Iterator[None]:
        try:
            yield
        except DatabaseError as error:
            self._note_damage(error)
            raise StoreUnavailable(
                f"the store cannot be read: {type(error.orig).__name__}"
            ) from error

    def prepare(self, *, migrate: bool) -> None:
        """Migrates the schema and ends the leases of the process that had the store before."""
        with self._engine.connect() as connection, connection.begin():
            schema.migrate(connection, allowed=migrate)
            release_all(connection)

    def dispose(self) -> None:
        """Closes the connections. The writer's comes last and checkpoints, except into a damaged
        file.
        """
        self._committing.shutdown()
        self._readers.shutdown()
        if self._looking is not None:
            self._looking.close()
        if not self.damaged:
            self._reading.dispose()
        if self._connection is not None:
            self._connection.close()
        self._reading.dispose()
        self._engine.dispose()


@asynccontextmanager
async def open_sqlite(
    path: Path,
    *,
    process: str,
    new_id: Callable[[str, int], str],
    flush: Callable[[Transaction], None],
    clock: Callable[[], int] | None = None,
    migrate: bool = True,
) -> AsyncIterator[SqliteStore]:
    """Opens the store for this process alone. ConfigurationError: another process has it, or the
    file cannot be used.
    """
    store = None
    with store_lock(path) as alone:
        if not alone:
            raise StoreInUse(f"another darkroom process uses {path}: only one may on SQLite")
        try:
            try:
                await asyncio.to_thread(examine, path)
                await asyncio.to_thread(begin, path)
                store = SqliteStore(path, process, new_id, flush, clock or SteadyClock())
                await asyncio.to_thread(store.prepare, migrate=migrate)
                make_private(path, *(path.with_name(path.name + end) for end in ("-wal", "-shm")))
            except (DatabaseError, sqlite3.Error, OSError) as error:
                raise ConfigurationError(
                    f"DARKROOM_DATABASE_URL: {path} cannot be used: {getattr(error, 'orig', error)}"
                ) from error
            async with store.committing():
                yield store
        finally:
            if store is not None:
                await asyncio.to_thread(store.dispose)
