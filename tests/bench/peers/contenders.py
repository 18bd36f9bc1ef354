"""Darkroom and its peers as processes that a bench can start, kill and measure."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import httpx

from tests.bench.processes import cpu_seconds
from tests.environment import ROOT, clean_environment
from tests.processes import ADMIN_KEY, service_settings
from tests.servers import free_port

FOLDER = Path(__file__).parent
PYTHON = ROOT / ".venv" / "peers" / "bin" / "python"
REDIS = shutil.which("redis-server", path=f"{os.defpath}:/usr/sbin:/usr/local/bin")
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
START_S, LOOK_S, YOUNG_S = 60.0, 0.02, 1.5
JSON = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Contender:
    """`lacks`: what it does not promise."""

    name: str
    program: str
    full: bool
    lacks: str


ONCE = "that a submission is paid once; that a callback which never comes is replaced; an order"
HALF = "that the picture is whole and on disk; one id for one event"
CONTENDERS = (
    Contender("Darkroom on SQLite", "darkroom", True, "–"),
    Contender("FastAPI, Celery (2 prefork workers), Redis", "celery", True, ONCE),
    Contender("FastAPI, arq (2 workers), Redis", "arq", True, ONCE),
    Contender("FastAPI, DBOS on SQLite", "dbos", True, ONCE),
    Contender(
        "Celery as people write it",
        "celery",
        False,
        f"all of that; {HALF}; a durable acknowledgement; the job of a killed worker",
    ),
    Contender(
        "arq as people write it", "arq", False, f"all of that; {HALF}; a durable acknowledgement"
    ),
    Contender("DBOS as people write it", "dbos", False, f"all of that; {HALF}"),
)


def missing(contender: Contender) -> str | None:
    """A sentence on what the machine lacks for this contender."""
    if contender.program == "darkroom":
        return None
    if not PYTHON.exists():
        return f"{contender.name}: skipped, `make bench-peers` installs its packages"
    if REDIS is None and contender.program != "dbos":
        return (
            f"{contender.name}: skipped, redis-server is missing (`apt-get install redis-server`)"
        )
    return None


@dataclass(slots=True)
class Process:
    """One process, with its children in a session of its own. A kill ends them all."""

    command: Sequence[str]
    folder: Path
    environment: Mapping[str, str]
    running: "subprocess.Popen[bytes]" = field(init=False)
    started: float = 0
    killed: bool = False

    def start(self) -> None:
        with (self.folder / f"{Path(self.command[-1]).name}.log").open("ab") as log:
            self.running = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=clean_environment(self.environment),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started, self.killed = time.monotonic(), False

    def ended(self) -> bool:
        """Whether it ended by itself."""
        return not self.killed and self.running.poll() is not None

    def kill(self) -> None:
        self.killed = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.running.pid, signal.SIGKILL)
        self.running.wait()


@dataclass(slots=True)
class Running:
    """A contender at work. `secret` signs its events."""

    contender: Contender
    url: str
    processes: list[Process]
    secret: str = SECRET

    @property
    def health(self) -> str:
        return f"{self.url}/{'readyz' if self.contender.program == 'darkroom' else 'health'}"

    def cpu(self) -> float:
        """Seconds of CPU that its processes and their children have used."""
        return sum(sum(cpu_seconds(each.running.pid)) for each in self.processes)

    async def awake(self, client: httpx.AsyncClient) -> bool:
        """Whether every process has had time to start, and the first to call answers."""
        now = time.monotonic()
        if any(each.ended() or now - each.started < YOUNG_S for each in self.processes):
            return False
        with contextlib.suppress(httpx.TransportError):
            return (await client.get(self.health)).status_code == 200
        return False

    async def order(self, client: httpx.AsyncClient, name: str) -> str | None:
        """Submits an order. Returns the id of its task, or None if it has to be sent again."""
        if self.contender.program == "darkroom":
            body: JSON = {"model": "wan2.5-text-to-image", "prompt": name, "size": "1024x1024"}
            headers = {
                "authorization": f"Bearer {ADMIN_KEY}",
                "idempotency-key": f"order-{name}",
                "prefer": "respond-async",
            }
            answer = await client.post(
                f"{self.url}/v1/images/generations", json=body, headers=headers
            )
            return str(answer.json()["id"]) if answer.status_code == 200 else None
        answer = await client.post(f"{self.url}/tasks", json={"id": name, "prompt": name})
        return name if answer.status_code == 200 else None


@contextmanager
def running(
    contender: Contender, folder: Path, upstream: str, workers: int = 0, **settings: str
) -> Iterator[Running]:
    """Starts a contender in an empty folder. `settings` are Darkroom's, and so is the number of
    further processes with workers, which needs PostgreSQL.
    """
    port = free_port()
    with ExitStack() as stack:
        if contender.program == "darkroom":
            processes = darkroom(folder, upstream, port, workers, settings)
        else:
            # short, because the path of a socket has at most 107 characters
            place = stack.enter_context(tempfile.TemporaryDirectory(prefix="peers-"))
            processes = peer(contender, folder, upstream, port, Path(place) / "redis.sock")
        for process in processes:
            process.start()
            stack.callback(process.kill)
        made = Running(contender, f"http://127.0.0.1:{port}", processes)
        wait_for(made.health, processes[-1])
        if contender.program == "darkroom":
            made.secret = subscribed(made.url, f"{upstream}/receiver")
        yield made


def darkroom(
    folder: Path, upstream: str, port: int, workers: int, settings: Mapping[str, str]
) -> list[Process]:
    own = {"PORT": str(port), "CALLBACK_URL": f"http://127.0.0.1:{port}", **settings}
    environment = service_settings(upstream, folder, **own)
    command, alone = [sys.executable, "-m", "service"], {**environment, "DARKROOM_PORT": "0"}
    further = [Process([*command, "worker"], folder, alone) for _ in range(workers)]
    return [*further, Process([*command, "serve"], folder, environment)]


def subscribed(url: str, receiver: str) -> str:
    endpoint = {"url": receiver, "types": ["image.task.completed", "image.task.failed"]}
    headers = {"authorization": f"Bearer {ADMIN_KEY}"}
    answer = httpx.post(f"{url}/v1/endpoints", json=endpoint, headers=headers, trust_env=False)
    return str(answer.raise_for_status().json()["secret"])


def peer(
    contender: Contender, folder: Path, upstream: str, port: int, socket: Path
) -> list[Process]:
    program = contender.program
    (folder / "pictures").mkdir()
    environment = {
        "PYTHONPATH": str(FOLDER / "programs"),
        "PEER_MODE": "full" if contender.full else "plain",
        "PEER_FOLDER": str(folder / "pictures"),
        "PEER_PORT": str(port),
        "PEER_URL": f"http://127.0.0.1:{port}",
        "PEER_UPSTREAM": upstream,
        "PEER_RECEIVER": f"{upstream}/receiver",
        "PEER_SECRET": SECRET,
        "PEER_REDIS": str(socket),
        "PEER_DATABASE": f"sqlite:///{folder}/dbos.sqlite",
    }

    def python(*arguments: str) -> Process:
        return Process([str(PYTHON), *arguments], folder, environment)

    if program == "dbos":
        return [python(str(FOLDER / "programs" / "dbos_peer.py"))]
    durable = ["--appendonly", "yes", "--appendfsync", "always"] if contender.full else []
    redis = [str(REDIS), "--port", "0", "--unixsocket", str(socket), "--dir", str(folder), *durable]
    api = ["-m", "uvicorn", "--port", str(port), "--log-level", "warning", "--no-access-log"]
    celery = ["worker", "--pool", "prefork", "--concurrency", "2", "--loglevel", "WARNING"]
    celery += ["--without-gossip", "--without-mingle", "--without-heartbeat", "-O", "fair"]
    workers = {
        "celery": [["-m", "celery", "--app", "celery_peer", *celery]],
        "arq": [["-m", "arq", "arq_peer.WorkerSettings"]] * 2,
    }
    return [
        Process(redis, folder, {}),
        *(python(*worker) for worker in workers[program]),
        python(*api, f"{program}_peer:api"),
    ]


def wait_for(url: str, process: Process) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.running.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url, trust_env=False).status_code < 500:
                return
        time.sleep(LOOK_S)
    logs = "\n".join(path.read_text()[-1500:] for path in process.folder.glob("*.log"))
    raise SystemExit(f"{process.command} did not start:\n{logs}")


def versions() -> str:
    """The versions of the peers' packages and of Redis, in a sentence."""
    wanted = ("celery", "arq", "dbos", "fastapi", "uvicorn")
    folders = [str(path) for path in PYTHON.parents[1].glob("lib/python*/site-packages")]
    found = {each.name.lower(): each.version for each in distributions(path=folders)}
    named = [f"{name} {found[name]}" for name in wanted if name in found]
    if REDIS is not None:
        said = subprocess.run([REDIS, "--version"], capture_output=True, text=True, check=True)
        named.append("Redis " + said.stdout.partition("v=")[2].partition(" ")[0])
    return ", ".join(named)
