"""The servers that some tests need: the server of an environment variable, or else the installed
binaries.
"""

import asyncio
import contextlib
import os
import pwd
import random
import shutil
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import asyncpg
import pytest

MISSING = "no server: "  # prefix of every such skip, to count them


def free_port() -> int:
    """A port that is free now, below those that the kernel gives to outgoing connections. Such a
    connection could take the port of a server that is being started. The numbers do not follow the
    seed of the tests, which is the same in all their processes.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


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


@contextlib.contextmanager
def postgres_running(binaries: Path) -> Iterator[str]:
    """Runs a temporary server on a Unix socket and yields its URL. The server is durable with its
    default settings.

    The server refuses to run as root. Under root it therefore runs as `postgres` or `nobody`.
    """
    account: dict[str, Any] = {}
    folder = Path(
        tempfile.mkdtemp(prefix="darkroom-pg-")
    )  # short, because the path of a socket has at most 107 characters
    if os.geteuid() == 0:
        accounts = {user.pw_name: user for user in pwd.getpwall()}
        user = accounts.get("postgres") or accounts["nobody"]
        os.chown(folder, user.pw_uid, user.pw_gid)
        account = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}

    def run(program: str, *arguments: str) -> None:
        with (folder / "output").open("ab") as output:
            command = [str(binaries / program), "-D", str(folder / "data"), *arguments]
            done = subprocess.run(
                command,
                cwd=folder,
                env={"PATH": os.defpath, "LC_ALL": "C"},
                stdout=output,
                stderr=output,
                check=False,
                **account,
            )
        if done.returncode:
            pytest.fail(
                f"{program} ended with"
                f" {done.returncode}:\n{(folder / 'output').read_text()[-2000:]}",
                pytrace=False,
            )

    try:
        run("initdb", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
        run(
            "pg_ctl",
            "-w",
            "-l",
            str(folder / "log"),
            "-o",
            f"-c listen_addresses= -k {folder} -c max_connections=500",
            "start",
        )
        try:
            yield f"postgresql:///postgres?host={folder}&user=postgres"
        finally:
            run("pg_ctl", "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


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
