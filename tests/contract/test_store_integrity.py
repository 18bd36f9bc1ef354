"""Which database files the store accepts. It refuses a foreign or damaged file in one line and
leaves every byte as it is.
"""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from service.errors import ConfigurationError
from service.tasks.accept import insert_tasks
from tests.contract.subject import Clock, Opener, Subject, new_id
from tests.stores import open_sqlite


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link(path: Path) -> None:
    path.symlink_to(path.rename(path.with_name("elsewhere.db")))


def link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("unmounted") / path.name)


def text_file(path: Path) -> None:
    path.write_text("dear diary\n" * 1000)


def no_bytes(path: Path) -> None:
    path.write_bytes(b"")


def one_byte(path: Path) -> None:
    path.write_bytes(b"S")


def only_zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def cut_in_a_page(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2 - 100)


def random_middle(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 4)
        file.write(os.urandom(path.stat().st_size // 2))


def random_head(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(os.urandom(4096))


def customers(path: Path) -> sqlite3.Connection:
    path.unlink()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("CREATE TABLE customers (name text)")
    connection.commit()
    return connection


def foreign(path: Path) -> None:
    customers(path).close()


def foreign_killed(path: Path) -> None:
    """The file of another program that was killed. Its last transaction is only in the WAL."""
    connection = customers(path)
    for name in (path.name, f"{path.name}-wal"):
        shutil.copy(path.with_name(name), path.with_name(f"{name}.kept"))
    connection.close()
    for name in (path.name, f"{path.name}-wal"):
        path.with_name(f"{name}.kept").replace(path.with_name(name))


def killed_in_a_transaction(path: Path, statement: str) -> None:
    """Kills a program while it writes with SQLite's rollback journal. The file holds half of the
    transaction, and the journal holds the pages from before it.
    """
    script = f"""if True:
        import os, sqlite3
        connection = sqlite3.connect({str(path)!r}, isolation_level=None)
        for each in ("PRAGMA journal_mode=DELETE", "PRAGMA cache_size=1", "BEGIN"):
            connection.execute(each)
        for number in range(3000):
            connection.execute({statement!r}, ["x" * 500 + str(number)])
        os.kill(os.getpid(), 9)
    """
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    assert path.with_name(f"{path.name}-journal").stat().st_size


def foreign_killed_as_it_wrote(path: Path) -> None:
    customers(path).close()
    killed_in_a_transaction(path, "INSERT INTO customers VALUES (?)")


def ours_beside_a_foreign_journal(path: Path) -> None:
    """The journal does not name its database. SQLite would write the other database's pages into
    ours.
    """
    kept = path.rename(path.with_name("kept"))
    path.touch()
    foreign_killed_as_it_wrote(path)
    kept.replace(path)


def ours_beside_a_foreign_wal(path: Path) -> None:
    kept = path.rename(path.with_name("kept"))
    path.touch()
    foreign_killed(path)
    kept.replace(path)


def gone_but_for_its_wal(path: Path) -> None:
    path.with_name(f"{path.name}-wal").write_bytes(os.urandom(10_000))
    path.write_bytes(b"")


def gone_but_for_its_journal(path: Path) -> None:
    ours_beside_a_foreign_journal(path)
    path.unlink()


def contents(folder: Path) -> dict[str, bytes]:
    """The files that hold data, without an empty WAL that SQLite adds beside a file that it
    reads.
    """
    files = (path for path in folder.iterdir() if not path.name.endswith((".lock", "-shm", "-wal")))
    found = {
        path.name: b"%o " % path.lstat().st_mode + (path.read_bytes() if path.is_file() else b"")
        for path in files
    }
    wal = folder / "darkroom.db-wal"
    return found | ({wal.name: wal.read_bytes()} if wal.exists() and wal.stat().st_size else {})


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (folder, "is no file"),
        (pipe, "is no file"),
        (link, "is no file"),
        (link_to_nothing, "is no file"),
        (text_file, "file is not a database"),
        (no_bytes, "is empty, which no store is"),
        (one_byte, "is empty, which no store is"),
        (only_zeros, "is damaged"),
        (cut, "is damaged"),
        (cut_in_a_page, "is damaged"),
        (random_middle, "is damaged"),
        (random_head, "file is not a database"),
        (foreign, "tables that are not darkroom's"),
        (foreign_killed, "tables that are not darkroom's"),
        (foreign_killed_as_it_wrote, "an unfinished transaction"),
        (ours_beside_a_foreign_journal, "an unfinished transaction"),
        (ours_beside_a_foreign_wal, "tables that are not darkroom's"),
        (gone_but_for_its_wal, "is missing or empty"),
        (gone_but_for_its_journal, "is missing or empty"),
    ],
)
async def test_a_foreign_or_damaged_file_is_refused(
    spoil: Callable[[Path], None], reason: str, sqlite_opener: Opener, clock: Clock, tmp_path: Path
) -> None:
    """One line says why. No byte changes, also at the second try."""
    path = tmp_path / "darkroom.db"
    async with sqlite_opener() as store:
        await Subject(store, clock).batch(
            insert_tasks, [Subject(store, clock).wish() for _ in range(50)]
        )
    spoil(path)
    before = contents(tmp_path)
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=reason) as refused:
            async with open_sqlite(path, process="one", new_id=new_id):
                pass
        assert "\n" not in str(refused.value)
        assert contents(tmp_path) == before


async def test_a_start_that_was_killed_at_once_leaves_no_empty_file(tmp_path: Path) -> None:
    """The file appears whole. The draft of a killed start is no obstacle."""
    path = tmp_path / "darkroom.db"
    path.with_name("darkroom.db.new").write_bytes(b"half of a draft")
    for _ in range(2):
        async with open_sqlite(path, process="one", new_id=new_id):
            pass
    assert sorted(child.name for child in tmp_path.iterdir()) == ["darkroom.db", "darkroom.db.lock"]


@pytest.mark.parametrize("name", ["what? 100% #1.db", "äöü.db", "a&mode=memory.db"])
async def test_any_file_name_is_used_as_it_is(name: str, tmp_path: Path, clock: Clock) -> None:
    """The store escapes characters that have a meaning in a URL."""
    async with open_sqlite(tmp_path / name, process="one", new_id=new_id) as store:
        await Subject(store, clock).queued()
    assert (tmp_path / name).stat().st_size > 4096
