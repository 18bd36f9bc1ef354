"""Starts services by the dozen: `python -m tests.crash.launcher` imports the program once and forks
it for each that is wanted.

What is forked is a process as any other, that runs `darkroom serve`, or another command, from its
first line; only its second of imports is saved. Each line of input is a request, each line of
output its answer: {"start": [folder, environment, arguments]} its pid, {"poll": pid} its exit code
or null. Ends with its input, and everybody with it.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from tests.processes import STOP_S, clean_environment

LOG = "service.log"


class Launcher:
    """The requesting end."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self._lock = threading.Lock()

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())


@contextmanager
def launching(*before: str, sockets: Sequence[int] = ()) -> Iterator[Launcher]:
    """`before`: a command that runs another one, as a tracer does; `sockets`: descriptors that a
    process may be handed by `HANDED`.
    """
    environment = {
        name: value
        for name, value in clean_environment({}).items()
        if not name.startswith("COVERAGE_")
    }
    command = [*before, sys.executable, "-m", "tests.crash.launcher"]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, env=environment, text=True, stdin=pipe, stdout=pipe, pass_fds=sockets
    ) as process:
        try:
            yield Launcher(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(STOP_S)


class Launched:
    """A `darkroom serve`, or what else the arguments say, with what it has printed so far in
    `log`.
    """

    def __init__(
        self, launcher: Launcher, folder: Path, environment: Mapping[str, str], *arguments: str
    ) -> None:
        self.log = folder / LOG
        self.log.touch()
        self._from = self.log.stat().st_size
        self._launcher = launcher
        self._code: int | None = None
        self.pid: int = launcher.ask(start=[str(folder), dict(environment), arguments or ["serve"]])

    def signal(self, number: int) -> None:
        assert self.code is None, self.printed
        os.kill(self.pid, number)

    @property
    def printed(self) -> str:
        return self.log.read_bytes()[self._from :].decode()

    @property
    def code(self) -> int | None:
        """Its exit code, None while it lives."""
        if self._code is None:
            self._code = self._launcher.ask(poll=self.pid)
        return self._code

    @property
    def stopped(self) -> bool:
        """Whether SIGSTOP has it."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2].startswith("T")


def serve(folder: str, environment: Mapping[str, str], arguments: Sequence[str]) -> NoReturn:
    """What the fork does."""
    from service.cli import main
    from service.queue import checkpoints, leases, worker

    os.chdir(folder)
    os.environ.update(environment)
    checkpoints.ARMED.update(checkpoints.shots(os.environ))  # as at the import
    log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for of, to in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(of, to)
    if "DARKROOM_TEST_LEASE_MS" in environment:  # half a minute is long for a test
        lease_ms = int(environment["DARKROOM_TEST_LEASE_MS"])
        vars(leases)["LEASE_MS"], vars(worker)["RENEW_S"] = lease_ms, lease_ms / 3000
    if "HANDED" in environment:  # as systemd does it
        os.dup2(int(environment["HANDED"]), 3)
        os.environ |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
    sys.argv = ["darkroom", *arguments]
    code = 1
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stdout.flush()
        os._exit(code)


def launch() -> None:
    import asyncpg  # noqa: F401
    import uvloop  # noqa: F401

    import service.app
    import service.ops.logging
    import service.web.server  # noqa: F401

    codes: dict[int, int | None] = {}
    answer: int | None
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            pid = os.fork()
            if pid == 0:
                serve(*request["start"])
            codes[pid], answer = None, pid
        else:
            pid = request["poll"]
            if codes[pid] is None:
                done, status = os.waitpid(pid, os.WNOHANG)
                codes[pid] = os.waitstatus_to_exitcode(status) if done else None
            answer = codes[pid]
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    for pid, code in codes.items():
        if code is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


if __name__ == "__main__":
    launch()
