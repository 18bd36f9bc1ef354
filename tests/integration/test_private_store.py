"""The store keeps little, and only its own user reads it: modes of files, callback tokens, and the
bodies of submissions.
"""

import asyncio
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, select
from starlette.responses import Response

from service.cli import backup, restore
from service.db.tables import tasks
from service.signing import Keyring
from tests.api import UNTIL_DONE, got, submitted
from tests.logs import restored
from tests.upstream import Cut, Upstream, error
from tests.waiting import wait_until
from tests.world import World, world

SECRET = "0123456789abcdef0123456789abcdef"
OLD_SECRET = "fedcba9876543210fedcba9876543210"


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def modes(folder: Path) -> dict[str, str]:
    """The mode of the folder and of everything in it that others may use."""
    found = {}
    for path in (folder, *folder.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode != (0o700 if path.is_dir() else 0o600):
            found[str(path.relative_to(folder))] = f"{mode:o}"
    return found


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o027, 0o077, 0o777], ids="{:03o}".format)
async def test_only_its_own_user_reads_the_data_folder(tmp_path: Path, mask: int) -> None:
    """Folders have the mode 0700 and files 0600, whatever the umask: the database and its journal,
    the key and the images.
    """
    with umask(mask):
        async with world(tmp_path) as here:
            task = await submitted(here.client, UNTIL_DONE)
            assert len(task["images"]) == 1
            data = tmp_path / "data"
            names = {path.name for path in data.iterdir()}
            assert {"darkroom.db", "darkroom.db-wal", "secret.key", "images"} <= names
            assert modes(data) == {}


async def test_a_start_takes_an_existing_store_from_other_users(tmp_path: Path) -> None:
    """An earlier version left the folder and the database readable."""
    async with world(tmp_path):
        pass
    data = tmp_path / "data"
    data.chmod(0o755)
    (data / "darkroom.db").chmod(0o644)
    async with world(tmp_path):
        assert modes(data) == {}


async def test_a_folder_that_all_users_share_keeps_its_mode(tmp_path: Path) -> None:
    shared = tmp_path / "data"
    shared.mkdir()
    shared.chmod(0o1777)
    async with world(tmp_path):
        assert stat.S_IMODE(shared.stat().st_mode) == 0o1777
        assert stat.S_IMODE((shared / "darkroom.db").stat().st_mode) == 0o600


async def test_a_backup_and_its_restoration_are_private_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path) as here:
        await submitted(here.client, UNTIL_DONE)
    copy, back = tmp_path / "copy", tmp_path / "back"
    monkeypatch.chdir(tmp_path)
    commands: dict[str, Callable[[], None]] = {
        "data": lambda: backup.backup(copy, as_json=True),
        "back": lambda: restore.restore(copy, moved=True, as_json=True),
    }
    for folder, command in commands.items():
        monkeypatch.setenv("DARKROOM_DATA_DIR", str(tmp_path / folder))
        with umask(0o022), restored():
            await asyncio.to_thread(command)
    assert modes(copy) == modes(back) == {}


# --- what the store holds of a submission
# --------------------------------------------------------------------------------------------------


async def stored(here: World, task_id: str) -> tuple[str, bytes]:
    """State and body of a task's row."""

    def query(connection: Connection) -> tuple[str, bytes]:
        statement = select(tasks.c.state, tasks.c.body).where(tasks.c.id == task_id)
        row = connection.execute(statement).one()
        return row.state, row.body

    return await here.context.resources.store.read(query)


async def in_state(here: World, task_id: str, state: str) -> bytes:
    async def look() -> bool:
        return (await stored(here, task_id))[0] == state

    await wait_until(look)
    return (await stored(here, task_id))[1]


@pytest.fixture
def upstream() -> Upstream:
    made = Upstream()
    made.submits = {
        "refused": [error(422, "invalid_parameter")],
        "busy": [error(429, "rate_limit_exceeded")],
        "lost": [Cut()],
    }
    return made


