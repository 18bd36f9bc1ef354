"""The servers that some tests need: the server of an environment variable, or else the installed
binaries.
"""

import asyncio
import contextlib
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import parse_qs, urlsplit

import asyncpg
import pytest

INITDB = "-U postgres -A trust -E UTF8 --locale=C --no-sync"
MISSING = "no server: "  # prefix of every such skip, to count them


def free_port() -> int:
    """A port that no socket is bound to now."""
    with _bound_to_a_free_port() as bound:
        return int(bound.getsockname()[1])


def kept_port(stack: contextlib.ExitStack | contextlib.AsyncExitStack) -> int:
    """Reserves a port, so that no other process gets it while the service does not run. This
    process binds it, and the service can bind it too and listen on it.
    """
    bound = stack.enter_context(_bound_to_a_free_port())
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # from now on the service can
    return int(bound.getsockname()[1])


def _bound_to_a_free_port() -> socket.socket:
    """A socket bound without SO_REUSEADDR: with it, the kernel gives it a port that another test
    keeps. The port is below those of outgoing connections. Such a connection could take it from a
    server that is being started. The numbers do not follow the seed of the tests, which is the same
    in all their processes.
    """
    while True:
        bound = socket.socket()
        try:
            bound.bind(("127.0.0.1", random.SystemRandom().randrange(20_000, 32_000)))
        except OSError:
            bound.close()
        else:
            return bound


def missing(server: str, variable: str = "") -> NoReturn:
    """Skips the test at a desk. Fails it where CI is set, because CI must have the server or the
    program.
    """
    unset = f"{variable} is not set, and " if variable else ""
    said = f"{MISSING}{server} ({unset}the machine has no binaries of it)"
    if os.environ.get("CI"):
        pytest.fail(said, pytrace=False)
    pytest.skip(said)


def missing_counted(reports: Sequence[Any]) -> dict[str, int]:
    """The number of skipped tests by missing server."""
    counts: dict[str, int] = {}
    for report in reports:
        reason = (
            report.longrepr[2].removeprefix("Skipped: ")
            if isinstance(report.longrepr, tuple)
            else ""
        )
        if reason.startswith(MISSING):
            server = reason.removeprefix(MISSING).split(" (")[0]
            counts[server] = counts.get(server, 0) + 1
    return counts


# --- PostgreSQL
# --------------------------------------------------------------------------------------------------


def postgres_binaries() -> Path | None:
    """The folder of the newest server. Debian keeps each version in a folder outside of PATH."""
    versions = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/postgres")]
    if versions:
        return max(versions, key=lambda path: int(path.parent.name))
    found = shutil.which("postgres")
    return Path(found).resolve().parent if found else None


@dataclass(frozen=True, slots=True)
class PostgresServer:
    """A temporary server, durable with its default settings. `folder` has its data, its socket and
    its log, and belongs to the server's user. Without a `port` it listens on its socket alone.
    """

    binaries: Path
    folder: Path
    port: int | None = None

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def pid(self) -> int | None:
        file = self.data / "postmaster.pid"
        return int(file.read_text().split()[0]) if file.exists() else None

    def run(self, program: str, *arguments: str) -> None:
        """Runs a program of the server's. The test fails with its output if it fails."""
        output = self.folder / "output"
        with output.open("ab") as file:
            done = subprocess.run(
                [str(self.binaries / program), "-D", str(self.data), *arguments],
                cwd=self.folder,
                env={"PATH": os.defpath, "LC_ALL": "C"},
                stdout=file,
                stderr=file,
                check=False,
                user=self.folder.stat().st_uid if os.geteuid() == 0 else None,
            )
        if done.returncode:
            said = output.read_text()[-2000:]
            pytest.fail(f"{program} ended with {done.returncode}:\n{said}", pytrace=False)

    def control(self, *arguments: str) -> None:
        self.run("pg_ctl", "-w", "-t", "300", "-l", str(self.folder / "log"), *arguments)

    def create(self) -> None:
        self.run("initdb", *INITDB.split())

    def start(self) -> None:
        where = f"127.0.0.1 -c port={self.port}" if self.port else ""
        options = f"-c listen_addresses={where} -k {self.folder} -c max_connections=500"
        self.control("-o", options, "start")

    def kill(self) -> None:
        """Sends SIGKILL to all processes of the server at once, like a power cut."""
        leader = self.pid
        children = Path(f"/proc/{leader}/task/{leader}/children").read_text().split()
        for pid in map(int, (str(leader), *children)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def postgres_server(binaries: Path, port: int | None = None) -> Iterator[PostgresServer]:
    """A server that is not started. The end of the block stops it if it runs.

    The server refuses to run as root. Under root it therefore runs as `postgres` or `nobody`.
    """
    # short, because the path of a socket has at most 107 characters
    folder = Path(tempfile.mkdtemp(prefix="darkroom-pg-"))
    if os.geteuid() == 0:
        accounts = {user.pw_name: user for user in pwd.getpwall()}
        user = accounts.get("postgres") or accounts["nobody"]
        os.chown(folder, user.pw_uid, user.pw_gid)
    server = PostgresServer(binaries, folder, port)
    try:
        yield server
    finally:
        if Path(f"/proc/{server.pid}").exists():
            server.control("-m", "immediate", "stop")
        shutil.rmtree(folder)


@contextlib.contextmanager
def postgres_running(binaries: Path) -> Iterator[str]:
    """The URL of a running server on a Unix socket."""
    with postgres_server(binaries) as server:
        server.create()
        server.start()
        yield f"postgresql:///postgres?host={server.folder}&user=postgres"


def running_server(url: str) -> PostgresServer:
    """The server of such a URL."""
    binaries, folder = postgres_binaries(), Path(parse_qs(urlsplit(url).query)["host"][0])
    assert binaries is not None
    return PostgresServer(binaries, folder)


@contextlib.contextmanager
def postgres_database(server: str, template: str = "template1") -> Iterator[str]:
    """Creates a database on the server and yields its URL. It is empty, or a copy of `template`."""
    name = f"darkroom_{uuid.uuid4().hex}"
    asyncio.run(execute(server, f'CREATE DATABASE "{name}" TEMPLATE "{template}"'))
    try:
        parts = urlsplit(server)
        yield f"{parts.scheme}://{parts.netloc}/{name}" + (
            f"?{parts.query}" if parts.query else ""
        )  # geturl drops an empty //
    finally:
        asyncio.run(execute(server, f'DROP DATABASE "{name}" WITH (FORCE)'))


async def execute(url: str, statement: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()
