"""Runs the programs of the documentation unchanged, as a reader who copied them would."""

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.environment import ROOT, clean_environment
from tests.servers import missing
from tests.waiting import wait_until

DOCUMENT = ROOT / "docs" / "consuming.md"
BLOCK = re.compile(
    r"^```(?:python|js|ts)\n((?:#|//) (\w+\.(?:py|mjs|mts))\b.*?)^```$", re.MULTILINE | re.DOTALL
)
LIBRARIES = {
    "standardwebhooks": {},
    "svix": {
        "from standardwebhooks import": "from svix.webhooks import",
        'from "standardwebhooks"': 'from "svix"',
    },
}
MODULES = Path(sys.prefix) / "node" / "node_modules"
SERVERS = {
    "with_starlette.py": (
        "-m",
        "uvicorn",
        "--log-level",
        "warning",
        "with_starlette:app",
        "--port",
    ),
    "with_fastapi.py": ("-m", "uvicorn", "--log-level", "warning", "with_fastapi:app", "--port"),
    "with_flask.py": ("-m", "flask", "--app", "with_flask", "run", "--port"),
}
STOP_S = 60


def node() -> str:
    """Node.js, with the packages that `make` fetches."""
    program = shutil.which("node")
    return (
        program
        if program and MODULES.is_dir()
        else missing("Node.js and the packages of tests/consumers")
    )


def written(folder: Path, library: str = "standardwebhooks", document: Path = DOCUMENT) -> None:
    """Writes every program of a document to a file, with the library that verifies."""
    for text, name in BLOCK.findall(document.read_text("utf-8")):
        for before, after in LIBRARIES[library].items():
            text = text.replace(before, after)  # noqa: PLW2901 - the same text
        (folder / name).write_text(text, "utf-8")
    with suppress(FileExistsError):
        (folder / "node_modules").symlink_to(MODULES)


def command(program: str, port: int) -> list[str]:
    """The command with which the document starts a program."""
    if program.endswith(".mjs"):
        return [node(), program]
    if program in SERVERS:
        return [sys.executable, *SERVERS[program], str(port)]
    return [sys.executable, program]


def quick(program: str, port: int) -> str:
    """Python that runs a program as its command does, but in a process that has the imports."""
    words = command(program, port)[1:]
    if words[0] == "-m":
        run, arguments = f"run_module({words[1]!r}, run_name='__main__', alter_sys=True)", words[1:]
    else:
        run, arguments = f"run_path({program!r}, run_name='__main__')", words
    return f"import runpy, sys; sys.path[:0] = ['']; sys.argv = {arguments!r}; runpy.{run}; exit()"


class Running:
    """A program in the folder of its file. Its error stream goes to a file `….faults`."""

    def __init__(
        self, folder: Path, program: str, environment: Mapping[str, str], port: int = 0
    ) -> None:
        own = {
            name: value
            for name, value in clean_environment(environment).items()
            if not name.startswith("COVERAGE_")
        }
        self.lines: list[str] = []
        with (folder / f"{program}.faults").open("ab") as faults:
            self.process = subprocess.Popen(
                command(program, port),
                cwd=folder,
                env=own | {"PORT": str(port)},
                text=True,
                stdout=subprocess.PIPE,
                stderr=faults,
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(line.rstrip("\n") for line in self.process.stdout)

    @property
    def taken(self) -> list[str]:
        """The ids of the events that were new to the program, in the order of its output."""
        return [line.split()[0] for line in self.lines if line.startswith("evt_")]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(STOP_S)
        self._reader.join(STOP_S)
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextmanager
def running(
    folder: Path, program: str, environment: Mapping[str, str], port: int = 0
) -> Iterator[Running]:
    made = Running(folder, program, environment, port)
    try:
        yield made
    finally:
        made.kill()


async def listening(port: int) -> None:
    """Waits until a receiver answers at the port."""

    def connected() -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
        return False

    await wait_until(connected, 90)


def judged(script: str, said: str, folder: Path) -> str:
    """Returns what a script of this folder answers to a text."""
    shutil.copy(Path(__file__).parent / script, folder)
    with suppress(FileExistsError):
        (folder / "node_modules").symlink_to(MODULES)
    environment = {"PATH": os.environ["PATH"]}
    done = subprocess.run(
        [node(), script],
        cwd=folder,
        env=environment,
        input=said,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
