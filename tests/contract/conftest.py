"""The store, as each of the two that implement it."""

import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from service.store import Store
from service.store.postgres import open_postgres
from service.store.sqlite import open_sqlite
from service.store.tables import metadata
from tests.contract.subject import Clock, Opener, Subject, new_id
from tests.servers import execute, postgres_database


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="session")
async def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty SQLite store with its schema: copying it is quicker than migrating."""
    path = tmp_path_factory.mktemp("migrated") / "darkroom.db"
    async with open_sqlite(path, process="template", new_id=new_id):
        pass
    return path


@pytest.fixture(scope="session")
def migrated_database(postgres_server: str) -> Iterator[str]:
    """A PostgreSQL database that tests use one after another, each finding it empty."""
    with postgres_database(postgres_server) as url:
        yield url


@pytest.fixture
def sqlite_opener(migrated_file: Path, tmp_path: Path, clock: Clock) -> Opener:
    path = tmp_path / "darkroom.db"
    shutil.copy(migrated_file, path)

    def opener(process: str = "one", **more: Any) -> AbstractAsyncContextManager[Store]:
        return open_sqlite(path, process=process, new_id=new_id, clock=lambda: clock.now, **more)

    return opener


EMPTY = "; ".join(f"DELETE FROM {table.name}" for table in metadata.tables.values() if table.name != "counters")


@pytest.fixture
async def postgres_opener(migrated_database: str, clock: Clock) -> Opener:
    def opener(process: str = "one", **more: Any) -> AbstractAsyncContextManager[Store]:
        return open_postgres(migrated_database, process=process, new_id=new_id, clock=lambda _now: clock.now, **more)

    async with opener():
        await execute(migrated_database, f"{EMPTY}; UPDATE counters SET value = 0")
    return opener


@pytest.fixture(params=["sqlite", "postgres"])
def opener(request: pytest.FixtureRequest) -> Opener:
    """Opens the store once more, on PostgreSQL also while it is open."""
    made: Opener = request.getfixturevalue(f"{request.param}_opener")
    return made


@pytest.fixture
async def subject(opener: Opener, clock: Clock) -> AsyncIterator[Subject]:
    async with opener() as store:
        yield Subject(store, clock, opener)


@pytest.fixture
async def two(postgres_opener: Opener, clock: Clock) -> AsyncIterator[tuple[Subject, Subject]]:
    """Two processes on one PostgreSQL."""
    async with postgres_opener("one") as first, postgres_opener("two") as second:
        yield Subject(first, clock, postgres_opener), Subject(second, clock, postgres_opener)
