"""What the command line gives to a submission, and how its failures look (docs/cli.md)."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from service.cli.submit_options import put_all
from tests.environment import ROOT, clean_environment
from tests.processes import Running, darkroom, started


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("dev")
    with started("serve", "--sandbox", "--json", "--port", "0", folder=folder) as running:
        yield running


@pytest.fixture
def client(dev: Running) -> Mapping[str, str]:
    return {"DARKROOM_URL": dev.address, "DARKROOM_API_KEY": dev.announcement["key"]}


def run(
    *arguments: str, stdin: bytes = b"", settings: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[bytes]":
    done = darkroom(*arguments, folder=ROOT, stdin=os.fsdecode(stdin), **(settings or {}))
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.encode(), done.stderr.encode()
    )


def submitted(client: Mapping[str, str], *arguments: str, stdin: bytes = b"") -> dict[str, Any]:
    done = run("submit", *arguments, "--json", stdin=stdin, settings=client)
    assert done.returncode == 0, done.stderr
    task: dict[str, Any] = json.loads(done.stdout)
    return task


@pytest.mark.parametrize("stdin", [b"a gull\n", b"  a gull", b"a gull\r\n"])
def test_a_dash_reads_the_prompt_from_standard_input(
    client: Mapping[str, str], stdin: bytes
) -> None:
    assert submitted(client, "-", stdin=stdin)["prompt"] == "a gull"


@pytest.mark.parametrize("stdin", [b"", b"\n \n", b"\xff\xfe"])
def test_standard_input_without_a_prompt_is_bad_usage(
    client: Mapping[str, str], stdin: bytes
) -> None:
    done = run("submit", "-", stdin=stdin, settings=client)
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"standard input" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (("--set", "seed=7"), "seed", 7),
        (("--no-prompt-extend",), "prompt_extend", False),
        (("--prompt-extend",), "prompt_extend", True),
    ],
)
def test_any_field_can_be_given(
    client: Mapping[str, str], arguments: tuple[str, ...], field: str, value: object
) -> None:
    assert submitted(client, "x", *arguments)["request"][field] == value


@pytest.mark.parametrize(
    ("texts", "fields"),
    [
        (["seed=7"], {"seed": 7}),
        (["style=flat"], {"style": "flat"}),
        (["big=NaN"], {"big": "NaN"}),
        (["a.b=true", "a.c=x"], {"a": {"b": True, "c": "x"}}),
        (["a=", "b=1=2"], {"a": "", "b": "1=2"}),
    ],
)
def test_a_field_is_json_or_text(texts: list[str], fields: object) -> None:
    assert put_all({}, texts, "--set") == fields


@pytest.mark.parametrize(
    ("arguments", "code", "exits"),
    [
        (("submit", "x", "--size", "10x10"), "invalid_parameter", 1),
        (("task", "task_unknown"), "task_not_found", 1),
        (("cancel", "task_unknown"), "task_not_found", 1),
        (("tasks", "--limit", "0"), "bad_usage", 2),
        (("resolve", "task_x"), "bad_usage", 2),
        (("nonsense",), "bad_usage", 2),
    ],
)
def test_an_error_is_json_with_json(
    client: Mapping[str, str], arguments: tuple[str, ...], code: str, exits: int
) -> None:
    done = run(*arguments, "--json", settings=client)
    assert (done.returncode, done.stdout) == (exits, b"")
    error = json.loads(done.stderr)["error"]
    assert error["code"] == code
    assert error.keys() == {"code", "message", "type", "param", "request_id", "task_id"}


def test_no_service_is_json_with_json() -> None:
    done = run("tasks", "--json", settings={"DARKROOM_URL": "http://127.0.0.1:9"})
    assert json.loads(done.stderr)["error"]["code"] == "service_unreachable"


def test_an_interrupted_wait_says_that_the_task_goes_on(client: Mapping[str, str]) -> None:
    """The line names the task and the command that shows it."""
    waiting = subprocess.Popen(
        [
            *(sys.executable, "-m", "service", "submit", "x", "--wait"),
            *("--set", 'sandbox={"delay": 60}', "--idempotency-key", "again"),
        ],
        env=clean_environment(client),
        stderr=subprocess.PIPE,
    )
    while not (known := json.loads(run("tasks", "--json", settings=client).stdout)["data"]) or not (
        known[0]["request"].get("sandbox")
    ):
        assert waiting.poll() is None
    os.kill(waiting.pid, signal.SIGINT)
    _, said = waiting.communicate(timeout=30)
    assert waiting.returncode == 130
    assert f"`darkroom task {known[0]['id']}`" in said.decode() or b"may have been taken" in said
    assert b"--idempotency-key again" in said


def test_acts_on_a_task(client: Mapping[str, str]) -> None:
    """A task is cancelled and erased by its own commands."""
    delay = ("--set", 'sandbox={"delay": 60}')
    task = submitted(client, "x", *delay)
    assert run("reconcile", task["id"], settings=client).returncode == 0
    refused = run("resolve", task["id"], "--as", "failed", settings=client)
    assert b"task_not_uncertain" in refused.stderr
    assert run("credits", settings=client).returncode == 0
    cancelled = run("cancel", task["id"], "--json", settings=client)
    assert cancelled.returncode == 0, cancelled.stderr
    ended = submitted(client, "y", "--wait")
    assert b"erased" in run("erase", ended["id"], settings=client).stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_its_completion(shell: str) -> None:
    script = run("completion", shell).stdout.decode()
    assert "_DARKROOM_COMPLETE" in script
    assert f"complete_{shell}" in script


def test_the_words_of_the_line_are_completed() -> None:
    asked = {"_DARKROOM_COMPLETE": "complete_bash", "COMP_WORDS": "darkroom end", "COMP_CWORD": "1"}
    command = [sys.executable, "-m", "service"]
    done = subprocess.run(command, env=clean_environment(asked), capture_output=True, check=True)
    assert done.stdout.split() == [b"endpoints"]


HEAVY = {
    *("aiohttp", "alembic", "asyncio", "cryptography", "httpx", "jinja2", "prometheus_client"),
    *("pydantic", "rich", "service.settings", "sqlalchemy", "starlette", "structlog", "uvicorn"),
}


@pytest.mark.parametrize(
    "line",
    [
        *("--help", "keys create --help", "tasks", "task {id}", "events", "models"),
        *("endpoints list", "deliveries list", "submit x", "estimate z-image-turbo", "usage"),
        "keys create --owner quick --scopes read",
    ],
)
def test_a_client_command_imports_nothing_heavy(client: Mapping[str, str], line: str) -> None:
    """Help takes 120 ms and a client command 300 ms on a quiet machine. The imports decide. The
    first page of help is a file.
    """
    words = line.split()
    if "{id}" in words:
        words[-1] = submitted(client, "x")["id"]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "service", *words],
        env=clean_environment({**client, "COVERAGE_PROCESS_START": ""}),
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {entry.rpartition("|")[2].strip() for entry in done.stderr.splitlines()}
    assert ("service.cli" in imported) == (line != "--help")
    assert imported & {*HEAVY, *(("typer",) if line == "--help" else ())} == set()


def test_the_commands_of_a_sandbox_work_as_pasted_from_any_folder(tmp_path: Path) -> None:
    """They name the program by its path, and set nothing for later commands of the terminal."""
    darkroom = Path(sys.executable).with_name("darkroom")
    settings = clean_environment({"DARKROOM_DATA_DIR": str(tmp_path), "PATH": os.defpath})
    serving = subprocess.Popen(
        [darkroom, "serve", "--sandbox", "--port", "0", "--fault", "format=webp"],
        env=settings,
        stdout=subprocess.PIPE,
    )
    with serving:
        lines = iter(serving.stdout or ())
        commands = [next(line for line in lines if line.startswith(b"or  "))[10:], next(lines)[10:]]
        said = b""
        for command in commands:
            assert b"export" not in command
            said += subprocess.check_output(["/bin/sh", "-c", command], env=settings, cwd="/")
        serving.terminate()
    assert said.splitlines()[0].endswith(b".webp")  # the fault of the command line
