"""The schema: migrated under a lock, and refused when it is newer or not Darkroom's. On SQLite, one
process uses the file alone (docs/operations.md, docs/backup.md).
"""

import asyncio
import sqlite3
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import Connection, inspect, update

from service.db import file_tables, list_indexes, operator_tables  # noqa: F401
from service.db.batching import BatchingStore
from service.db.migrations import versions
from service.db.tables import counters, metadata, tasks
from service.db.transaction import Transaction
from service.errors import ConfigurationError
from tests.contract.subject import Clock, Opener, Subject, new_id
from tests.servers import execute
from tests.stores import open_postgres, open_sqlite


class Database:
    """An empty database of one backend. The store opens it, and statements can run outside the
    store.
    """

    def __init__(self, place: str | Path) -> None:
        self.place = place

    def open(self, **more: Any) -> AbstractAsyncContextManager[BatchingStore]:
        if isinstance(self.place, Path):
            return open_sqlite(self.place, process="one", new_id=new_id, **more)
        return open_postgres(self.place, process="one", new_id=new_id, **more)

    async def execute(self, statement: str) -> None:
        if isinstance(self.place, Path):
            connection = sqlite3.connect(self.place)
            with connection:
                connection.execute(statement)
            connection.close()
        else:
            await execute(self.place, statement)

    async def refused(self, match: str, **more: Any) -> None:
        with pytest.raises(ConfigurationError, match=match) as caught:
            async with self.open(**more):
                pass
        assert "\n" not in str(caught.value)


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Database:
    return Database(
        tmp_path / "new" / "darkroom.db"
        if request.param == "sqlite"
        else request.getfixturevalue("postgres_url")
    )


async def test_the_migrated_schema_equals_the_metadata(subject: Subject) -> None:
    """In both dialects, the migrations and the metadata have the same tables, columns, types and
    constraints. The metadata has no indexes.
    """

    def compare(connection: Connection) -> list[Any]:
        options = {"include_object": lambda _object, _name, kind, *_: kind != "index"}
        context = MigrationContext.configure(connection, opts=options)
        return list(compare_metadata(context, metadata))

    assert await subject.store.read(compare) == []
    tables = await subject.store.read(lambda connection: set(inspect(connection).get_table_names()))
    assert tables == {*metadata.tables, "alembic_version"}
    sums = ("tasks completed", "tasks failed", "tasks cancelled", "tasks expired")
    kinds = ("adjust", "charge", "estimate", "refund", "reserved")
    assert {row["name"]: row["value"] for row in await subject.rows(counters)} == dict.fromkeys(
        (
            *("audit", "clock", "events", "forgotten", "ledger", "ready", *sums),
            *(f"credits {kind}" for kind in kinds),
        ),
        0,
    )


async def test_both_databases_have_the_same_indexes(postgres_url: str, tmp_path: Path) -> None:
    def indexes(connection: Connection) -> set[tuple[str, object, tuple[str | None, ...]]]:
        return {
            (table, index["name"], tuple(index["column_names"]))
            for table in inspect(connection).get_table_names()
            for index in inspect(connection).get_indexes(table)
            if "duplicates_constraint" not in index
        }

    found = []
    for place in (tmp_path / "darkroom.db", postgres_url):
        async with Database(place).open() as store:
            found.append(await store.read(indexes))
    assert found[0] == found[1]
    assert len(found[0]) > 50


async def test_every_table_with_an_owners_data_has_an_owner_column() -> None:
    without = {name for name, table in metadata.tables.items() if "owner" not in table.c}
    assert without == {"owners", "counters", "sinks", "attempts", "steps", "pauses", "inbox"}, (
        "attempts belong to a delivery, and steps and callbacks in the inbox to a task"
    )


async def test_an_empty_database_is_migrated_and_can_be_opened_again(database: Database) -> None:
    """The store creates the folder too. The next opening finds the rows and needs no migration."""
    async with database.open() as store:
        task_id = await Subject(store, Clock()).queued()
    async with database.open(migrate=False) as store:
        assert await Subject(store, Clock()).state(task_id) == "queued"


async def test_an_empty_database_is_refused_when_migrating_is_off(database: Database) -> None:
    """`DARKROOM_MIGRATE=off`: one line says what to do, and nothing is created."""
    await database.refused("schema is empty.*run `darkroom migrate`", migrate=False)
    async with database.open() as store:
        assert await Subject(store, Clock()).events() == []


async def test_a_newer_schema_is_refused(database: Database) -> None:
    """An older program must not touch it, whether it migrates or not."""
    async with database.open():
        pass
    await database.execute("UPDATE alembic_version SET version_num = '9999'")
    for migrate in (True, False):
        await database.refused("schema 9999 is newer", migrate=migrate)


