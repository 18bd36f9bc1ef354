"""Runs the commands of README and docs one after another, as the pages show them."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.checked_lines import check_command
from tests.docs.pages import FENCE, commands
from tests.docs.render import DOCS, README
from tests.docs.run_elsewhere import RUN_ELSEWHERE
from tests.environment import clean_environment
from tests.inputs import photo
from tests.known_secrets import SHOWING, watch
from tests.processes import UPSTREAM_KEY, sandbox, service_settings
from tests.servers import free_port, missing
from tests.terminals import COMMAND_S, quick_program

START_S, STOP_S = 90, 60
SERVER = re.compile(r"(?:env .*)?(?:darkroom|caddy) (serve|worker|sandbox|run)\b")
pytestmark = pytest.mark.timeout(300)

# The values that a page writes as …, printed by an earlier command.
SHOWN = {
    "dk_…": re.compile(r"\bdk_[a-z2-7]{40}"),
    "whsec_…": re.compile(r"\bwhsec_[A-Za-z0-9+/=]{20,}"),
    "file_…": re.compile(r"\bfile_[a-z2-7]{26}"),
    "img_…": re.compile(r"\bimg_[a-z2-7]{26}"),
    "task_…": re.compile(r"\btask_[a-z2-7]{26}"),
}


class Shell:
    """A user's terminals in one folder. Variables that a command exports stay for the next ones.

    `words` replaces addresses and ports of the pages with this test's own. `ports` has the port of
    each server, by its command.
    """

    def __init__(
        self, folder: Path, programs: Path, words: dict[str, str], ports: dict[str, int]
    ) -> None:
        self.folder, self.words, self.ports = folder, words, ports
        self._path = f"{programs}:{sys.prefix}/bin:{os.environ['PATH']}"
        self.output = ""
        self._servers: dict[int, subprocess.Popen[bytes]] = {}
        self._exported = folder / "exported.sh"
        self._exported.touch()
        (folder / ".venv").symlink_to(sys.prefix)

    def run(self, page: Path) -> None:
        for command in commands(page):
            if command not in RUN_ELSEWHERE:
                self.type(command)

    def type(self, command: str) -> None:
        for word, real in self.words.items():
            command = command.replace(word, real)
        if (server := SERVER.match(command)) is not None:
            self._serve(command, self.ports[server[1]])
        elif command.endswith("&"):
            self._start(command.removesuffix("&"), free_port())
        else:
            self._do(command)

    def _script(self, command: str) -> list[str]:
        return ["bash", "-c", f'set -e; . "{self._exported}"; {command}']

    def _do(self, command: str) -> None:
        keep = f'{command}\nexport -p > "{self._exported}"'
        done = subprocess.run(
            self._script(keep),
            cwd=self.folder,
            env=clean_environment({"PATH": self._path}),
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        self.output = done.stdout
        program, *words = command.split()
        check_command(words if program == "darkroom" else list(SHOWING), done.stdout, done.stderr)
        for word, pattern in SHOWN.items():
            if found := pattern.findall(done.stdout):
                self.words[word] = found[-1]

    def _serve(self, command: str, port: int) -> None:
        self.stop(port)
        self._start(f"exec {command}", port)
        ends = time.monotonic() + START_S
        while time.monotonic() < ends and self._servers[port].poll() is None:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                return
            time.sleep(0.05)
        pytest.fail(f"{command} does not listen: {self.log(port)}")

    def _start(self, command: str, port: int) -> None:
        file = self.folder / f"{port}.log"
        watch(str(file))
        with file.open("ab") as log:
            self._servers[port] = subprocess.Popen(
                self._script(command),
                cwd=self.folder,
                env=clean_environment({"PATH": self._path}),
                stdout=log,
                stderr=log,
            )

    def log(self, port: int) -> str:
        return (self.folder / f"{port}.log").read_text("utf-8")

    def stop(self, port: int) -> None:
        if (server := self._servers.pop(port, None)) is not None:
            server.send_signal(signal.SIGTERM)
            server.wait(STOP_S)

    def end(self) -> None:
        for port in list(self._servers):
            self.stop(port)


@contextmanager
def terminal(
    folder: Path, upstream: str, *, whole: bool = False, **settings: str
) -> Iterator[Shell]:
    """A shell whose `.env` lets a service run on loopback with that upstream. With `whole` it
    starts like a user's.
    """
    port = free_port()
    given = service_settings(upstream, folder, PORT=str(port), **settings)
    taken = ("EVOLINK_API_KEY", "CALLBACK_URL")  # the pages set these variables themselves
    (folder / ".env").write_text(
        "".join(
            f"{name}={value}\n"
            for name, value in given.items()
            if name.removeprefix("DARKROOM_") not in taken
        )
        + f"DARKROOM_URL=http://127.0.0.1:{port}\n"
    )
    words = {
        "sk-…": UPSTREAM_KEY,
        "127.0.0.1:8080": f"127.0.0.1:{port}",
        "https://darkroom.example": f"http://127.0.0.1:{port}",
        "https://hooks.example": f"http://127.0.0.1:{port}",
        "/backups/": f"{folder}/",
    }
    with quick_program(folder, whole=whole) as programs:
        shell = Shell(folder, programs, words, {"serve": port})
        try:
            yield shell
        finally:
            shell.end()


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with sandbox("--delay", "0.1", folder=tmp_path_factory.mktemp("upstream")) as running:
        yield running.address


def test_the_first_steps_of_the_readme(tmp_path: Path, upstream: str) -> None:
    """From an empty folder to images on disk and an event at the receiver of the README."""
    if shutil.which("curl") is None:
        missing("curl")
    receiver = free_port()
    (code,) = [code for language, code in FENCE.findall(README.read_text()) if language == "python"]
    (tmp_path / "receiver.py").write_text(code.replace("9000", str(receiver)))
    with terminal(tmp_path, upstream, whole=True) as shell:
        shell.words["127.0.0.1:9000"] = f"127.0.0.1:{receiver}"
        shell.run(README)
        assert len(list((tmp_path / "images").iterdir())) == 2
        assert "callback.received" in shell.log(shell.ports["serve"])
        shell.type("until darkroom deliveries list | grep delivered; do sleep 0.2; done")
        assert " delivered " in shell.output


def test_an_endpoint_is_created_as_the_page_says(tmp_path: Path, upstream: str) -> None:
    """The request in docs/consuming.md before its programs."""
    if shutil.which("curl") is None:
        missing("curl")
    with terminal(tmp_path, upstream) as shell:
        shell.words["https://shop.example"] = "http://127.0.0.1:9"
        shell.type("echo DARKROOM_EVOLINK_API_KEY=sk-… >> .env")
        shell.type("darkroom keys create --owner me --scopes subscribe")
        shell.type("export DARKROOM_API_KEY=dk_…")
        shell.type("darkroom serve")
        shell.run(DOCS / "consuming.md")
        assert '"secret":"whsec_' in shell.output


def test_a_picture_is_edited_as_the_page_says(tmp_path: Path, upstream: str) -> None:
    """docs/editing.md: uploads, tasks with one and with two input images, and a result fed back."""
    if shutil.which("curl") is None:
        missing("curl")
    (tmp_path / "photo.png").write_bytes(photo())
    with terminal(tmp_path, upstream) as shell:
        shell.type("echo DARKROOM_EVOLINK_API_KEY=sk-… >> .env")
        # Without callbacks each task would wait 3 s for its first query.
        shell.type("echo DARKROOM_CALLBACK_URL=https://darkroom.example >> .env")
        shell.type("darkroom keys create --owner me --scopes submit,read")
        shell.type("export DARKROOM_API_KEY=dk_…")
        shell.type("darkroom serve")
        shell.run(DOCS / "editing.md")
        assert len(list((tmp_path / "images").iterdir())) == 1
        shell.type("darkroom tasks --json")
        task, first, *_ = json.loads(shell.output)["data"]
        assert [each["id"] for each in task["inputs"]] == [first["images"][0]["id"]]


def test_a_backup_is_made_and_restored_as_the_page_says(tmp_path: Path, upstream: str) -> None:
    """docs/backup.md: the key that was made before the backup is there after it."""
    with terminal(tmp_path, upstream) as shell:
        shell.type("darkroom keys create --owner me --scopes submit")
        for command in commands(DOCS / "backup.md"):
            shell.type(command)
            if "backup" in command.split():
                shell.type("mv data gone")
        shell.type("darkroom keys list")
        assert "me" in shell.output.split()


def test_the_sandbox_runs_as_its_page_says(tmp_path: Path, upstream: str) -> None:
    """docs/sandbox.md: each command serves the upstream's API."""
    with terminal(tmp_path, upstream) as shell:
        shell.ports["sandbox"] = free_port()
        shell.words["8090"] = str(shell.ports["sandbox"])
        shell.run(DOCS / "sandbox.md")


def test_several_processes_run_as_the_page_says(
    tmp_path: Path, upstream: str, postgres_url: str
) -> None:
    """docs/operations.md: web and worker on one PostgreSQL store, and a task that ends."""
    with terminal(tmp_path, upstream) as shell:
        shell.ports["worker"] = free_port()
        shell.words |= {
            "postgresql://darkroom:…@db/darkroom": f"'{postgres_url}'",
            "SECRET_KEY=…": f"SECRET_KEY={'k' * 32}",
            "/srv/darkroom": str(tmp_path / "data"),
            "8081": str(shell.ports["worker"]),
        }
        shell.type("echo DARKROOM_EVOLINK_API_KEY=sk-… >> .env")
        shell.type("echo DARKROOM_CALLBACK_URL=https://darkroom.example >> .env")
        shell.run(DOCS / "operations.md")
        shell.type("darkroom keys create --owner me --scopes submit,read")
        shell.type("export DARKROOM_API_KEY=dk_…")
        shell.type("darkroom submit 'a lighthouse' --wait")
