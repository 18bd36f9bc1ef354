"""Socket activation and readiness messages. The service serves on an inherited socket and tells its
supervisor when it is ready. The units in deploy/ use both.
"""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from service.errors import ConfigurationError
from service.settings import Settings
from service.web import activation
from service.web.activation import inherited
from tests.environment import ROOT, clean_environment
from tests.processes import Running, service_settings
from tests.servers import free_port, missing
from tests.waiting import wait_until

UNITS = ROOT / "deploy" / "systemd"
PATIENCE_S = 60.0


def handed(**more: str) -> dict[str, str]:
    return {
        "LISTEN_FDS": "1",
        "LISTEN_PID": str(os.getpid()),
        "LISTEN_FDNAMES": "darkroom.socket",
        "OTHER": "stays",
        **more,
    }


async def connect(port: int, path: Path | None) -> None:
    """Opens and closes a connection, which makes systemd start the service."""
    _, writer = await (
        asyncio.open_unix_connection(path) if path else asyncio.open_connection("127.0.0.1", port)
    )
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
async def test_a_service_serves_on_the_socket_it_was_handed(tmp_path: Path, unix: bool) -> None:
    """systemd's own program hands over the socket. The service announces the socket's address and
    not the one in its settings. It sends READY=1 when it serves and STOPPING=1 when it stops.
    """
    program = shutil.which("systemd-socket-activate") or missing("systemd")
    port = free_port()
    path = tmp_path / "socket" if unix else None
    address = str(path) if path else f"127.0.0.1:{port}"
    told = tmp_path / "told"
    environment = clean_environment(
        service_settings("https://upstream.invalid", tmp_path, PORT="1")
    ) | {"NOTIFY_SOCKET": str(told)}
    before = [program, "-l", address, *(f"--setenv={name}" for name in environment)]
    transport = httpx.AsyncHTTPTransport(uds=str(path)) if path else None
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(told))
        notified.setblocking(False)
        service = Running("serve", folder=tmp_path, before=before, **environment)
        try:
            await wait_until(
                lambda: any("Listening on" in line for line in service.lines), PATIENCE_S
            )
            await connect(port, path)
            async with asyncio.timeout(PATIENCE_S):
                assert await asyncio.get_running_loop().sock_recv(notified, 100) == b"READY=1"
                async with httpx.AsyncClient(
                    base_url="http://127.0.0.1:1" if path else service.address, transport=transport
                ) as client:
                    assert (await client.get("/healthz")).json() == {"status": "ok"}
                service.signal(signal.SIGTERM)
                assert await asyncio.get_running_loop().sock_recv(notified, 100) == b"STOPPING=1"
                assert await asyncio.to_thread(service.ended) == 0
        finally:
            service.process.kill()
            service.ended()
    assert service.announcement["address"] == (f"unix:{path}" if path else address)
    assert service.announcement["settings"]["port"] == (1 if path else port)
    assert path is None or path.exists(), "it is its holder's"


def test_a_socket_for_another_process_is_ignored() -> None:
    """When LISTEN_PID names another process or no socket was passed, the service binds its own. No
    child process inherits the variables.
    """
    for environ in (
        handed(LISTEN_PID=str(os.getppid())),
        handed(LISTEN_PID=""),
        {"OTHER": "stays"},
    ):
        assert inherited(environ) is None
        assert environ == {"OTHER": "stays"}


def test_a_socket_that_was_handed_over_is_not_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process takes the socket once, in non-blocking mode, and no child process inherits it."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        copy = os.dup(held.fileno())
        os.set_inheritable(copy, True)
        monkeypatch.setattr(activation, "FIRST", copy)
        environ = handed()
        found = inherited(environ)
        assert found is not None
        with found:
            assert found.getsockname() == held.getsockname()
            assert not os.get_inheritable(copy)
            assert found.gettimeout() == 0
        assert environ == {"OTHER": "stays"}
        assert inherited(environ) is None


@pytest.mark.parametrize("what", ["file", "nothing", "datagram", "silent"])
def test_an_unusable_socket_is_refused(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file, a closed descriptor, a datagram socket, and a socket that does not listen each get
    their own reason.
    """
    with ExitStack() as stack:
        if what == "file":
            fd = os.dup(stack.enter_context((tmp_path / "file").open("w")).fileno())
            stack.callback(os.close, fd)
        else:
            kind = socket.SOCK_DGRAM if what == "datagram" else socket.SOCK_STREAM
            fd = os.dup(stack.enter_context(socket.socket(socket.AF_INET, kind)).fileno())
            if what == "nothing":
                os.close(fd)
        monkeypatch.setattr(activation, "FIRST", fd)
        with pytest.raises(ConfigurationError, match=r"is no (socket: |listening stream socket)"):
            inherited(handed())


def test_two_sockets_are_refused() -> None:
    """The service serves on one socket, so a second one is a configuration error."""
    with pytest.raises(ConfigurationError, match="2 sockets were handed over"):
        inherited(handed(LISTEN_FDS="2"))


def test_the_units_are_what_systemd_takes(tmp_path: Path) -> None:
    """systemd knows every line, and the stop timeout is longer than the service needs."""
    program = shutil.which("systemd-analyze") or missing("systemd")
    for unit in UNITS.iterdir():
        (tmp_path / unit.name).write_text(
            unit.read_text().replace("/opt/darkroom/bin/darkroom", shutil.which("env") or "")
        )
    command = [program, "verify", *(str(tmp_path / unit.name) for unit in UNITS.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    lines = (UNITS / "darkroom.service").read_text().splitlines()
    (stop_s,) = [
        int(line.partition("=")[2]) for line in lines if line.startswith("TimeoutStopSec=")
    ]
    assert stop_s >= 2 * Settings.model_fields["stop_s"].default
