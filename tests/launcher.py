"""Starts many services fast: `python -m tests.launcher` imports the program once and forks itself
for each command.

A fork is an ordinary process that runs `darkroom` with the given arguments from its first line. It
only saves the second that the imports take. Each line of input is a request and each line of output
its answer. `{"start": {...}}` is answered with a pid, `{"poll": pid}` with an exit code or null.
The launcher ends with its input and kills the processes that still run.
"""

import atexit
import gc
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from tests.environment import STOP_S, clean_environment
from tests.known_secrets import SHOWING, watch

LOG = "service.log"
# What the commands and the consumers of the tests import, at their start or later. The forks share
# the modules.
IMPORTED = (
    "PIL.PngImagePlugin",
    "alembic.command",
    "alembic.config",
    "asyncpg",
    "encodings.idna",
    "nats",
    "service.app",
    "service.cli",
    "service.db.failover",
    "service.db.postgres",
    "service.doctor.examination",
    "service.ops.logging",
    "service.upstreams.sandbox",
    "service.web.server",
    "sqlalchemy.dialects.postgresql.asyncpg",
    "sqlalchemy.dialects.sqlite",
    "standardwebhooks",
    "uvicorn.lifespan.on",
    "uvicorn.main",
    "uvloop",
)


class Launcher:
    """The client of a launcher process."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self._lock = threading.Lock()
        self.started: list[int] = []

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())

    def start(
        self,
        arguments: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        stdout: str,
        stderr: str,
        prelude: str = "",
        stdin: str = os.devnull,
    ) -> int:
        """Starts `darkroom` with these arguments and returns its pid. Its output goes to the named
        files.

        The process executes the Python text `prelude` before the program.
        """
        request = {
            "arguments": list(arguments),
            "folder": str(folder),
            "environment": dict(environment),
            "stdout": stdout,
            "stderr": stderr,
            "prelude": prelude,
            "stdin": stdin,
        }
        if SHOWING.isdisjoint(arguments):
            watch(stdout, stderr)
        pid: int = self.ask(start=request)
        self.started.append(pid)
        return pid


def state_of(pid: int) -> str:
    """One letter, as in proc(5): `Z` has ended, `T` is stopped. "": its parent has reaped it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1]
    except (FileNotFoundError, ProcessLookupError):
        return ""


class Forked:
    """A process that a launcher started, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, launcher: Launcher, pid: int) -> None:
        self._launcher = launcher
        self._code: int | None = None
        self.pid = pid

    def poll(self) -> int | None:
        if self._code is None and state_of(self.pid) in ("Z", ""):
            self._code = self._launcher.ask(poll=self.pid)
        return self._code

    def wait(self, timeout: float) -> int:
        """The exit code. TimeoutExpired if the process runs longer than `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(["darkroom"], timeout)
            time.sleep(0.005)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@contextmanager
def launching(
    *before: str, sockets: Sequence[int] = (), coverage: bool = False
) -> Iterator[Launcher]:
    """Runs a launcher, under the command `before` if there is one (a tracer).

    `HANDED` passes a descriptor of `sockets` to a process. Without `coverage` the processes are not
    measured.
    """
    environment = clean_environment({})
    if not coverage:
        environment = {
            name: value for name, value in environment.items() if not name.startswith("COVERAGE_")
        }
    command = [*before, sys.executable, "-m", "tests.launcher"]
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


@cache
def _shared(coverage: bool) -> Launcher:
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(launching(coverage=coverage))


def shared_launcher(*, coverage: bool = False) -> Launcher:
    """The launcher that all tests of this process share, because its imports take two seconds."""
    return _shared(coverage and any(name.startswith("COVERAGE_") for name in os.environ))


@contextmanager
def borrowed() -> Iterator[Launcher]:
    """The shared launcher. The end of the block kills the processes that were started in it."""
    launcher = shared_launcher()
    before = len(launcher.started)
    try:
        yield launcher
    finally:
        for pid in launcher.started[before:]:
            if launcher.ask(poll=pid) is None:
                os.kill(pid, signal.SIGKILL)
                Forked(launcher, pid).wait(STOP_S)


class Launched:
    """A `darkroom serve`, or the command in the arguments. `log` has its output so far."""

    def __init__(
        self, launcher: Launcher, folder: Path, environment: Mapping[str, str], *arguments: str
    ) -> None:
        self.log = folder / LOG
        self.log.touch()
        self._from = self.log.stat().st_size
        self.pid = launcher.start(
            arguments or ["serve"],
            folder,
            clean_environment(environment),
            str(self.log),
            str(self.log),
        )
        self._process = Forked(launcher, self.pid)

    def signal(self, number: int) -> None:
        assert self.code is None, self.printed
        os.kill(self.pid, number)

    @property
    def printed(self) -> str:
        """The whole lines so far."""
        said = self.log.read_bytes()[self._from :]
        return said[: said.rfind(b"\n") + 1].decode()

    @property
    def code(self) -> int | None:
        """The exit code, None while the process runs."""
        return self._process.poll()

    @property
    def stopped(self) -> bool:
        """Whether the process is stopped by SIGSTOP."""
        return state_of(self.pid) == "T"


def shorten_leases(lease_ms: int) -> None:
    """Shortens the leases and the waits after crashes, which are too long for a test."""
    from service.events import broker_worker
    from service.queue import leases, worker

    part = lease_ms / broker_worker.LEASE_MS
    waits = {crashes: round(wait * part) for crashes, wait in leases.CANDIDATE_WAITS_MS.items()}
    vars(leases)["CANDIDATE_WAITS_MS"] = waits
    vars(leases)["LEASE_MS"] = vars(broker_worker)["LEASE_MS"] = lease_ms
    vars(worker)["RENEW_S"] = vars(broker_worker)["RENEW_S"] = lease_ms / 3000
    vars(broker_worker)["SPARE_S"] = lease_ms / 6000


def run(
    arguments: Sequence[str],
    folder: str,
    environment: Mapping[str, str],
    stdout: str,
    stderr: str,
    prelude: str,
    stdin: str,
) -> NoReturn:
    """Runs the program in the forked process. `stdout` and `stderr` may be named pipes."""
    from service.cli.exit_codes import main
    from service.queue import checkpoints

    random.seed()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    checkpoints.ARMED.update(checkpoints.shots(os.environ))  # as at the import
    os.dup2(os.open(stdin, os.O_RDONLY), 0)
    out = os.open(stdout, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(out, 1)
    same = stdout == stderr
    os.dup2(out if same else os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)  # the inherited objects use other files
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    if "DARKROOM_TEST_LEASE_MS" in environment:
        shorten_leases(int(environment["DARKROOM_TEST_LEASE_MS"]))
    if "HANDED" in environment:  # as systemd does it
        os.dup2(int(environment["HANDED"]), 3)
        os.environ |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
    sys.argv = ["darkroom", *arguments]
    code = 1
    try:
        exec(prelude, {})
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - as the interpreter does at its end
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def launch() -> None:
    from service.net.service_client import usual_trust
    from service.upstreams.catalogue import builtin_models

    for name in IMPORTED:
        import_module(name)
    builtin_models()
    usual_trust()
    gc.freeze()  # a fork's collector would copy every page that it walks

    codes: dict[int, int | None] = {}
    answer: int | None
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            pid = os.fork()
            if pid == 0:
                run(**request["start"])
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