async def test_the_body_of_a_submission_goes_with_its_last_use(
    tmp_path: Path, upstream: Upstream
) -> None:
    """It stays while the task may still be submitted, and goes when it is submitted, refused,
    cancelled or given up. `request` and the prompt stay for the owner.
    """
    async with world(tmp_path, upstream=upstream.app) as here:

        async def made(prompt: str, **headers: str) -> str:
            asked = {"model": "wan2.5-text-to-image", "prompt": prompt, "size": "768x768"}
            answer = await here.client.post(
                "/v1/images/generations", json=asked, headers={"prefer": "respond-async"} | headers
            )
            said = answer.json()  # the upstream may have refused it already
            return str(said["error"]["task_id"] if answer.is_error else said["id"])

        accepted, busy, lost = [await made(prompt) for prompt in ("fine", "busy", "lost")]
        refused = await made("refused", **{"idempotency-key": "one"})
        assert await in_state(here, accepted, "submitted") == b""
        assert await in_state(here, refused, "failed") == b""
        assert b'"prompt":"lost"' in await in_state(here, lost, "uncertain")
        assert b'"prompt":"busy"' in await in_state(here, busy, "queued")
        for task_id, path, body in ((busy, "cancel", None), (lost, "resolve", {"as": "failed"})):
            got(await here.client.post(f"/v1/tasks/{task_id}/{path}", json=body))
            assert (await stored(here, task_id))[1] == b""
        task = await here.task(accepted)
        assert (task["prompt"], task["request"]) == ("fine", {"size": "768x768"})
        # The same key and body still get the first answer.
        again = await here.client.post(
            "/v1/images/generations",
            json={"model": "wan2.5-text-to-image", "prompt": "refused", "size": "768x768"},
            headers={"idempotency-key": "one"},
        )
        assert (again.status_code, again.headers["idempotency-replayed"]) == (422, "true")


async def test_a_task_that_is_submitted_again_still_has_its_body(
    tmp_path: Path, upstream: Upstream
) -> None:
    """An operator decides `resubmit`. The upstream gets the same bytes."""
    upstream.submits["lost"] = [Cut(), Response(b'{"id": "u-1", "status": "pending"}')]
    async with world(tmp_path, upstream=upstream.app) as here:
        task_id = (await here.submit(prompt="lost", headers={"prefer": "respond-async"}))["id"]
        await in_state(here, task_id, "uncertain")
        got(await here.client.post(f"/v1/tasks/{task_id}/resolve", json={"as": "resubmit"}))
        assert await in_state(here, task_id, "submitted") == b""
        first, second = upstream.received["lost"]
        assert first.body == second.body
        assert here.callback_url(task_id).encode() in first.body


@pytest.mark.parametrize("secrets", [SECRET, f"{OLD_SECRET},{SECRET}"], ids=["one", "two"])
async def test_no_callback_token_is_in_the_store(
    tmp_path: Path, upstream: Upstream, secrets: str
) -> None:
    """Neither a waiting nor a submitted task has one, in no file of the store. The upstream gets
    it. A token of every key is looked for.
    """
    async with world(tmp_path, upstream=upstream.app, secret_key=secrets) as here:
        ids = {
            prompt: (await here.submit(prompt=prompt, headers={"prefer": "respond-async"}))["id"]
            for prompt in ("fine", "busy", "lost")
        }
        for prompt, state in (("fine", "submitted"), ("busy", "queued"), ("lost", "uncertain")):
            await wait_until(partial(upstream.received.get, prompt))
            await in_state(here, ids[prompt], state)
            sent = upstream.received[prompt][0].body
            assert here.callback_url(ids[prompt]).encode() in sent
    held = b"".join(path.read_bytes() for path in (tmp_path / "data").glob("darkroom.db*"))
    assert ids["busy"].encode() in held
    for task_id in ids.values():
        for secret in secrets.split(","):
            token = Keyring([secret.encode()]).callback_token("evolink", task_id)
            assert token.encode() not in held


async def test_a_new_first_key_changes_no_body_that_is_sent_again(
    tmp_path: Path, upstream: Upstream
) -> None:
    """The upstream would refuse another body under the same idempotency key."""
    options: dict[str, Any] = {"upstream": upstream.app, "uncertain_after_s": 600}
    async with world(tmp_path, secret_key=OLD_SECRET, **options) as here:
        task_id = (await here.submit(prompt="lost", headers={"prefer": "respond-async"}))["id"]
        await in_state(here, task_id, "uncertain")
        callback_url = here.settings.callback_url
    upstream.submits["lost"].append(Response(b'{"id": "u-1", "status": "pending"}'))
    options |= {"secret_key": f"{SECRET},{OLD_SECRET}", "callback_url": callback_url}
    async with world(tmp_path, **options) as here:
        got(await here.client.post(f"/v1/tasks/{task_id}/resolve", json={"as": "resubmit"}))
        await in_state(here, task_id, "submitted")
    first, second = upstream.received["lost"]
    assert first.body == second.body
