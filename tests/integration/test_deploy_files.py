"""The ready files in deploy/, checked by the programs that read them."""

import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml  # type: ignore[import-untyped]

from service.settings import Settings
from tests.certificates import self_signed
from tests.environment import ROOT, clean_environment
from tests.servers import free_port, missing
from tests.waiting import wait_until

DEPLOY = ROOT / "deploy"
SETTINGS = {
    "POSTGRES_PASSWORD": "secret",
    "POSTGRES_IMAGE": f"postgres:17@sha256:{'0' * 64}",
    "NATS_PASSWORD": "secret",
    "NATS_IMAGE": f"nats:2.11@sha256:{'0' * 64}",
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


def composed(tmp_path: Path, *names: str, **given: str) -> str:
    """The files as compose understands them, beside an empty .env."""
    folder = tmp_path / "deploy"
    folder.mkdir()
    files = []
    for name in names:
        shutil.copy(DEPLOY / name, folder)
        files += ["-f", name]
    (tmp_path / ".env").touch()
    return checked(program("docker-compose"), *files, "config", folder=folder, **given)


def test_compose_accepts_the_file_of_one_process(tmp_path: Path) -> None:
    assert "read_only: true" in composed(tmp_path, "compose.yaml")


def test_compose_accepts_the_file_of_several_processes(tmp_path: Path) -> None:
    """Two have the API, two have workers. All share the store, the images and the broker."""
    text = composed(tmp_path, "compose.postgres.yaml", **SETTINGS)
    assert re.findall(r"^  ([a-z0-9-]+):$", text, re.MULTILINE)[:6] == [
        *("nats", "postgres", "web-1", "web-2", "worker-1", "worker-2")
    ]
    for shared in (
        "DATABASE_URL: postgresql://darkroom:secret@postgres/darkroom",
        "BLOB_URL: s3://bucket/prefix",
        "SINKS: nats://darkroom:secret@nats:4222/darkroom?stream=darkroom",
    ):
        assert text.count(f"DARKROOM_{shared}") == 4
    assert text.count("- worker\n") == 2
    assert text.count("mem_limit: 1g") == 6
    assert text.count("nofile: ") == 4


@pytest.mark.parametrize("other", ["compose.yaml", "compose.postgres.yaml"])
def test_compose_accepts_caddy_in_front(tmp_path: Path, other: str) -> None:
    """The API is private unless PROXY_PATHS says otherwise."""
    given = {"CADDY_IMAGE": f"caddy:2@sha256:{'0' * 64}", "PROXY_SITE": "darkroom.example"}
    text = composed(tmp_path, other, "compose.https.yaml", **SETTINGS, **given)
    assert "PROXY_PATHS: /images/*\n" in text


def test_caddy_passes_the_public_paths_alone(tmp_path: Path) -> None:
    given = {"PROXY_PATHS": "/images/* /v1/*", "PROXY_BACKEND": "web-1:8080 web-2:8080"}
    file = ("--adapter", "caddyfile", "--config", str(DEPLOY / "Caddyfile"))
    adapted = checked(program("caddy"), "adapt", *file, folder=tmp_path, **given)
    assert '"match":[{"path":["/.well-known/*","/images/*","/v1/*"]}]' in adapted
    assert adapted.count('"upstreams":[{"dial":"web-1:8080"},{"dial":"web-2:8080"}]') == 2
    assert adapted.count('"status_code":404') == 2


CALLBACK = "/callbacks/evolink/task_x/t"
PASSED = {CALLBACK, "/.well-known/endpoints/ep_x/jwks.json", "/images/img_x"}
API = {"/v1/tasks", "/console/"}
INSIDE = {"/metrics", "/readyz", "/metrics/", "/readyz/", "/%6detrics", "/%72eadyz"}
PROXIES: dict[str, tuple[tuple[str, ...], dict[str, str], set[str]]] = {
    "Caddyfile": (("caddy", "run", "--adapter", "caddyfile", "--config"), {}, PASSED | API),
    "Caddyfile behind compose.https.yaml": (
        *(("caddy", "run", "--adapter", "caddyfile", "--config"), {"PROXY_PATHS": "/images/*"}),
        PASSED,
    ),
    "haproxy-service.cfg": (("haproxy", "-db", "-f"), {}, PASSED | API),
    "README.md": (("caddy", "run", "--adapter", "caddyfile", "--config"), {}, {CALLBACK}),
}


def readme_example(folder: Path) -> Path:
    """The README's file for Caddy, with this test's addresses."""
    block = re.compile(r"^```text\n(hooks\.example \{\n.+?)^```", re.MULTILINE | re.DOTALL)
    (text,) = block.findall((ROOT / "README.md").read_text())
    text = text.replace("hooks.example", "{$PROXY_SITE}")
    file = folder / "Caddyfile"
    file.write_text(text.replace("127.0.0.1:8080", "{$PROXY_BACKEND}"))
    return file


def listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@contextmanager
def started(*command: str, folder: Path, **given: str) -> Iterator[None]:
    environment, nowhere = clean_environment(given), subprocess.DEVNULL
    with subprocess.Popen(command, env=environment, cwd=folder, stderr=nowhere) as process:
        try:
            yield
        finally:
            process.terminate()


class Anything(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


@pytest.mark.parametrize("kind", PROXIES)
async def test_receivers_reach_the_public_keys_through_a_proxy(tmp_path: Path, kind: str) -> None:
    """With what else is public. The figures of the service are not."""
    (name, *words), given, passed = PROXIES[kind]
    port, certificate = free_port(), self_signed(tmp_path)
    url = f"http://127.0.0.1:{port}" if name == "caddy" else f"https://127.0.0.1:{port}"
    given = given | {"HOME": str(tmp_path), "CADDY_ADMIN": "off", "PROXY_SITE": url}
    given |= {"PROXY_CERTIFICATE": str(certificate), "PROXY_BIND": f"127.0.0.1:{port}"}
    with ThreadingHTTPServer(("127.0.0.1", 0), Anything) as backend:
        threading.Thread(target=backend.serve_forever, daemon=True).start()
        given["PROXY_BACKEND"] = f"127.0.0.1:{backend.server_port}"
        own = readme_example(tmp_path) if kind == "README.md" else DEPLOY / kind.partition(" ")[0]
        command = (program(name), *words, str(own))
        with started(*command, folder=tmp_path, **given):
            await wait_until(lambda: listens(port))
            async with httpx.AsyncClient(base_url=url, verify=False, trust_env=False) as client:
                paths = PASSED | API | INSIDE
                got = {path: (await client.get(path)).status_code for path in paths}
        backend.shutdown()
    assert got == {path: 204 if path in passed else 404 for path in got}


def test_nats_accepts_its_file(tmp_path: Path) -> None:
    """Versions before 2.10 do not know `sync_interval: always`."""
    text = (DEPLOY / "nats.conf").read_text()
    assert "  sync_interval: always\n" in text
    file = tmp_path / "nats.conf"
    file.write_text(text.replace("  sync_interval: always\n", ""))
    checked(program("nats-server"), "-t", "-c", str(file), folder=tmp_path, NATS_PASSWORD="secret")


def test_compose_names_a_setting_that_is_missing(tmp_path: Path) -> None:
    """No service starts with an empty password or a key of its own."""
    text = (DEPLOY / "compose.postgres.yaml").read_text()
    for name in SETTINGS:
        uses = re.findall(rf"\${{{name}\b[^}}]*}}", text)
        assert uses
        assert all(re.fullmatch(rf"\${{{name}:\?.+ in \.env.*}}", use) for use in uses), uses
    given = {each: value for each, value in SETTINGS.items() if each != "POSTGRES_PASSWORD"}
    with pytest.raises(AssertionError, match=r"in \.env"):
        composed(tmp_path, "compose.postgres.yaml", **given)


def objects() -> list[dict[str, Any]]:
    """The objects of the Kubernetes base, without those that kustomize makes."""
    (base,) = yaml.safe_load_all((DEPLOY / "kubernetes" / "kustomization.yaml").read_text())
    files = [(DEPLOY / "kubernetes" / name).read_text() for name in base["resources"]]
    return [each for file in files for each in yaml.safe_load_all(file)]


def test_kubernetes_accepts_the_base() -> None:
    """Every field exists in the current API, and every selector finds the pods of a deployment."""
    made = objects()
    for each in made:
        kubernetes_validate.validate(each, kubernetes_validate.latest_version(), strict=True)
    pods = {
        each["metadata"]["name"]: each["spec"]["template"]
        for each in made
        if each["kind"] == "Deployment"
    }
    assert pods.keys() == {"web", "worker"}
    for each in made:
        selector = each.get("spec", {}).get("selector", {})
        labels = selector.get("matchLabels", selector)
        assert [pod for pod in pods.values() if labels.items() <= pod["metadata"]["labels"].items()]
    for pod in pods.values():
        (container,) = pod["spec"]["containers"]
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        probes = ("startupProbe", "livenessProbe", "readinessProbe")
        assert [container[probe]["httpGet"]["path"] for probe in probes] == [
            *("/healthz", "/healthz", "/readyz")
        ]


def test_the_kubernetes_base_sets_settings_that_exist() -> None:
    (base,) = yaml.safe_load_all((DEPLOY / "kubernetes" / "kustomization.yaml").read_text())
    (settings,) = base["configMapGenerator"]
    for literal in settings["literals"]:
        name = literal.partition("=")[0].removeprefix("DARKROOM_").lower()
        assert name in Settings.model_fields


def test_kustomize_builds_the_base(tmp_path: Path) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    built = checked(kubectl, "kustomize", str(DEPLOY / "kubernetes"), folder=tmp_path)
    kinds = [each["kind"] for each in yaml.safe_load_all(built)]
    assert sorted(kinds) == sorted([*(each["kind"] for each in objects()), "ConfigMap"])
