"""Darkroom as processes, started like a user starts it."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO

from tests.checked_lines import check_command, check_line, check_text
from tests.environment import START_S, STOP_S, clean_environment
from tests.known_secrets import know
from tests.launcher import Forked, shared_launcher

ADMIN_KEY = "admin-key-of-the-tests"
UPSTREAM_KEY = "sk-upstream"
LOOPBACK = "127.0.0.0/8"


def forked(
    arguments: Sequence[str],
    folder: Path,
    stdout: Path,
    stderr: Path,
    environment: Mapping[str, str],
    prelude: str = "",
    stdin: Path = Path(os.devnull),
) -> Forked:
    """Starts a command of the program in a process of its own. Its output goes to the
    named files.
    """
    launcher, environment = shared_launcher(coverage=True), clean_environment(environment)
    pid = launcher.start(
        arguments, folder, environment, str(stdout), str(stderr), prelude, str(stdin)
    )
    return Forked(launcher, pid)


def darkroom(
    *arguments: str, folder: Path, prelude: str = "", stdin: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command of the program in `folder` until it ends, after the Python text `prelude`."""
    with TemporaryDirectory() as place:
        given, out, err = (Path(place) / name for name in ("in", "out", "err"))
        given.write_bytes(os.fsencode(stdin))
        process = forked(arguments, folder, out, err, environment, prelude, given)
        try:
            code = process.wait(STOP_S)
        finally:
            process.kill()
        done = ["darkroom", *arguments], code, out.read_text(), err.read_text()
        check_command(arguments, *done[2:])
        return subprocess.CompletedProcess(*done)


class Running:
    """A command that serves, under the command in `before` or after the Python text `prelude` if
    there is one, but not both. `address` is the URL that it announced, and `lines` is its output
    so far, both streams.
    """

    def __init__(
        self,
        *arguments: str,
        folder: Path,
        before: Sequence[str] = (),
        prelude: str = "",
        **environment: str,
    ) -> None:
        self.lines: list[str] = []
        self._folder = folder
        self._events: dict[Any, list[dict[str, Any]]] = {}
        self.announcement: dict[str, Any] = {}
        self._told = threading.Event()
        self.process: Forked | subprocess.Popen[str]
        assert not (prelude and (before or "PYTHONPATH" in environment)), "no fork runs it"
        if before or "PYTHONPATH" in environment:  # another program, or another version of Darkroom
            self.process = subprocess.Popen(
                [*before, sys.executable, "-m", "service", *arguments],
                cwd=folder,
                env=clean_environment(environment),
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            assert self.process.stdout is not None
            self._output: TextIO = self.process.stdout  # type: ignore[assignment]
        else:
            with TemporaryDirectory() as place:
                pipe = Path(place) / "output"
                os.mkfifo(pipe)
                self.process = forked(arguments, folder, pipe, pipe, environment, prelude)
                self._output = pipe.open()  # waits until the process has opened its end
        self._reader = threading.Thread(
            target=self._read,
            args=("sandbox" in arguments or {"--sandbox", "--json"} <= set(arguments),),
            daemon=True,
        )
        self._reader.start()

    def _read(self, plain: bool) -> None:
        """Reads the output up to the address. With `plain` (`--json`) the address has a line of its
        own, otherwise the log line `service.started` contains it.
        """
        event = None if plain else "service.started"
        for line in self._output:
            whole = line.startswith("{") and line.endswith("\n")  # not cut off by a kill
            said = json.loads(line) if whole else {}
            self._events.setdefault(said.get("event"), []).append(said)
            self.lines.append(line.rstrip("\n"))
            check_line(line)
            if "address" in said and said.get("event") == event:
                self._know_key()
                self.announcement = said
                self._told.set()
        self._told.set()

    def _know_key(self) -> None:
        """The key that the service made at its start."""
        if (file := self._folder / "data" / "secret.key").exists():
            know(file.read_text())
            check_text("\n".join(self.lines[:-1]))

    @property
    def address(self) -> str:
        assert self._told.wait(START_S), self.lines
        assert self.announcement, self.lines
        told = str(self.announcement["address"])
        return told if told.startswith("http") else f"http://{told}"

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def ended(self) -> int:
        """Waits for the end and returns the exit code."""
        code = self.process.wait(STOP_S)
        self._reader.join(STOP_S)
        self._output.close()
        return code

    def logged(self, event: str) -> list[dict[str, Any]]:
        return list(self._events.get(event, ()))


@contextmanager
def started(
    *arguments: str, folder: Path, prelude: str = "", **environment: str
) -> Iterator[Running]:
    """A command that serves and has announced its address. The end of the block kills it if it
    still runs.
    """
    running = Running(*arguments, folder=folder, prelude=prelude, **environment)
    try:
        assert running.address
        yield running
    finally:
        if running.process.poll() is None:
            running.process.kill()
        running.ended()


@contextmanager
def sandbox(*arguments: str, folder: Path) -> Iterator[Running]:
    """The sandbox as a process that may call back to loopback."""
    options = (
        "--json",
        "--port",
        "0",
        "--api-key",
        UPSTREAM_KEY,
        "--allow-networks",
        LOOPBACK,
        "--no-fetch-inputs",  # tests have no internet
        *arguments,
    )
    with started("sandbox", *options, folder=folder) as running:
        yield running


def service_settings(upstream: str, folder: Path, **more: str) -> dict[str, str]:
    """The environment of a service that uses the given upstream, all on loopback."""
    settings = {
        "PORT": "0",
        "DATA_DIR": str(folder / "data"),
        "ADMIN_KEY": ADMIN_KEY,
        "CALLBACK_URL": "http://127.0.0.1:{port}",
        "EVOLINK_BASE_URL": upstream,
        "EVOLINK_API_KEY": UPSTREAM_KEY,
        "EVOLINK_RESULT_HOSTS": "127.0.0.1",
        "UPSTREAM_NETWORKS": LOOPBACK,
        "ENDPOINT_NETWORKS": LOOPBACK,
        "TASK_CALLBACK_NETWORKS": LOOPBACK,
        "MIN_FREE_BYTES": "0",
        "STOP_S": "10",
    }
    return {f"DARKROOM_{name}": value for name, value in (settings | more).items()}