async def test_a_database_with_foreign_tables_is_refused_and_left_alone(database: Database) -> None:
    """The database belongs to another program, so the store adds nothing to it."""
    if isinstance(database.place, Path):
        database.place.parent.mkdir()
    await database.execute("CREATE TABLE customers (name text)")
    before = database.place.read_bytes() if isinstance(database.place, Path) else b""
    await database.refused("tables that are not darkroom's")
    assert not isinstance(database.place, Path) or database.place.read_bytes() == before
    await database.execute("DROP TABLE customers")
    async with database.open() as store:
        assert await store.read(lambda connection: "tasks" in inspect(connection).get_table_names())


async def test_processes_that_start_together_migrate_once(postgres_url: str) -> None:
    """The first one migrates under a lock, and the rest find it done."""
    database = Database(postgres_url)

    async def start() -> int:
        async with database.open() as store:
            return len(await Subject(store, Clock()).rows(counters))

    assert list(await asyncio.gather(start(), start(), start())) == [15] * 3


async def test_a_second_process_cannot_open_a_sqlite_store(sqlite_opener: Opener) -> None:
    """The file is free again as soon as it is closed, also after a failed opening."""
    async with sqlite_opener("first"):
        for _ in range(2):
            with pytest.raises(ConfigurationError, match="another darkroom process uses"):
                async with sqlite_opener("second"):
                    pass
    async with sqlite_opener("first"):
        pass


async def test_a_file_that_is_no_store_is_refused_and_left_alone(tmp_path: Path) -> None:
    """The refusal is one line. No byte of the file changes, and its lock is free again."""
    path = tmp_path / "darkroom.db"
    path.write_bytes(b"no database at all, but long enough to look at it twice" * 100)
    before = path.read_bytes()
    for _ in range(2):
        await Database(path).refused("cannot be used")
    assert path.read_bytes() == before


async def test_a_missing_server_is_reported_in_one_line(tmp_path: Path) -> None:
    """No socket exists at that address."""
    await Database(f"postgresql:///darkroom?host={tmp_path}&user=nobody").refused(
        "DARKROOM_DATABASE_URL: PostgreSQL cannot be used"
    )


async def test_a_missing_database_is_reported_in_one_line(postgres_server: str) -> None:
    """The server answers that it has no such database."""
    await Database(postgres_server.replace("/postgres?", "/nowhere?")).refused(
        "DARKROOM_DATABASE_URL: PostgreSQL cannot be used"
    )


def fill_bodies(tx: Transaction, bodies: Sequence[bytes]) -> list[None]:
    tx.connection.execute(update(tasks).values(body=bodies[0]))
    return [None]


def migrate_bodies(tx: Transaction, items: Sequence[None]) -> list[None]:
    with Operations.context(MigrationContext.configure(tx.connection)):
        import_module(f"{versions.__name__}.0009_old_bodies").upgrade()
    return [None] * len(items)


async def test_an_upgrade_clears_the_bodies_of_tasks_that_are_not_sent_again(
    subject: Subject,
) -> None:
    """An earlier version kept them until retention. A task that may still be sent keeps its own."""
    waiting = {await subject.queued(), await subject.uncertain(), (await subject.submitting()).key}
    over = {await subject.submitted(), await subject.submitted()}
    await subject.write(fill_bodies, b"old")
    await subject.write(migrate_bodies, None)
    bodies = {row["id"]: row["body"] for row in await subject.rows(tasks)}
    assert bodies == dict.fromkeys(waiting, b"old") | dict.fromkeys(over, b"")


@pytest.mark.parametrize("size", [20, 20_000], ids=["in a page", "in many pages"])
async def test_nothing_of_an_old_body_is_left_in_the_file(tmp_path: Path, size: int) -> None:
    path, secret = tmp_path / "darkroom.db", b"token" * size
    async with open_sqlite(path, process="one", new_id=new_id) as store:
        await Subject(store, Clock()).submitted()
        await store.write(fill_bodies, secret)
    assert secret[:50] in path.read_bytes()
    async with open_sqlite(path, process="one", new_id=new_id) as store:
        await store.write(migrate_bodies, None)
    assert secret[:50] not in path.read_bytes()


def test_no_migration_drops_what_is_in_use() -> None:
    """During an upgrade, processes of the previous version still use its columns and indexes
    (docs/decisions/0021-migrations-only-expand.md). Only indexes that it does not need go.
    """
    unused = {"0016_list_indexes.py": 1}
    for path in Path(versions.__path__[0]).glob("0*.py"):
        text = path.read_text()
        assert text.count("op.drop_index") == unused.get(path.name, 0), path
        assert text.count("op.drop_") == text.count("op.drop_index"), path
