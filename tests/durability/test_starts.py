"""A start trusts no file that it finds, because its writer may have died before syncing it."""

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from service.folders import make_folder
from service.resources import new_id
from tests.durability.disk import Disk
from tests.durability.trace import moments, tracing
from tests.environment import clean_environment
from tests.stores import open_sqlite

OPEN = """
import asyncio, sys
from pathlib import Path
from service.db.sqlite import open_sqlite
from service.events.outbox import flush
from service.resources import new_id
from service.backends import secret_keys
from service.settings import load_settings

async def main():
    path = Path(sys.argv[1]) / "store" / "darkroom.db"
    async with open_sqlite(path, process="two", new_id=new_id, flush=flush):
        settings = load_settings({"DARKROOM_DATA_DIR": f"{sys.argv[1]}/data"}, None)
        print(len(secret_keys(settings)), flush=True)
        sys.stdin.read()

asyncio.run(main())
"""


async def test_what_a_killed_process_left_in_memory_lasts_before_anything_is_shown(
    tmp_path: Path,
) -> None:
    """The start syncs the store's file, its WAL and every name, the key's too, even when it has
    nothing to write.
    """
    place = tmp_path / "place"
    for folder in ("data", "store"):
        (place / folder).mkdir(parents=True)
    (place / "data" / "secret.key").write_text("k" * 64)
    async with open_sqlite(tmp_path / "one" / "darkroom.db", process="one", new_id=new_id):
        with closing(
            sqlite3.connect(tmp_path / "one" / "darkroom.db", isolation_level=None)
        ) as writer:
            writer.execute("INSERT INTO counters VALUES ('committed', 1)")
        for file in (tmp_path / "one").glob("darkroom.db*"):  # like the files after a kill
            (place / "store" / file.name).write_bytes(file.read_bytes())
    disk = Disk(place, trusted=False)
    assert disk.left() == {}
    command = [*tracing(tmp_path / "trace"), sys.executable, "-c", OPEN, str(place)]
    with (
        closing(sqlite3.connect(place / "store" / "darkroom.db", isolation_level=None)) as reader,
        subprocess.Popen(  # noqa: ASYNC220 - nothing else is going on
            command,
            env=clean_environment({}),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process,
    ):
        reader.execute("BEGIN").execute(
            "SELECT * FROM counters"
        )  # a backup under way keeps SQLite from a checkpoint
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        for moment in moments((tmp_path / "trace").read_text("ascii").splitlines(), {}):
            disk.observe(moment)
        process.communicate("")
    assert "data/secret.key" in disk.left(), "the content was synced before the file got this name"
    disk.lay(tmp_path / "after")
    with closing(sqlite3.connect(tmp_path / "after" / "store" / "darkroom.db")) as left:
        assert left.execute("SELECT value FROM counters WHERE name = 'committed'").fetchall() == [
            (1,)
        ]


def test_the_names_of_all_folders_that_lead_there_are_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new folder syncs each folder above it, up to the root of the file system. It skips a folder
    that it may not open.
    """
    synced: list[Path] = []

    def sync(path: Path) -> None:
        synced.append(path)
        if path == tmp_path:
            raise PermissionError

    monkeypatch.setattr("service.folders.sync", sync)
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path.parent)
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert synced == [tmp_path / "a" / "b", tmp_path / "a", tmp_path, tmp_path.parent]
