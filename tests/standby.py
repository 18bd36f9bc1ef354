"""Two PostgreSQL servers on loopback: a primary, and a synchronous standby that has every commit
before the primary confirms it.
"""

import asyncio
import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.servers import execute, free_port

STANDBY = "second"
SETTLE_S = 30.0


@dataclass(frozen=True, slots=True)
class Server:
    """One of the servers. `folder` has its data, its socket and its log."""

    binaries: Path
    folder: Path
    port: int
    owner: int | None  # the user of the process, because the server refuses to run as root

    def run(self, program: str, *arguments: str) -> None:
        with (self.folder / "output").open("ab") as output:
            done = subprocess.run(
                [str(self.binaries / program), *arguments],
                cwd=self.folder,
                env={"PATH": os.defpath, "LC_ALL": "C"},
                stdout=output,
                stderr=output,
                check=False,
                user=self.owner,
            )
        assert done.returncode == 0, f"{program}: {(self.folder / 'output').read_text()[-2000:]}"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def control(self, *arguments: str) -> None:
        self.run("pg_ctl", "-w", "-D", str(self.data), *arguments)

    def start(self) -> None:
        options = (
            f"-c listen_addresses=127.0.0.1 -c port={self.port} -c max_connections=100 -k"
            f" {self.folder}"
        )
        self.control("-l", str(self.folder / "log"), "-o", options, "start")

    def promote(self) -> None:
        self.control("promote")

    def kill(self) -> None:
        """Sends SIGKILL to all processes of the server at once, like a power cut."""
        leader = int((self.data / "postmaster.pid").read_text().split()[0])
        children = Path(f"/proc/{leader}/task/{leader}/children").read_text().split()
        for pid in (leader, *map(int, children)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    @property
    def running(self) -> bool:
        pid = self.data / "postmaster.pid"
        return pid.exists() and Path(f"/proc/{pid.read_text().split()[0]}").exists()


@contextlib.contextmanager
def server(binaries: Path) -> Iterator[Server]:
    """A server with a folder and a port, not started. The end of the block stops it if it runs."""
    folder = Path(tempfile.mkdtemp(prefix="darkroom-pg-"))
    owner = None
    if os.geteuid() == 0:
        accounts = {user.pw_name: user for user in pwd.getpwall()}
        owner = (accounts.get("postgres") or accounts["nobody"]).pw_uid
        os.chown(folder, owner, -1)
    made = Server(binaries, folder, free_port(), owner)
    try:
        yield made
    finally:
        if made.running:
            made.control("-m", "immediate", "stop")
        shutil.rmtree(folder)


@contextlib.contextmanager
def replicated(binaries: Path) -> Iterator[tuple[Server, Server]]:
    """The running primary and its synchronous standby."""
    with server(binaries) as primary, server(binaries) as standby:
        primary.run(
            "initdb",
            "-D",
            str(primary.data),
            "-U",
            "postgres",
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--locale=C",
            "--no-sync",
        )
        primary.start()
        source = f"host=127.0.0.1 port={primary.port} user=postgres application_name={STANDBY}"
        standby.run(
            "pg_basebackup", "-D", str(standby.data), "-d", source, "-R", "-c", "fast", "--no-sync"
        )
        standby.start()
        asyncio.run(
            execute(url(primary), f"ALTER SYSTEM SET synchronous_standby_names = '{STANDBY}'")
        )
        primary.control("reload")
        yield primary, standby


def url(*servers: Server, database: str = "postgres") -> str:
    """A URL with all the servers. The client connects to the server that accepts writes."""
    return f"postgresql://postgres@{','.join(each.address for each in servers)}/{database}"
