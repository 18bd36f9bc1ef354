"""What a database file has to be before anything is written to it: ours, and whole. What is not is
left as it is, byte for byte.

It is looked at through a connection that only reads, so that not even SQLite's own recovery touches
it.
"""

import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from sqlalchemy import create_engine
from sqlalchemy.exc import DatabaseError
from sqlalchemy.pool import NullPool

from service.db import schema
from service.errors import ConfigurationError
from service.folders import sync

# about a gigabyte of a file in memory: a start is not to take longer, callbacks wait for it
CHECK_S = 1.0
STEPS = 10_000  # of SQLite's, between two looks at the clock
DAMAGE = ("SQLITE_CORRUPT", "SQLITE_NOTADB")
BESIDE = ("-wal", "-journal")  # what SQLite keeps beside a file and needs to read it
ADVICE = "put a backup back (darkroom restore)"
# and the file's name: the folder beside it from which a restoration puts it in its place
RESTORING = ".restoring-"


def connecting(path: Path, mode: str) -> Callable[[], sqlite3.Connection]:
    """Opens the file, which is there, with SQLite's `mode`: `ro` or `rw`."""
    uri = f"file:{quote(str(path))}?mode={mode}"
    return lambda: sqlite3.connect(uri, uri=True, check_same_thread=False, isolation_level=None)


def damaged(error: BaseException | None) -> bool:
    """Whether SQLite says that the file is no database, or a broken one."""
    name = str(getattr(getattr(error, "orig", error), "sqlite_errorname", ""))
    return name.startswith(DAMAGE)


def refuse_no_file(path: Path) -> None:
    """ConfigurationError: something else has the name. A link would have a lock and a WAL of its
    own beside each of its two names.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ConfigurationError(
            f"DARKROOM_DATABASE_URL: {path} is no file but a link, a folder or a device: name the"
            " file itself"
        )


def examine(path: Path) -> None:
    """ConfigurationError: the file is another's, or broken, or what belongs to it is missing. A
    file that is not there is no defect.

    OSError, DatabaseError: it cannot be looked at.
    """
    refuse_no_file(path)
    if not path.exists() and path.with_name(RESTORING + path.name).exists():
        raise ConfigurationError(
            f"{path} is missing: a restoration was broken off. Do it again (darkroom restore"
            " --force), which loses nothing"
        )
    if not path.exists() or path.stat().st_size <= 1:  # SQLite takes one byte for none
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
    try:
        found = defect(path)
    except DatabaseError as error:
        if not damaged(error):
            raise
        found = str(error.orig)
    if found != "ok":
        raise ConfigurationError(
            f"DARKROOM_DATABASE_URL: {path} cannot be used: it is damaged ({found}): {ADVICE}"
        )


def defect(path: Path) -> str:
    """The first defect of a file that is ours, or `ok`.

    A transaction whose writer was killed is undone by the first who writes, from a journal that
    does not say whose it is: it is tried on a copy, since another database's would destroy ours.
    """
    try:
        return looked_at(path, "ro")
    except DatabaseError as error:
        if getattr(error.orig, "sqlite_errorname", "") != "SQLITE_READONLY_ROLLBACK":
            raise
    trial = path.with_name(f".trial-{path.name}")
    shutil.rmtree(trial, ignore_errors=True)
    trial.mkdir(mode=0o700)
    try:
        for each in (path, *(path.with_name(path.name + end) for end in BESIDE)):
            if each.exists():
                shutil.copyfile(each, trial / each.name)
        return looked_at(trial / path.name, "rw")
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def looked_at(path: Path, mode: str) -> str:
    """The same, with SQLite's `mode`; DatabaseError: it cannot be read so."""
    looking = create_engine(
        "sqlite+pysqlite://", creator=connecting(path, mode), poolclass=NullPool
    )
    with looking.connect() as connection:
        schema.refuse_foreign(connection)
        driver = connection.connection.driver_connection
        assert driver is not None
        return quick_check(driver)


def quick_check(driver: sqlite3.Connection) -> str:
    """The first defect in one line, `ok`: none was found within `CHECK_S`."""
    end = time.monotonic() + CHECK_S
    driver.set_progress_handler(lambda: time.monotonic() > end, STEPS)
    try:
        return str(driver.execute("PRAGMA quick_check(1)").fetchone()[0]).strip().replace("\n", " ")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorname == "SQLITE_INTERRUPT":
            return "ok"
        raise


def begin(path: Path) -> None:
    """Makes a new file, in SQLite's WAL mode, whole or not at all: an empty one is never ours.

    Of one that is there, what a killed process committed without waiting for the disk is made to
    last: SQLite would show it, and lose it.
    """
    if path.exists():
        for each in (path, path.with_name(path.name + "-wal")):
            with suppress(FileNotFoundError):
                sync(each)
        return
    draft = path.with_name(path.name + ".new")
    for leftover in (draft, draft.with_name(draft.name + "-journal")):
        leftover.unlink(missing_ok=True)
    made = sqlite3.connect(draft, isolation_level=None)
    try:
        made.execute("PRAGMA journal_mode=WAL")
    finally:
        made.close()
    draft.replace(path)
    with suppress(PermissionError):
        sync(path.parent)
