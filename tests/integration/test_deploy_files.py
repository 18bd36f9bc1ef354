"""The ready files in deploy/, checked by the programs that read them."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.certificates import self_signed
from tests.environment import ROOT
from tests.servers import missing

DEPLOY = ROOT / "deploy"
SETTINGS = {
    "POSTGRES_PASSWORD": "secret",
    "POSTGRES_IMAGE": f"postgres:17@sha256:{'0' * 64}",
    "DARKROOM_BLOB_URL": "s3://bucket/prefix",
    "DARKROOM_SECRET_KEY": "k" * 64,
}


def program(name: str) -> str:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") or missing(name)


def checked(*command: str, folder: Path, **given: str) -> str:
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), **given}
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["Caddyfile", "Caddyfile.callbacks"])
@pytest.mark.parametrize("site", ["", "https://localhost:8443", "a.example, b.example"])
def test_caddy_accepts_its_files(tmp_path: Path, name: str, site: str) -> None:
    """With and without the variables. Paths of callbacks stay out of the log."""
    given = {"PROXY_SITE": site} if site else {}
    file = ("--adapter", "caddyfile", "--config", str(DEPLOY / name))
    checked(program("caddy"), "validate", *file, folder=tmp_path, **given)
    adapted = checked(program("caddy"), "adapt", *file, folder=tmp_path, **given)
    assert '"request\\u003euri":{"filter":"delete"}' in adapted
    assert "/callbacks/*" in adapted


@pytest.mark.parametrize("name", ["haproxy.cfg", "haproxy-service.cfg"])
def test_haproxy_accepts_its_files(tmp_path: Path, name: str) -> None:
    """With a certificate. Neither file logs a path."""
    certificate = str(self_signed(tmp_path))
    command = (program("haproxy"), "-c", "-f", str(DEPLOY / name))
    checked(*command, folder=tmp_path, PROXY_CERTIFICATE=certificate, PROXY_BIND="127.0.0.1:8443")
    text = (DEPLOY / name).read_text()
    (form,) = re.findall(r'log-format "([^"]*)"', text)
    assert not re.search(r"%(r|HU|HP|HPO|HQ)\b", form)


def test_only_callbacks_are_repeated_after_they_were_sent() -> None:
    """A submission that is sent twice could be paid twice."""
    text = (DEPLOY / "haproxy-service.cfg").read_text()
    backends = dict(re.findall(r"\nbackend (\w+)\n(.*?)(?=\nbackend|\Z)", text, re.DOTALL))
    retried = {
        name: re.findall(r"retry-on (.*)", body)[0].split() for name, body in backends.items()
    }
    assert retried == {"callbacks": ["conn-failure", "empty-response"], "api": ["conn-failure"]}


def composed(tmp_path: Path, name: str, **given: str) -> str:
    """The file as compose understands it, beside an empty .env."""
    folder = tmp_path / "deploy"
    folder.mkdir()
    shutil.copy(DEPLOY / name, folder)
    (tmp_path / ".env").touch()
    command = (program("docker-compose"), "-f", name, "config")
    return checked(*command, folder=folder, **given)


def test_compose_accepts_the_file_of_one_process(tmp_path: Path) -> None:
    assert "read_only: true" in composed(tmp_path, "compose.yaml")


def test_compose_accepts_the_file_of_postgresql_and_two_workers(tmp_path: Path) -> None:
    """One process has the API, two have workers. All share the store, the images and the key."""
    text = composed(tmp_path, "compose.postgres.yaml", **SETTINGS)
    assert re.findall(r"^  ([a-z0-9-]+):$", text, re.MULTILINE)[:4] == [
        *("postgres", "web", "worker-1", "worker-2")
    ]
    assert text.count("DARKROOM_DATABASE_URL: postgresql://darkroom:secret@postgres/darkroom") == 3
    assert text.count("DARKROOM_BLOB_URL: s3://bucket/prefix") == 3
    assert text.count("- worker\n") == 2
    assert text.count("mem_limit: 1g") == 4


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_compose_names_a_setting_that_is_missing(tmp_path: Path, name: str) -> None:
    """No service starts with an empty password or a key of its own."""
    given = {each: value for each, value in SETTINGS.items() if each != name}
    with pytest.raises(AssertionError, match=r"in \.env"):
        composed(tmp_path, "compose.postgres.yaml", **given)
