"""Copies of the embedded store: made while it is served, and read.

A copy is read on a read-only connection in one transaction. docs/decisions/0018 says why that is
safe beside the serving process.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, create_engine, func, select
from sqlalchemy.exc import DatabaseError
from sqlalchemy.pool import NullPool

from service.db.file_tables import files
from service.db.integrity import connecting
from service.db.schema import revision
from service.db.tables import counters, endpoints, events, images, owners, tasks
from service.errors import ConfigurationError
from service.ids import sequence_text


def copy_database(source: Path, target: Path) -> None:
    """Copies a store that may be served meanwhile into one whole file."""
    target.unlink(missing_ok=True)
    target.touch(0o600)
    try:
        with (
            closing(connecting(source.absolute(), "ro")()) as live,
            closing(sqlite3.connect(target)) as copy,
        ):
            live.execute("BEGIN")
            live.execute("SELECT 1 FROM alembic_version").fetchone()  # takes the snapshot
            live.backup(copy)
            copy.execute("PRAGMA journal_mode=DELETE")
    except sqlite3.DatabaseError as error:
        raise ConfigurationError(
            f"{source} cannot be copied to {target.parent}: {error}"
        ) from error
    check_database(target, source)


def check_database(path: Path, name: Path | str) -> None:
    """ConfigurationError with this `name`: the database is damaged."""
    try:
        with closing(sqlite3.connect(path)) as connection:
            damage = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
    except sqlite3.DatabaseError as error:
        damage = str(error)
    if damage != "ok":
        raise ConfigurationError(f"{name} is damaged: {damage}")


@contextmanager
def reading(path: Path) -> Iterator[Connection]:
    """A connection to a copy. ConfigurationError: it is no store."""
    engine = create_engine(
        "sqlite+pysqlite://",
        creator=lambda: sqlite3.connect(path),
        poolclass=NullPool,
        hide_parameters=True,
    )
    try:
        with engine.connect() as connection:
            yield connection
    except DatabaseError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.orig}") from error


def figures(connection: Connection) -> dict[str, Any]:
    """The version of a copy's schema, its tasks and events, and the sequence of its last event."""
    last = select(counters.c.value).where(counters.c.name == "events")
    return {
        "schema_version": revision(connection),
        "tasks": connection.execute(select(func.count()).select_from(tasks)).scalar_one(),
        "events": connection.execute(select(func.count()).select_from(events)).scalar_one(),
        "sequence": sequence_text(connection.execute(last).scalar_one()),
    }


def stored_images(connection: Connection) -> Iterator[tuple[str, int, str]]:
    """Name, length and SHA-256 of every blob of a copy: images, then input images."""
    for table in (images, files):
        statement = (
            select(table.c.blob, table.c.bytes, table.c.sha256)
            .where(table.c.blob.is_not(None))
            .order_by(table.c.blob)
        )
        for row in connection.execution_options(yield_per=1000).execute(statement):
            yield row.blob, row.bytes, row.sha256


def secrets(connection: Connection) -> list[bytes]:
    return [
        secret
        for column in (owners.c.callback_secret, endpoints.c.secret)
        for secret in connection.execute(select(column)).scalars()
    ]
