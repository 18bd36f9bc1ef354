"""Fixtures that open a store on SQLite and on PostgreSQL.

Each backend's store is open for the whole session, and the `subject` fixture empties it before each
test. A test that opens and closes stores gets its own from `opener`.
"""

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, update

from service.db.batching import BatchingStore
from service.db.operator_tables import pauses
from service.db.postgres import PostgresStore
from service.db.sqlite import SqliteStore
from service.db.tables import counters, metadata
from service.db.transaction import Transaction
from tests.contract.subject import Clock, Opener, Subject, new_id
from tests.servers import postgres_database
from tests.stores import open_postgres, open_sqlite

CLOCK = Clock()


@pytest.fixture
def clock() -> Clock:
    """The clock of every store in this folder, set back to its start for each test."""
    CLOCK.now = Clock().now
    return CLOCK


def wipe(tx: Transaction, items: Sequence[None]) -> list[None]:
    """Empties every table and sets the counters to 0, as in a new store."""
    for table in metadata.tables.values():
        if table not in (counters, pauses):
            tx.connection.execute(delete(table))
    tx.connection.execute(update(pauses).values(paused_at=None))
    tx.connection.execute(update(counters).values(value=0))
    return [None] * len(items)


# --- SQLite ---


@pytest.fixture(scope="session")
async def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database file with its schema. Copying it is quicker than migrating a new one."""
    path = tmp_path_factory.mktemp("migrated") / "darkroom.db"
    async with open_sqlite(path, process="template", new_id=new_id):
        pass
    return path


@pytest.fixture(scope="session")
async def sqlite_store(
    migrated_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[SqliteStore]:
    path = tmp_path_factory.mktemp("session") / "darkroom.db"
    shutil.copy(migrated_file, path)
    async with open_sqlite(path, process="one", new_id=new_id, clock=lambda: CLOCK.now) as store:
        yield store


@pytest.fixture
def sqlite_opener(migrated_file: Path, tmp_path: Path, clock: Clock) -> Opener:
    """Opens a database file that belongs to one test, any number of times."""
    path = tmp_path / "darkroom.db"
    shutil.copy(migrated_file, path)

    def opener(
        process: str = "one", **more: Any
    ) -> contextlib.AbstractAsyncContextManager[BatchingStore]:
        return open_sqlite(path, process=process, new_id=new_id, clock=lambda: clock.now, **more)

    return opener


# --- PostgreSQL ---


@pytest.fixture(scope="session")
async def migrated_database(postgres_server: str) -> AsyncIterator[str]:
    """The database of `postgres_store`."""
    with contextlib.ExitStack() as stack:
        yield await asyncio.to_thread(
            stack.enter_context, postgres_database(postgres_server)
        )  # it runs its own event loop
        await asyncio.to_thread(stack.close)


@pytest.fixture(scope="session")
async def postgres_store(migrated_database: str) -> AsyncIterator[PostgresStore]:
    async with open_postgres(
        migrated_database, process="one", new_id=new_id, clock=lambda _now: CLOCK.now
    ) as store:
        yield store


@pytest.fixture
async def postgres_opener(
    migrated_database: str, postgres_store: PostgresStore, clock: Clock
) -> Opener:
    """Opens the database of `postgres_store`, emptied, as another process would."""
    await postgres_store.write(wipe, None)

    def opener(
        process: str = "one", **more: Any
    ) -> contextlib.AbstractAsyncContextManager[BatchingStore]:
        return open_postgres(
            migrated_database, process=process, new_id=new_id, clock=lambda _now: clock.now, **more
        )

    return opener


@pytest.fixture
async def two(
    postgres_store: PostgresStore, postgres_opener: Opener, clock: Clock
) -> AsyncIterator[tuple[Subject, Subject]]:
    """Two processes on one PostgreSQL database."""
    async with postgres_opener("two") as other:
        yield Subject(postgres_store, clock), Subject(other, clock)
    postgres_store.detach()


# --- either backend ---


@pytest.fixture(params=["sqlite", "postgres"])
def store(request: pytest.FixtureRequest) -> BatchingStore:
    store: BatchingStore = request.getfixturevalue(f"{request.param}_store")
    return store


@pytest.fixture
async def subject(store: BatchingStore, clock: Clock) -> AsyncIterator[Subject]:
    await store.write(wipe, None)
    yield Subject(store, clock)
    store.detach()


@pytest.fixture(params=["sqlite", "postgres"])
def opener(request: pytest.FixtureRequest) -> Opener:
    opener: Opener = request.getfixturevalue(f"{request.param}_opener")
    return opener
