"""`darkroom backup` beside a running service, and `darkroom restore`, with real processes and files
(docs/backup.md).
"""

import asyncio
import json
import os
import shutil
import signal
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.responses import Response

from service.cli.backup import summed
from service.db.file_lock import store_lock
from service.tasks.state import State
from service.upkeep.restoring import SEQUENCES
from tests.api import ASYNC, JSON, UNTIL_DONE, got, submitted
from tests.contract.subject import Clock, Subject, new_id
from tests.disks import BALLAST, empty, fill, small_disk
from tests.processes import ADMIN_KEY, darkroom, service_settings, started
from tests.stores import open_sqlite
from tests.upstream import After, Upstream, document, picture
from tests.waiting import wait_until
from tests.world import answering, world

# The process kills itself before rename number {number} of the restore.
KILLED = """
import os, signal, sys
number = [{number}]

def watch(event, arguments):
    if event == "os.rename" and (
        ".before-" in str(arguments[1]) or ".restoring-" in str(arguments[0])
    ):
        if number[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        number[0] -= 1

sys.addaudithook(watch)
"""
# The restore stops when it moves the key into place.
BROKEN = """
import sys

def watch(event, arguments):
    if event == "os.rename" and ".restoring-secret.key" in str(arguments[0]):
        raise {error}

sys.addaudithook(watch)
"""
PRICE = {"credits_reserved": 2}


def client_of(address: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=address, headers={"authorization": f"Bearer {ADMIN_KEY}"}, timeout=60
    )


