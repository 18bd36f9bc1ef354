"""Checks a SQLite file before anything is written to it: it must be whole and hold our tables.

The check uses a connection with `mode=ro`, so that not even SQLite's own recovery changes a file
that is refused (see docs/decisions/0025).
"""

import sqlite3
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import quote

from sqlalchemy import create_engine
from sqlalchemy.exc import DatabaseError
from sqlalchemy.pool import NullPool

from service.db import schema
from service.errors import ConfigurationError
from service.folders import sync

CHECK_S = 0.3  # about 300 MB in memory; callbacks wait for a start
STEPS = 10_000  # of SQLite, between two looks at the clock
DAMAGE = ("SQLITE_CORRUPT", "SQLITE_NOTADB")
BESIDE = ("-wal", "-journal")  # files that SQLite keeps beside a database and needs to read it
ADVICE = "put a backup back (darkroom restore)"
# With the file's name: the folder beside it from which a restore moves the file into its place.
RESTORING = ".restoring-"


def connecting(path: Path, mode: str) -> Callable[[], sqlite3.Connection]:
    """Opens an existing file with SQLite's `mode`: `ro` or `rw`."""
    uri = f"file:{quote(str(path))}?mode={mode}"
    return lambda: sqlite3.connect(uri, uri=True, check_same_thread=False, isolation_level=None)


def damaged(error: BaseException | None) -> bool:
    """Whether SQLite says that the file is no database, or a broken one."""
    name = str(getattr(getattr(error, "orig", error), "sqlite_errorname", ""))
    return name.startswith(DAMAGE)


def refuse_no_file(path: Path) -> None:
    """ConfigurationError: the path is not a regular file. A link would have a lock beside each of
    its two names.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ConfigurationError(
            f"DARKROOM_DATABASE_URL: {path} is no file but a link, a folder or a device: name the"
            " file itself"
        )


def examine(path: Path) -> None:
    """ConfigurationError: the file is damaged, holds other tables, or a part of it is missing. A
    missing file is fine. OSError, DatabaseError: the file cannot be read.
    """
    refuse_no_file(path)
    if not path.exists() and path.with_name(RESTORING + path.name).exists():
        raise ConfigurationError(
            f"{path} is missing: a restoration was broken off. Do it again (darkroom restore"
            " --force), which loses nothing"
        )
    if not path.exists() or path.stat().st_size <= 1:  # to SQLite one byte is an empty database
        for beside in (path.with_name(path.name + end) for end in BESIDE):
            if beside.exists() and beside.stat().st_size:
                raise ConfigurationError(
                    f"{path} is missing or empty, but {beside.name} beside it holds tasks that"
                    f" SQLite would throw away: {ADVICE}"
                )
        if path.exists():
            raise ConfigurationError(
                f"{path} is empty, which no store is: {ADVICE}, or remove it to begin a new one"
            )
        return
    engine = create_engine("sqlite+pysqlite://", creator=connecting(path, "ro"), poolclass=NullPool)
    try:
        with engine.connect() as connection:
            schema.refuse_foreign(connection)
            driver = connection.connection.driver_connection
            assert driver is not None
            verdict = quick_check(driver)
    except DatabaseError as error:
        verdict = str(error.orig)
        if getattr(error.orig, "sqlite_errorname", "") == "SQLITE_READONLY_ROLLBACK":
            # Our files are in WAL mode from their first byte. This journal is another program's.
            verdict = "a journal beside it holds an unfinished transaction"
        elif not damaged(error):
            raise
    if verdict != "ok":
        raise ConfigurationError(
            f"DARKROOM_DATABASE_URL: {path} cannot be used: it is damaged ({verdict}): {ADVICE}"
        )


def quick_check(driver: sqlite3.Connection) -> str:
    """The first defect in one line, or `ok` if none was found within `CHECK_S`."""
    end = time.monotonic() + CHECK_S
    driver.set_progress_handler(lambda: time.monotonic() > end, STEPS)
    try:
        return str(driver.execute("PRAGMA quick_check(1)").fetchone()[0]).strip().replace("\n", " ")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorname == "SQLITE_INTERRUPT":
            return "ok"
        raise


def begin(path: Path) -> None:
    """Makes a new file in SQLite's WAL mode. A rename puts it in place, so that an empty file is
    never ours.

    An existing file is synced first. A killed process may have committed without waiting for the
    disk: SQLite would show that commit, and a power cut would lose it.
    """
    if path.exists():
        for each in (path, path.with_name(path.name + "-wal")):
            with suppress(FileNotFoundError):
                sync(each)
        return
    draft = path.with_name(path.name + ".new")
    for leftover in (draft, draft.with_name(draft.name + "-journal")):
        leftover.unlink(missing_ok=True)
    with closing(sqlite3.connect(draft, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
    draft.replace(path)
    with suppress(PermissionError):
        sync(path.parent)
