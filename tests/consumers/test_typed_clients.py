"""Runs the commands and the typed programs of docs/clients.md unchanged at a real service."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.api import SUBMIT, got, order, refused
from tests.consumers.programs import node, running, written
from tests.consumers.test_receivers import events, forgeries, reading, signed, told
from tests.environment import ROOT
from tests.servers import free_port
from tests.waiting import wait_until
from tests.world import world

DOCUMENT = ROOT / "docs" / "clients.md"
COMMANDS_S = 200


@dataclass(frozen=True, slots=True)
class Language:
    """`misspelled`: wrong texts by the right ones that they replace in the program."""

    source: str
    program: str
    misspelled: tuple[tuple[str, str], ...]
    refusal: str

    @property
    def commands(self) -> str:
        """The commands of the document that make the types and check the program."""
        (found,) = (block for block in blocks() if self.source in block)
        return found


def blocks() -> list[str]:
    """The document's blocks of commands."""
    return re.findall(r"^```sh\n(.*?)^```$", DOCUMENT.read_text("utf-8"), re.MULTILINE | re.DOTALL)


PYTHON = Language(
    "typed_client.py",
    "typed_client.py",
    (
        ('"prompt":', '"promt":'),
        ('print(task["id"], task["status"]', 'print(task["id"], task["statu"]'),
        ('task["id"], task["status"], flush', 'task["id"], task["stat"], flush'),
        ('event["id"]', 'event["identity"]'),
    ),
    r"^wrong_client\.py:\d+: error: .*{}",
)
TYPESCRIPT = Language(
    "typed_client.mts",
    "typed_client.mjs",
    (
        ("{ model:", "{ modle:"),
        ("console.log(task.id, task.status", "console.log(task.id, task.statu"),
        ("task.id, task.status);", "task.id, task.stat);"),
        ("(event.id", "(event.identity"),
    ),
    r"^wrong_client\.mts\(\d+,\d+\): error TS\d+: .*{}",
)


def shell(folder: Path, commands: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["sh", "-ec", commands],
        cwd=folder,
        env={"PATH": path, "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=COMMANDS_S,
        check=False,
    )


@pytest.fixture(scope="module", params=[PYTHON, TYPESCRIPT], ids=["python", "typescript"])
def language(request: pytest.FixtureRequest) -> Language:
    chosen: Language = request.param
    if chosen is TYPESCRIPT:
        node()
    return chosen


@pytest.fixture(scope="module")
def folder(language: Language, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of the document, and the types that its commands made. The checker that is the
    last command accepts the program.
    """
    made = tmp_path_factory.mktemp("typed")
    written(made, document=DOCUMENT)
    done = shell(made, language.commands)
    assert done.returncode == 0, done.stdout + done.stderr
    return made


def test_a_checker_refuses_a_misspelled_field(language: Language, folder: Path) -> None:
    """A field of a submission, of a task, and of an event and its task."""
    text = (folder / language.source).read_text("utf-8")
    for right, wrong in language.misspelled:
        assert text.count(right) == 1, right
        text = text.replace(right, wrong)
    wrong_source = language.source.replace("typed", "wrong")
    (folder / wrong_source).write_text(text, "utf-8")
    *_, check = language.commands.splitlines()
    done = shell(folder, check.replace(language.source, wrong_source))
    assert done.returncode != 0
    for right, wrong in language.misspelled:
        (name,) = set(re.findall(r"\w+", wrong)) - set(re.findall(r"\w+", right))
        pattern = re.compile(language.refusal.format(rf"\b{name}\b"), re.MULTILINE)
        assert pattern.search(done.stdout), (name, done.stdout)


async def test_a_typed_program_submits_waits_receives_and_verifies(
    language: Language, folder: Path, tmp_path: Path
) -> None:
    """It submits once under its key, sees the end and the images of its task, takes both events of
    the endpoint, and refuses forged ones.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}/hooks"
    async with world(tmp_path) as here, here.owner() as client:
        secret = got(await client.post("/v1/endpoints", json={"url": url}), 201)["secret"]
        settings = {**reading(client), "SECRET": secret}
        with running(folder, language.program, settings, port) as program:
            await wait_until(lambda: any(line.startswith("task_") for line in program.lines), 90)
            (task,) = got(await client.get("/v1/tasks"))["data"]
            assert task["state"] == "completed"
            assert " ".join([task["id"], "completed", *task["results"]]) in program.lines
            sent = await told(client, task)
            heard = {
                f"{event['id']} {event['type']} {task['id']} {event['data']['status']}"
                for event in await events(client)
            }
            assert len(sent) == len(heard) == 2
            await wait_until(lambda: heard <= set(program.lines))
            event = json.dumps((await events(client))[0]).encode()
            forged = {
                **forgeries(secret),
                "an event with a wrong signature": (
                    event,
                    signed("whsec_" + "A" * 32, event, time.time()),
                ),
            }
            async with httpx.AsyncClient(trust_env=False) as anybody:
                for name, (body, headers) in forged.items():
                    wire = [(key.encode(), value.encode()) for key, value in headers.items()]
                    answer = await anybody.post(url, content=body, headers=wire)
                    assert answer.status_code == 401, name
            assert len(program.lines) == 1 + len(heard)
        again = await client.post(SUBMIT, json=order(), headers={"Idempotency-Key": "order-7"})
        refused(again, 409, "idempotency_conflict", param="Idempotency-Key", task_id=task["id"])


def test_the_document_has_no_commands_and_no_program_that_are_not_run(tmp_path: Path) -> None:
    assert blocks() == [PYTHON.commands, TYPESCRIPT.commands]
    written(tmp_path, document=DOCUMENT)
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {PYTHON.source, TYPESCRIPT.source, "node_modules"}
