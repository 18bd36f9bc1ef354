"""The service restarts again and again while callbacks arrive. One case hands its socket over to
the next process, the other runs behind a proxy that retries.

Each callback is sent once. A single refused callback fails the test, although the upstream would
retry it three times.
"""

import asyncio
import os
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.api import JSON, got
from tests.callbacks import connected
from tests.certificates import self_signed
from tests.crash.life import listed
from tests.crash.load import PATIENCE_S, SECRET, TRY_S, loaded, sending, until
from tests.environment import ROOT, clean_environment
from tests.launcher import Launched, Launcher, borrowed, launching
from tests.processes import ADMIN_KEY, Running, sandbox, service_settings
from tests.servers import kept_port, missing
from tests.waiting import wait_until

RESTARTS = int(os.environ.get("DARKROOM_TEST_RESTARTS", "4"))
# The seconds that a process lives. It lives longer behind the proxy, because the proxy retries once
# a second and could hit several restarts in a row.
UP_S, UP_BEHIND_S = (0.0, 0.5), (0.7, 1.2)
TASKS = 40

pytestmark = pytest.mark.timeout(120 + 12 * RESTARTS)


@dataclass(frozen=True, slots=True)
class Place:
    """A service that the test restarts, and how it is started."""

    launcher: Launcher
    folder: Path
    environment: dict[str, str]

    async def start(self) -> Launched:
        process = Launched(self.launcher, self.folder, self.environment)
        await wait_until(
            lambda: "service.started" in process.printed or process.code is not None, PATIENCE_S
        )
        assert process.code is None, process.printed
        return process


async def stop(process: Launched) -> None:
    process.signal(signal.SIGTERM)
    await wait_until(lambda: process.code is not None, PATIENCE_S)
    assert process.code == 0, process.printed


async def restarted(place: Place, url: str, public: str, up_s: tuple[float, float]) -> None:
    """Sends callbacks to `public` and restarts the service at `url` meanwhile. Checks that the
    service answers and stores every callback.
    """
    clock, random_, longest = asyncio.get_running_loop().time, random.Random(), 0.0
    headers = {"authorization": f"Bearer {ADMIN_KEY}"}
    async with httpx.AsyncClient(
        base_url=url, headers=headers, trust_env=False, timeout=60
    ) as client:
        process = await place.start()
        load = await loaded(client, TASKS)
        async with sending(load, public):
            for _ in range(RESTARTS):
                await until(clock() + random_.uniform(*up_s))
                began = clock()
                await stop(process)
                process = await place.start()
                longest = max(longest, clock() - began)
        assert set(load.answers) == {"200"}, load.answers
        assert load.slowest_s < max(TRY_S, 10 * longest), (
            "a machine so busy that a restart takes more than a second needs more"
        )
        print(
            f"{RESTARTS} restarts of up to {longest:.2f} s, {load.answers.total()} callbacks, the"
            f" slowest {load.slowest_s:.2f} s"
        )

        async def told() -> list[JSON] | None:
            events = [
                event
                for event in await listed(client, "events")
                if event["type"] == "image.task.failed"
            ]
            return events if len(events) >= len(load.said) else None

        events = await wait_until(told, PATIENCE_S)
        assert sorted(event["subject"] for event in events) == sorted(load.said)
        for task_id, times in load.said.items():

            async def judged(task_id: str = task_id, times: int = times) -> int:
                steps = got(await client.get(f"/v1/tasks/{task_id}/timeline"))["data"]
                found = [step for step in steps if step["step"] == "callback.received"]
                count: int = sum(step["count"] for step in found)
                return count * (count >= times)

            assert await wait_until(judged, PATIENCE_S) == times
        await stop(process)


@pytest.fixture
def upstream(tmp_path: Path) -> Iterator[Running]:
    with sandbox("--delay", "0", folder=tmp_path) as running:
        yield running


def settings(upstream: Running, folder: Path, **more: str) -> dict[str, str]:
    return service_settings(
        upstream.address, folder, SECRET_KEY=SECRET, RECONCILE_AFTER_S="600", **more
    )


