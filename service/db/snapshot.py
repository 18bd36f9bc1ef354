"""Copies of the embedded store: taken while it is served, and looked into.

A copy is read on a read-only connection in one transaction. That is safe beside the process that
serves: see docs/decisions/0018.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from alembic.migration import MigrationContext
from sqlalchemy import Connection, create_engine, func, select
from sqlalchemy.exc import DatabaseError
from sqlalchemy.pool import NullPool

from service.db.tables import counters, endpoints, events, images, owners, tasks
from service.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Figures:
    """What a copy holds; `sequence` is that of its last event."""

    schema: str | None
    tasks: int
    events: int
    sequence: int


@dataclass(frozen=True, slots=True)
class StoredImage:
    blob: str
    bytes: int
    sha256: str


def copy_database(source: Path, target: Path) -> None:
    """A consistent copy of a store that may be served meanwhile, as one whole file.
    ConfigurationError: it cannot be.
    """
    target.unlink(missing_ok=True)
    target.touch(0o600)
    try:
        with (
            closing(
                sqlite3.connect(
                    f"{source.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None
                )
            ) as live,
            closing(sqlite3.connect(target)) as made,
        ):
            live.execute("BEGIN")
            live.execute(
                "SELECT 1 FROM alembic_version"
            ).fetchone()  # from here on it is one moment's store
            live.backup(made)
            made.execute("PRAGMA journal_mode=DELETE")
    except sqlite3.DatabaseError as error:
        raise ConfigurationError(
            f"{source} cannot be copied to {target.parent}: {error}"
        ) from error
    check_database(target, source)


def check_database(path: Path, name: Path | str) -> None:
    """ConfigurationError: what is called `name` is damaged."""
    try:
        with closing(sqlite3.connect(path)) as connection:
            damage = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
    except sqlite3.DatabaseError as error:
        damage = str(error)
    if damage != "ok":
        raise ConfigurationError(f"{name} is damaged: {damage}")


@contextmanager
def reading(path: Path) -> Iterator[Connection]:
    """A connection to a copy that nobody writes. ConfigurationError: it is none of ours."""
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


def figures(connection: Connection) -> Figures:
    schema = MigrationContext.configure(connection).get_current_revision()
    counts = (
        select(func.count()).select_from(table).scalar_subquery() for table in (tasks, events)
    )
    sequence = select(counters.c.value).where(counters.c.name == "events").scalar_subquery()
    return Figures(schema, *map(int, connection.execute(select(*counts, sequence)).one()))


def stored_images(connection: Connection) -> Iterator[StoredImage]:
    """Every image that a copy names, in the order of the names."""
    columns = (images.c.blob, images.c.bytes, images.c.sha256)
    statement = (
        select(*columns)
        .where(images.c.state == "stored", images.c.blob.is_not(None))
        .order_by(images.c.blob)
    )
    for row in connection.execution_options(yield_per=1000).execute(statement):
        yield StoredImage(*row)


def secrets(connection: Connection) -> list[bytes]:
    """What is encrypted in a store."""
    return [
        secret
        for column in (owners.c.callback_secret, endpoints.c.secret)
        for secret in connection.execute(select(column)).scalars()
    ]
