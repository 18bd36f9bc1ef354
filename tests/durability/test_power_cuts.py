"""The page cache survives a kill, so a kill alone shows nothing about power cuts. These tests
discard unsynced data after each kill.
"""

import asyncio
import hashlib
import json
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from service.errors import ConfigurationError
from service.resources import new_id
from tests.crash.life import TERMINAL
from tests.durability.disk import Disk
from tests.durability.promises import rows_of
from tests.durability.rounds import SEEDS, Rounds, run
from tests.durability.trace import SYNCS, moments, tracing
from tests.environment import clean_environment
from tests.stores import open_sqlite

pytestmark = pytest.mark.timeout(480)


@pytest.fixture(scope="module")
async def rounds(tmp_path_factory: pytest.TempPathFactory) -> Rounds:
    return await run(tmp_path_factory.mktemp("rounds"))


async def test_data_is_durable_before_a_message_about_it_leaves(rounds: Rounds) -> None:
    """When an answer, a submission, a delivery or an `image.stored` log line leaves the process,
    the data behind it is synced, with the names that lead to it.
    """
    assert [broken for watch in rounds.watches for broken in watch.broken] == []
    held = sum((watch.held for watch in rounds.watches), Counter[str]())
    done = sum(task["state"] == "completed" for task in rounds.tasks)
    for kind in ("tasks", "events", "submissions", "callbacks", "stored", "shown", "key"):
        assert held[kind] > done / 2 > 0, kind  # a process may die before it logs what it has done


async def test_the_trace_accounts_for_every_byte(rounds: Rounds) -> None:
    """With every unsynced write kept, the disk of the trace equals the real folder. No write
    bypasses the trace.
    """
    assert rounds.differing == []
    assert rounds.deaths == [-signal.SIGKILL] * len(SEEDS) + [0]


async def test_nothing_is_lost_or_doubled_when_the_power_fails(rounds: Rounds) -> None:
    """Each answered task exists and ends by the one callback that was answered. It has one terminal
    event, after complete images.
    """
    tasks = {task["id"]: task for task in rounds.tasks}
    assert rounds.answered <= tasks.keys()
    assert len(rounds.answered) > 0
    sent = Counter(key for keys in rounds.posts.values() for key in keys)
    assert sent.keys() <= tasks.keys()
    assert set(sent.values()) == {1}, "never submitted twice"
    for task in tasks.values():
        assert task["state"] == ("completed" if task["id"] in sent else "failed"), task
        assert task["error"] is None or task["error"]["code"] == "submission_uncertain"
    assert all(
        hashlib.sha256(content).hexdigest() == sha256 for sha256, content in rounds.pictures.items()
    )
    ends = Counter(event["subject"] for event in rounds.events if event["type"] in TERMINAL)
    assert ends == Counter(tasks.keys())
    assert [int(event["sequence"]) for event in rounds.events] == list(
        range(1, len(rounds.events) + 1)
    )
    assert set(rounds.received) == {event["id"] for event in rounds.events}, (
        "a promise from before the power failure still holds"
    )
    assert "Traceback" not in rounds.log


async def test_a_first_start_that_is_cut_off_is_done_again(rounds: Rounds, tmp_path: Path) -> None:
    """The power fails at any moment while the service creates its store. The next start opens what
    is left.
    """
    (tmp_path / "before").mkdir()
    disk, tossed, opened = Disk(tmp_path / "before"), random.Random(7), 0
    disk.root = str(rounds.folder / "disk")
    for moment in rounds.made:
        disk.observe(moment)
        if moment.done and moment.call.name in SYNCS and disk.find(disk.root + "/data/darkroom.db"):
            left = tmp_path / f"cut-{moment.line}"
            disk.lay(left, lambda: tossed.random() < 0.5)
            if not (left / "data").exists():
                continue
            try:
                async with open_sqlite(left / "data" / "darkroom.db", process="one", new_id=new_id):
                    opened += 1
            except ConfigurationError as error:
                pytest.fail(f"after line {moment.line}: {error}", pytrace=False)
            if opened == 12:
                break
    assert opened == 12


async def test_a_backup_vouches_for_what_lasts(rounds: Rounds, tmp_path: Path) -> None:
    """The power fails at any moment of `backup` or `restore`. Every file of a manifest exists, and
    so does every file that a restored database needs.
    """
    place = rounds.place
    pictures = len(list((place / "data" / "images").rglob("*.png")))
    assert pictures > 0

    async def left_by(command: str, data: str, last: str) -> list[dict[str, bytes]]:
        """The files that a power cut would leave, in each case with `last` among them."""
        disk, tossed = Disk(place), random.Random(7)
        program = [
            *tracing(tmp_path / command),
            sys.executable,
            "-m",
            "service",
            command,
            str(place / "kept"),
        ]
        environment = clean_environment(
            {
                "DARKROOM_DATA_DIR": str(place / data),
                "DARKROOM_ADMIN_KEY": "admin-key-of-the-backup",
            }
        )
        await asyncio.to_thread(
            subprocess.run,
            program,
            cwd=tmp_path,
            env=environment,
            check=True,
            capture_output=True,
            timeout=200,
        )
        found = []
        for moment in moments((tmp_path / command).read_text("ascii").splitlines(), {}):
            disk.observe(moment)
            if moment.done and disk.find(f"{place}/{last}"):
                found.append(disk.left(lambda: tossed.random() < 0.5))
        assert last in disk.left(), "done, so it lasts"
        return [files for files in found if last in files]

    for files in await left_by("backup", "data", "kept/manifest.json"):
        manifest = json.loads(files["kept/manifest.json"])
        assert manifest["files"].keys() == {"darkroom.db", "secret.key"}
        for name, told in manifest["files"].items():
            assert hashlib.sha256(files[f"kept/{name}"]).hexdigest() == told["sha256"]
        assert (
            manifest["images"]["count"]
            == sum(
                whole_picture(name, data)
                for name, data in files.items()
                if name.startswith("kept/")
            )
            > 0
        )
    for files in await left_by("restore", "restored", "restored/darkroom.db"):
        assert files["restored/secret.key"] == (place / "data" / "secret.key").read_bytes()
        assert (
            sum(
                whole_picture(name, data)
                for name, data in files.items()
                if name.startswith("restored/images/")
            )
            == pictures
        )
        assert "stored" in rows_of({"darkroom.db": files["restored/darkroom.db"]})


def whole_picture(name: str, data: bytes) -> bool:
    return name.endswith(".png") and hashlib.sha256(data).hexdigest() in name
