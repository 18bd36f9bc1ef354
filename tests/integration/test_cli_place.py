"""Where a command works, and what it says about that (docs/cli.md)."""

import json
import ssl
import subprocess
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.certificates import self_signed
from tests.inputs import photo
from tests.processes import Running, darkroom, started

KEYS = ("keys", "create", "--owner", "me", "--scopes", "submit")
Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dev")


@pytest.fixture(scope="module")
def dev(home: Path) -> Iterator[Running]:
    with started("serve", "--sandbox", "--json", "--port", "0", folder=home) as running:
        yield running


@pytest.fixture
def key(dev: Running) -> str:
    return str(dev.announcement["key"])


def run(folder: Path, *arguments: str, **settings: str) -> Done:
    named = {f"DARKROOM_{name}": value for name, value in settings.items() if name.isupper()}
    tls = {"SSL_CERT_FILE": settings["trusted"]} if "trusted" in settings else {}
    return darkroom(*arguments, folder=folder, **named, **tls)


def said(done: Done) -> str:
    """The line about the place, below a result."""
    assert done.returncode == 0, done.stderr
    return next(line for line in done.stderr.splitlines() if line.startswith("at "))


@pytest.mark.parametrize("more", [(), ("--local",)])
def test_an_address_without_a_key_leaves_keys_to_the_store_here(
    dev: Running, key: str, tmp_path: Path, more: tuple[str, ...]
) -> None:
    """A sandbox's exported address does not get the keys of the service in this folder. `--local`
    says so even if its key is exported too.
    """
    there = {"URL": dev.address, "API_KEY": key}
    before = run(tmp_path, "keys", "list", **there).stdout
    exported = there if more else {"URL": dev.address}
    done = run(tmp_path, *KEYS, *more, **exported)
    assert said(done) == f"at {tmp_path}/data/darkroom.db, which no process serves"
    assert json.loads(run(tmp_path, *KEYS, "--json", *more, **exported).stdout)["owner"] == "me"
    assert run(tmp_path, "keys", "list", **there).stdout == before


def test_keys_go_to_the_service_that_is_named(dev: Running, key: str, tmp_path: Path) -> None:
    """By DARKROOM_URL with a key for it, by `.env`, or by `--url`, which wins over both."""
    assert said(run(tmp_path, *KEYS, URL=dev.address, API_KEY=key)).endswith(
        f"{dev.address} (DARKROOM_URL)"
    )
    (tmp_path / ".env").write_text(f"DARKROOM_URL={dev.address}\n")
    assert said(run(tmp_path, *KEYS, API_KEY=key)).endswith("(DARKROOM_URL in .env)")
    elsewhere = {"URL": "http://127.0.0.1:9", "API_KEY": key}
    for words in ((*KEYS, "--url", dev.address), ("--url", dev.address, *KEYS)):
        assert said(run(tmp_path, *words, **elsewhere)) == f"at {dev.address} (--url)"
    assert not (tmp_path / "data").exists()


def test_a_served_store_asks_for_a_key(dev: Running, home: Path, tmp_path: Path) -> None:
    """The line says what to do, and not `unauthorized`."""
    folder = str(home / "data/sandbox")
    for more in ((), ("--local",)):
        done = run(tmp_path, *KEYS, *more, DATA_DIR=folder, URL=dev.address)
        assert done.returncode == 1
        assert "a process serves this store" in done.stderr
        assert "DARKROOM_ADMIN_KEY" in done.stderr
        assert "unauthorized" not in done.stderr


def test_a_refused_key_is_named_with_the_address(dev: Running, tmp_path: Path) -> None:
    done = run(tmp_path, "submit", "x", URL=dev.address, API_KEY="dk_wrong")
    assert f"{dev.address} (DARKROOM_URL) got the key of DARKROOM_API_KEY" in done.stderr
    done = run(tmp_path, "tasks", URL=dev.address, API_KY="dk_wrong")
    assert "DARKROOM_API_KY is not a setting; did you mean DARKROOM_API_KEY?" in done.stderr


def test_every_command_that_changes_something_says_where(
    dev: Running, key: str, tmp_path: Path
) -> None:
    """Standard output stays the result alone."""
    (tmp_path / "photo.png").write_bytes(photo())
    there = {"URL": dev.address, "API_KEY": key}
    made = run(tmp_path, "endpoints", "create", "http://127.0.0.1:9/", "--json", **there)
    endpoint = json.loads(made.stdout)["id"]
    for words in (
        ("submit", "x"),
        ("files", "upload", "photo.png"),
        ("budgets", "set", "shop", "5/day"),
        ("endpoints", "patch", endpoint, "--url", "http://127.0.0.1:9/x"),
        ("endpoints", "delete", endpoint),
    ):
        assert said(run(tmp_path, *words, "--json", **there)) == f"at {dev.address} (DARKROOM_URL)"
    reading = run(tmp_path, "tasks", **there)
    assert (reading.returncode, reading.stderr) == (0, "")


def test_the_service_here_has_the_address_of_its_settings(
    dev: Running, key: str, tmp_path: Path
) -> None:
    port = dev.address.rpartition(":")[2]
    settings: Mapping[str, str] = {"URL": "http://127.0.0.1:9", "PORT": port, "API_KEY": key}
    assert said(run(tmp_path, "submit", "x", "--local", **settings)).endswith("(--local)")


class Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"data": [], "next_cursor": null}')

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_private_authority_is_named_with_its_variable(tmp_path: Path) -> None:
    """The line has the real error. With SSL_CERT_FILE the command works."""
    pem = self_signed(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    with HTTPServer(("127.0.0.1", 0), Page) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        there = f"https://localhost:{server.server_port}"
        refused = run(tmp_path, "tasks", URL=there)
        trusted = run(tmp_path, "tasks", URL=there, trusted=str(pem))
        server.shutdown()
    assert refused.returncode == 1
    for words in ("CERTIFICATE_VERIFY_FAILED", "self-signed certificate", "SSL_CERT_FILE"):
        assert words in refused.stderr
    assert (trusted.returncode, trusted.stderr) == (0, "")