async def command(
    *arguments: str, folder: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(darkroom, *arguments, folder=folder, **environment)


async def every(client: httpx.AsyncClient, path: str) -> list[JSON]:
    """Reads all pages of tasks or events."""
    documents: list[JSON] = got(await client.get(path, params={"limit": 1000}))["data"]
    return documents


async def pictures(client: httpx.AsyncClient, task: JSON) -> list[bytes]:
    answers = [await client.get(httpx.URL(link).path) for link in task["results"]]
    assert [answer.status_code for answer in answers] == [200] * len(answers)
    return [answer.content for answer in answers]


def ended(task: JSON) -> bool:
    return task["state"] in ("completed", "failed", "cancelled", "expired")


async def all_ended(client: httpx.AsyncClient) -> list[JSON] | None:
    known = await every(client, "/v1/tasks")
    return known if all(map(ended, known)) else None


async def test_a_backup_under_load_restores_to_a_service_that_pays_nothing_twice(
    tmp_path: Path,
) -> None:
    """Images are restored byte for byte, and sequences start beyond any that a client saw. The
    restored service repeats no submission that may have been made since, whatever UNCERTAIN says.
    """
    upstream, gate = Upstream(), asyncio.Event()
    for number in range(8):
        accepted = document("pending", id=f"task-unified-g{number}", usage=PRICE)
        upstream.submits[f"gated {number}"] = [After(gate.wait, accepted)]
    async with answering(upstream.app) as url:
        names = [f"task-unified-{number}" for number in range(1, 200)] + [
            f"task-unified-g{number}" for number in range(8)
        ]
        upstream.queries.update(
            {name: [document("completed", f"{url}/files/{name}")] for name in names}
        )
        upstream.files.update(
            {
                name: [Response(picture(shade=place % 256), media_type="image/png")]
                for place, name in enumerate(names)
            }
        )
        settings = service_settings(
            url, tmp_path, RECONCILE_AFTER_S="0.05", EVOLINK_CONCURRENCY="2", SUBMIT_SCHEDULE="0.05"
        )
        settings |= {"DARKROOM_CALLBACK_URL": "", "DARKROOM_EVOLINK_RESULT_HOSTS": "127.0.0.1"}
        with started("serve", folder=tmp_path, **settings) as service:
            async with client_of(service.address) as client:
                done = await asyncio.gather(
                    *(
                        submitted(client, UNTIL_DONE, prompt=f"early {number}")
                        for number in range(5)
                    )
                )
                assert {task["state"] for task in done} == {"completed"}
                gated = [
                    await submitted(client, ASYNC, prompt=f"gated {number}") for number in range(8)
                ]
                await wait_until(
                    lambda: sum(map(len, upstream.received.values())) >= 6
                )  # the rest waits, because few calls run at once
                load = asyncio.gather(
                    *(submitted(client, ASYNC, prompt=f"late {number}") for number in range(60))
                )
                made = await command("backup", "kept", "--json", folder=tmp_path, **settings)
                assert (made.returncode, made.stderr) == (0, "")
                await load
                gate.set()
                tasks = {
                    task["id"]: task for task in await wait_until(lambda: all_ended(client), 90)
                }
                assert {task["state"] for task in tasks.values()} == {"completed"}
                events = await every(client, "/v1/events")
                early = {task["id"]: await pictures(client, task) for task in done}
            service.process.kill()
            service.ended()
        manifest = json.loads(made.stdout)
        assert (manifest["served"], manifest["images"]["count"], manifest["images"]["lost"]) == (
            True,
            5,
            [],
        )
        assert manifest["tasks"] >= 13
        sent = {prompt: len(requests) for prompt, requests in upstream.received.items()}
        assert set(sent.values()) == {1}

        second = settings | {
            "DARKROOM_DATA_DIR": str(tmp_path / "second"),
            "DARKROOM_UNCERTAIN": "resubmit",
        }
        second |= {
            "DARKROOM_EVOLINK_CONCURRENCY": "16",
            "DARKROOM_UNCERTAIN_AFTER_S": "0.1",
            "DARKROOM_SUBMIT_GIVE_UP_S": "0.1",
        }
        back = await command("restore", "kept", "--json", folder=tmp_path, **second)
        assert (back.returncode, back.stderr) == (0, "")
        account = json.loads(back.stdout)
        assert account["uncertain"] >= 8
        assert account["set_aside"] == []
        with started("serve", folder=tmp_path, **second) as service:
            async with client_of(service.address) as client:
                again = {
                    task["id"]: task for task in await wait_until(lambda: all_ended(client), 90)
                }
                assert len(again) == manifest["tasks"]
                assert again.keys() <= tasks.keys()
                for task in gated:
                    assert again[task["id"]]["error"]["code"] == "submission_uncertain"
                for task_id, bytes_ in early.items():
                    assert await pictures(client, again[task_id]) == bytes_
                fresh = await submitted(client, UNTIL_DONE, prompt="after it")
                assert fresh["state"] == "completed"
                told = await every(client, "/v1/events")
        sequences = [int(event["sequence"]) for event in told]
        last = max(int(event["sequence"]) for event in events)
        new = [sequence for sequence in sequences if sequence > int(manifest["sequence"])]
        assert new[0] == int(account["events_go_on_after"]) + 1
        assert new[0] > int(manifest["sequence"]) + SEQUENCES
        assert new[0] > last
        assert len([event for event in told if event["data"]["id"] == gated[0]["id"]]) == 1
        sent["after it"] = 1
        assert {prompt: len(requests) for prompt, requests in upstream.received.items()} == sent


# --- refusals and options
# --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store (`data`) of one completed task that no process serves, and its backup
    (`kept`).
    """
    folder = tmp_path_factory.mktemp("kept")

    async def complete_one() -> None:
        async with world(folder) as made, made.owner("submit", "read") as client:
            await submitted(client, UNTIL_DONE)

    asyncio.run(complete_one())
    done = darkroom("backup", "kept", folder=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def folder(kept: Path, tmp_path: Path) -> Path:
    """A copy of `kept` for one test with nothing restored yet. The old store is in `old`."""
    shutil.copytree(kept / "kept", tmp_path / "kept")
    shutil.copytree(kept / "data", tmp_path / "old")
    return tmp_path


def refusal(folder: Path, *arguments: str, **environment: str) -> str:
    """The single line of a command that fails. It leaves nothing in the data folder but a lock."""
    done = darkroom(*arguments, folder=folder, **environment)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("darkroom: ")
    return line


def seen(place: Path) -> dict[str, bytes]:
    """Every file below a folder, except locks and empty files."""
    files = (path for path in place.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(place)): path.read_bytes() for path in files}


def manifest_of(folder: Path) -> Any:
    return json.loads((folder / "kept/manifest.json").read_text())


def test_a_backup_is_a_folder_for_its_owner_alone(folder: Path) -> None:
    """The folder has the database, the key, the images and a manifest. Only its owner can read the
    prompts and keys.
    """
    files = seen(folder / "kept")
    images = {name.removeprefix("images/") for name in files if name.startswith("images/")}
    assert files.keys() - {f"images/{name}" for name in images} == {
        "darkroom.db",
        "secret.key",
        "manifest.json",
    }
    assert files["secret.key"] == (folder / "old/secret.key").read_bytes()
    assert images == {name for name in seen(folder / "old/images") if not name.startswith(".")}
    for name in ("darkroom.db", "secret.key"):
        assert (folder / "kept" / name).stat().st_mode & 0o777 == 0o600
    manifest = manifest_of(folder)
    assert (
        manifest["format"],
        manifest["served"],
        manifest["tasks"],
        manifest["images"]["count"],
    ) == (1, False, 1, 1)


def test_a_restored_store_is_whole(folder: Path) -> None:
    """Images, the key with its mode, and tasks are restored. The command prints a line for each and
    leaves no other file.
    """
    done = darkroom("restore", "kept", folder=folder)
    assert done.returncode == 0, done.stderr
    assert "events_go_on_after" in done.stdout
    files = seen(folder / "data")
    assert {name: files[name] for name in files if name != "darkroom.db"} == {
        name: content
        for name, content in seen(folder / "kept").items()
        if name not in ("darkroom.db", "manifest.json")
    }
    assert (folder / "data/secret.key").stat().st_mode & 0o777 == 0o600
    with sqlite3.connect(folder / "data/darkroom.db") as connection:
        assert connection.execute("SELECT state FROM tasks").fetchall() == [("completed",)]
    connection.close()


def test_a_store_that_is_there_is_refused_or_set_aside(folder: Path) -> None:
    """The command never overwrites or deletes it. With --force every byte of the old store is kept
    beside the restored one.
    """
    (folder / "old").rename(folder / "data")
    before = seen(folder / "data")
    assert "is there already" in refusal(folder, "restore", "kept")
    assert seen(folder / "data") == before
    done = darkroom("restore", "kept", "--force", "--json", folder=folder)
    assert done.returncode == 0, done.stderr
    aside = json.loads(done.stdout)["set_aside"]
    assert len(aside) == 2
    found = {name: content for place in aside for name, content in seen(folder / place).items()}
    assert found == {name.removeprefix("images/"): content for name, content in before.items()}
    assert darkroom("keys", "list", folder=folder).returncode == 0


def test_a_restoration_that_is_killed_loses_nothing(folder: Path) -> None:
    """The process is killed before each of its renames. The next start has the whole old or the
    whole new store, or it tells the operator to restore again, and that restore succeeds.
    """
    states: list[str] = []
    left = True
    while left:
        (data := folder / f"data-{len(states)}").mkdir()
        shutil.copytree(folder / "old", data, dirs_exist_ok=True)
        before = set(seen(data).values())
        given = {"DARKROOM_DATA_DIR": str(data)}
        prelude = KILLED.format(number=len(states))
        done = darkroom("restore", "kept", "--force", folder=folder, prelude=prelude, **given)
        left = done.returncode == -signal.SIGKILL
        assert left or done.returncode == 0, done.stderr
        assert set(seen(data).values()) >= before, "nothing is overwritten"
        serving = darkroom("migrate", folder=folder, **given)
        states.append("whole" if serving.returncode == 0 else "refused")
        if serving.returncode:
            assert "a restoration was broken off" in serving.stderr
            again = darkroom("restore", "kept", "--force", folder=folder, **given)
            assert again.returncode == 0, again.stderr
            assert set(seen(data).values()) >= before
        with sqlite3.connect(data / "darkroom.db") as connection:
            assert connection.execute("SELECT state FROM tasks").fetchall() == [("completed",)]
        connection.close()
    assert states[0] == states[-1] == "whole"
    assert set(states) == {"whole", "refused"}


@pytest.mark.parametrize("reason", ["interrupted", "failed", "a damaged backup"])
def test_a_restoration_that_breaks_off_leaves_word_of_it(folder: Path, reason: str) -> None:
    """The restore ends between its renames, also a second time. No start creates an empty store."""
    data = folder / "data"
    (folder / "old").rename(data)
    if reason == "a damaged backup":  # an earlier restore was killed
        (data / "darkroom.db").unlink()
        (data / ".restoring-darkroom.db").mkdir()
        next((folder / "kept/images").rglob("*.png")).write_bytes(b"no picture")
    prelude = BROKEN.format(error="KeyboardInterrupt" if reason == "interrupted" else "OSError")
    done = darkroom("restore", "kept", "--force", folder=folder, prelude=prelude)
    assert done.returncode in (1, 130), done.stderr
    assert "a restoration was broken off" in refusal(folder, "migrate")
    assert not (data / "darkroom.db").exists()


def test_a_served_store_is_not_restored_over(folder: Path) -> None:
    """The process that holds the lock owns the store, even with --force."""
    (folder / "old").rename(folder / "data")
    with store_lock(folder / "data/darkroom.db") as alone:
        assert alone
        assert "another darkroom process uses" in refusal(folder, "restore", "kept", "--force")


def too_little(folder: Path) -> tuple[int, ...]:
    """Sizes in bytes that leave no room for the key, for the database, and for the image."""
    needed = sum(map(len, seen(folder / "kept").values()))
    return 0, needed // 3, needed - 8192


def make_room(disk: Path, room: int) -> None:
    fill(disk)
    os.truncate(disk / BALLAST, (disk / BALLAST).stat().st_size - room)


def test_a_full_disk_gets_no_backup(folder: Path, tmp_path: Path) -> None:
    """The command prints one line and leaves an empty folder, which the next backup accepts. The
    store does not change.
    """
    (folder / "old").rename(folder / "data")
    before = seen(folder / "data")
    with small_disk(tmp_path / "disk", 1) as disk:
        for room in too_little(folder):
            make_room(disk, room)
            refusal(folder, "backup", "disk/kept")
            assert seen(disk / "kept") == {}
        empty(disk)
        assert darkroom("backup", "disk/kept", folder=folder).returncode == 0
    assert seen(folder / "data") == before


def test_a_full_disk_gets_no_restored_store(folder: Path, tmp_path: Path) -> None:
    """The command prints one line. The existing store stays whole, and the next restore works as
    usual.
    """
    with small_disk(tmp_path / "disk", 2) as disk:
        shutil.copytree(folder / "old", disk / "data")
        before = seen(disk / "data")
        given = {"DARKROOM_DATA_DIR": str(disk / "data")}
        for room in too_little(folder):
            make_room(disk, room)
            refusal(folder, "restore", "kept", "--force", **given)
            assert seen(disk / "data") == before
        empty(disk)
        done = darkroom("restore", "kept", "--force", folder=folder, **given)
        assert done.returncode == 0, done.stderr
        assert set(seen(disk / "data").values()) >= set(before.values())


def spoil(name: str) -> Callable[[Path], None]:
    def act(kept: Path) -> None:
        path = next(kept.glob(name))
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.unlink()
        path.write_bytes(content)

    return act


def without(name: str) -> Callable[[Path], None]:
    return lambda kept: next(kept.glob(name)).unlink()


def with_manifest(**different: Any) -> Callable[[Path], None]:
    def act(kept: Path) -> None:
        path = kept / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | different))

    return act


def with_database(statement: str) -> Callable[[Path], None]:
    """Changes the database and its checksum in the manifest."""

    def act(kept: Path) -> None:
        connection = sqlite3.connect(kept / "darkroom.db")
        with connection:
            connection.execute(statement)
        connection.close()
        size, sha256 = summed(kept / "darkroom.db")
        files = json.loads((kept / "manifest.json").read_text())["files"]
        with_manifest(files={**files, "darkroom.db": {"bytes": size, "sha256": sha256}})(kept)

    return act


FAULTS = {
    "no manifest": (without("manifest.json"), "no whole backup"),
    "another manifest": (
        lambda kept: (kept / "manifest.json").write_text('{"format": 1}'),
        "no backup's manifest",
    ),
    "newer format": (with_manifest(format=2), "another version of darkroom"),
    "changed database": (spoil("darkroom.db"), "is not what the backup's manifest says"),
    "changed key": (spoil("secret.key"), "is not what the backup's manifest says"),
    "no key": (without("secret.key"), "secret.key"),
    "changed image": (spoil("images/*/*.*"), "is missing or damaged"),
    "no image": (without("images/*/*.*"), "is missing or damaged"),
    "newer schema": (
        with_database("UPDATE alembic_version SET version_num = '9999'"),
        "schema 9999 is newer",
    ),
    "another key's secrets": (
        with_database("UPDATE owners SET callback_secret = x'00'"),
        "no key of it decrypts",
    ),
    "a blob's name that leads out": (
        with_database("UPDATE images SET blob = '../../out.png'"),
        "no blob has a name like",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_backup_that_is_not_as_it_was_is_refused(folder: Path, fault: str) -> None:
    """The command fails with one line before it moves any file into place."""
    spoils, words = FAULTS[fault]
    spoils(folder / "kept")
    assert words in refusal(folder, "restore", "kept")
    assert seen(folder / "data") == {}


def test_an_image_that_the_store_itself_lost_does_not_stop_a_backup(folder: Path) -> None:
    """The backup is made and can be restored. The command still fails, so that an operator looks at
    it.
    """
    (folder / "old").rename(folder / "data")
    next((folder / "data/images").glob("*/*.*")).unlink()
    done = darkroom("backup", "less", "--json", folder=folder)
    assert done.returncode == 1
    assert "the backup is made, but 1 images" in done.stderr
    assert len(json.loads(done.stdout)["images"]["lost"]) == 1
    done = darkroom("restore", "less", folder=folder, DARKROOM_DATA_DIR=str(folder / "again"))
    assert done.returncode == 0, done.stderr


def test_an_unusable_store_is_not_backed_up(tmp_path: Path) -> None:
    """A missing, foreign or corrupt file, PostgreSQL, and a folder with files each get one line.
    The command leaves nothing in DIR and does not change the file.
    """
    (tmp_path / "data").mkdir()
    path = tmp_path / "data/darkroom.db"
    assert "there is no store" in refusal(tmp_path, "backup", "kept")
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE customers (name text)")
    connection.close()
    (tmp_path / "data/secret.key").write_text("k" * 40)
    for content in (
        path.read_bytes(),
        b"no database at all, but long enough to look at it twice" * 100,
    ):
        path.write_bytes(content)
        assert "cannot be copied" in refusal(tmp_path, "backup", "kept")
        assert (path.read_bytes(), seen(tmp_path / "kept")) == (content, {})
    (tmp_path / "kept/mine").write_text("mine")
    assert "is not empty" in refusal(tmp_path, "backup", "kept")
    assert seen(tmp_path / "kept") == {"mine": b"mine"}
    postgres = {
        "DARKROOM_DATABASE_URL": "postgresql://127.0.0.1/darkroom",
        "DARKROOM_SECRET_KEY": "k" * 40,
    }
    for name in ("backup", "restore"):
        assert "PostgreSQL" in refusal(tmp_path, name, "kept", **postgres)
    path.symlink_to(path.rename(tmp_path / "data/another.db"))
    assert "no file but a link" in refusal(tmp_path, "backup", "kept")


def test_a_damaged_store_is_not_called_a_backup(folder: Path) -> None:
    """A page of the live database is damaged. The command checks the copy and does not keep it."""
    path = folder / "old/darkroom.db"
    content = bytearray(path.read_bytes())
    content[4096 * 5 : 4096 * 40] = bytes(4096 * 35)
    path.write_bytes(content)
    line = refusal(folder, "backup", "another", DARKROOM_DATA_DIR=str(folder / "old"))
    assert "is damaged" in line or "cannot be copied" in line
    assert seen(folder / "another") == {}


async def test_a_store_that_moves_keeps_what_waits(tmp_path: Path) -> None:
    """With --moved queued tasks stay queued. The command rejects --moved for a backup that was made
    while a process served the store.
    """
    (tmp_path / "data").mkdir()
    (tmp_path / "data/secret.key").write_text("k" * 40)
    async with open_sqlite(tmp_path / "data/darkroom.db", process="one", new_id=new_id) as store:
        task_id = await Subject(store, Clock()).queued()
        assert (await command("backup", "served", folder=tmp_path)).returncode == 0
    assert (await command("backup", "kept", folder=tmp_path)).returncode == 0
    elsewhere = {"DARKROOM_DATA_DIR": str(tmp_path / "elsewhere")}
    assert "--moved" in await asyncio.to_thread(
        refusal, tmp_path, "restore", "served", "--moved", **elsewhere
    )
    moved = await command("restore", "kept", "--moved", "--json", folder=tmp_path, **elsewhere)
    assert json.loads(moved.stdout)["uncertain"] == 0, moved.stderr
    async with open_sqlite(
        tmp_path / "elsewhere/darkroom.db", process="one", new_id=new_id
    ) as store:
        assert await Subject(store, Clock()).state(task_id) is State.QUEUED