def listener(stack: AsyncExitStack) -> socket.socket:
    """What systemd holds."""
    held = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=socket.SOMAXCONN))
    held.set_inheritable(True)
    return held


async def test_no_callback_is_refused_while_the_socket_outlives_the_service(
    tmp_path: Path, upstream: Running
) -> None:
    """The test restarts the service under load and hands the socket over. A connection that arrives
    between two processes waits in the socket's queue, and the next process answers it.
    """
    async with AsyncExitStack() as stack:
        held = listener(stack)
        launcher = stack.enter_context(launching(sockets=[held.fileno()]))
        environment = settings(upstream, tmp_path) | {"HANDED": str(held.fileno())}
        url = f"http://127.0.0.1:{held.getsockname()[1]}"
        await restarted(Place(launcher, tmp_path, environment), url, url, UP_S)


@contextmanager
def haproxy(bind: str, backend: str, log: Path, **tls: str) -> Iterator[subprocess.Popen[bytes]]:
    """Runs HAProxy with the configuration in deploy/."""
    program = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin") or missing("HAProxy")
    environment = clean_environment({"PROXY_BIND": bind, "PROXY_BACKEND": backend, **tls})
    command = [program, "-db", "-f", str(ROOT / "deploy" / "haproxy.cfg")]
    with (
        log.open("wb") as output,
        subprocess.Popen(command, env=environment, stdout=output, stderr=output) as process,
    ):
        try:
            yield process
        finally:
            process.terminate()


async def open_at(address: str) -> bool:
    try:
        async with connected(f"http://{address}"):
            return True
    except OSError:
        return False


async def test_no_callback_is_refused_behind_a_proxy_that_tries_again(
    tmp_path: Path, upstream: Running
) -> None:
    """The test restarts the service under load behind HAProxy with the configuration in deploy/.
    The proxy finds no server, waits and retries.
    """
    async with AsyncExitStack() as stack:
        public, backend = (f"127.0.0.1:{kept_port(stack)}" for _ in range(2))
        stack.enter_context(haproxy(public, backend, tmp_path / "haproxy.log", PROXY_TLS="off"))
        await wait_until(lambda: open_at(public), PATIENCE_S)
        launcher = stack.enter_context(borrowed())
        place = Place(
            launcher, tmp_path, settings(upstream, tmp_path, PORT=backend.rpartition(":")[2])
        )
        await restarted(place, f"http://{backend}", f"http://{public}", UP_BEHIND_S)
        log = (tmp_path / "haproxy.log").read_text()
        assert re.search("status=200 .* retries=[1-9]", log), "the proxy never had to retry"
        assert "callbacks/evolink" not in log
        async with httpx.AsyncClient(
            base_url=f"http://{public}", trust_env=False, timeout=30
        ) as stranger:
            assert (await stranger.get("/v1/tasks")).status_code == 404


async def test_the_proxy_speaks_tls_unless_it_is_turned_off(tmp_path: Path) -> None:
    """Without its certificate it does not start. With one it passes nothing but callbacks."""
    log, certificate = tmp_path / "haproxy.log", self_signed(tmp_path)
    async with AsyncExitStack() as stack:
        public, backend = (f"127.0.0.1:{kept_port(stack)}" for _ in range(2))
        none = {"PROXY_CERTIFICATE": str(tmp_path / "none.pem")}
        proxy = stack.enter_context(haproxy(public, backend, log, **none))
        await wait_until(lambda: proxy.poll() is not None, PATIENCE_S)
        stack.enter_context(haproxy(public, backend, log, PROXY_CERTIFICATE=str(certificate)))
        await wait_until(lambda: open_at(public), PATIENCE_S)
        trusted = ssl.create_default_context(cafile=str(certificate))
        async with httpx.AsyncClient(verify=trusted, trust_env=False, timeout=30) as client:
            assert (await client.get(f"https://{public}/v1/tasks")).status_code == 404
            with pytest.raises(httpx.TransportError):
                await client.get(f"http://{public}/v1/tasks")
