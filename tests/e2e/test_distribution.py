"""What is shipped: the wheel that the image's build steps make in a bare folder, and builds that
depend on neither place nor time.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import httpx
import pytest
from packaging.requirements import Requirement

from service import VERSION
from tests.environment import ROOT, START_S, clean_environment
from tests.servers import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

DOCKERFILE = re.sub(r"\\\n", "", (ROOT / "Dockerfile").read_text())
BUILD, FINAL = re.split(r"^FROM .*$", DOCKERFILE, flags=re.MULTILINE)[1:]
LOCKED = re.compile(
    r"pip (--python /venv/bin/python )?install --no-deps --require-hashes -r (\S+\.lock)"
)
KEY = "admin-key-of-the-image"
PROMPT = {"model": "wan2.5-text-to-image", "prompt": "a lighthouse"}


def bare(path: str, **more: str) -> dict[str, str]:
    """An environment in which only the locked packages are found."""
    environment = clean_environment({"PATH": f"{path}:/usr/bin:/bin", **more})
    del environment["PYTHONPATH"]
    return environment


def run(command: str, folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        ["/bin/sh", "-ec", command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    return done.stdout


def copied(name: str, packages: Path) -> str:
    """Copies a package of this environment, with its bytecode. Returns its version."""
    found = metadata.distribution(name)
    for file in found.files or ():
        if ".." not in file.parts:  # no scripts
            (packages / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file.locate(), packages / file)
    return found.version


def installed(lock: Path, packages: Path) -> None:
    """Copies what pip would install, which saves what the packages' index costs. `make setup` made
    this environment with the same command, so pip checked the hashes then, and not here.
    """
    assert f"install --no-deps --require-hashes -r {lock.name}" in (ROOT / "Makefile").read_text()
    pinned = re.findall(r"^(\S.*) \\\n +--hash=sha256:", lock.read_text(), re.MULTILINE)
    assert len(pinned) == len(re.findall(r"^\S", lock.read_text(), re.MULTILINE)) > 0
    for each in map(Requirement, pinned):
        if each.marker is None or each.marker.evaluate():
            assert each.specifier.contains(copied(each.name, packages)), each


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of the image's build stage. Its COPY lines alone bring files of the project in."""
    root = tmp_path_factory.mktemp("image")
    (root / "src").mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root / "base"], check=True)
    packages = next((root / "base").glob("lib/python*/site-packages"))
    copied("pip", packages)
    pip = root / "base" / "bin" / "pip"
    pip.write_text(f"#!{root}/base/bin/python\nfrom pip._internal.cli.main import main as m; m()\n")
    pip.chmod(0o700)
    environment = bare(f"{root}/base/bin", PIP_NO_COMPILE="no")  # a "no" turns the option on
    for word, rest in re.findall(r"^([A-Z]+) (.*)$", BUILD, re.MULTILINE):
        if word == "ENV":
            environment |= dict(pair.split("=") for pair in rest.split())
        elif word == "COPY":
            for source in rest.split()[:-1]:
                copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                copy(ROOT / source, root / "src" / source)
        elif word == "RUN":
            command = re.sub(r"(?<=[ =])/(venv|data|wheel)\b", rf"{root}/\1", rest)
            if found := LOCKED.fullmatch(rest):
                place = root / ("venv" if found[1] else "base")
                installed(root / "src" / found[2], next(place.glob("lib/python*/site-packages")))
            else:
                run(command, root / "src", environment)
    return root


def test_the_images_steps_make_a_service_that_works(image: Path, tmp_path: Path) -> None:
    """The wheel contains the console's files and the sandbox's font. The image's health check
    finds the service ready.
    """
    port = free_port()
    environment = bare(
        f"{image}/venv/bin", DARKROOM_PORT=str(port), DARKROOM_DATA_DIR=str(tmp_path)
    )
    assert VERSION in run("darkroom-service --version", tmp_path, environment)
    (check,) = re.findall(r"^HEALTHCHECK .*CMD (\[.*\])$", FINAL, re.MULTILINE)
    with subprocess.Popen(
        ["darkroom", "serve", "--sandbox"],
        cwd=tmp_path,
        env=environment | {"DARKROOM_ADMIN_KEY": KEY},
        executable=image / "venv/bin/darkroom",
    ) as service:
        try:
            command = shlex.join(json.loads(check))
            run(
                f"for i in $(seq {START_S}); do {command} && exit; sleep 1; done; exit 1",
                tmp_path,
                environment,
            )
            headers = {"authorization": f"Bearer {KEY}", "prefer": "wait=60"}
            with httpx.Client(
                base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=90, trust_env=False
            ) as client:
                task = client.post("/v1/images/generations", json=PROMPT).json()
                assert client.get(task["results"][0]).content[:4] == b"\x89PNG"
                page = client.get("/console/sign-in")
                files = re.findall(r'(?:src|href)="([^"]+\.(?:css|svg)[^"]*)"', page.text)
                assert files
                for path in (*files, "/docs"):
                    assert client.get(path).status_code == 200, path
        finally:
            service.terminate()
    assert service.returncode == 0


def test_the_package_and_its_changelog_have_this_version() -> None:
    versions = re.findall(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == VERSION
    assert VERSION in versions[:2]  # after what is unreleased, if there is anything


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_a_build_depends_on_neither_place_nor_time(kind: str, tmp_path: Path) -> None:
    made = []
    for number, seconds in enumerate((1_000_000_000, 1_700_000_000)):
        tree = tmp_path / ("a" * (number + 1))
        tree.mkdir()
        for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"):
            shutil.copy(ROOT / name, tree)
        shutil.copytree(ROOT / "service", tree / "service")
        for path in tree.rglob("*"):
            os.utime(path, (seconds, seconds))
        command = f"{sys.executable} -m hatchling build --target {kind} --directory dist"
        run(command, tree, bare("/nowhere", TZ=("UTC", "Asia/Tokyo")[number]))
        (built,) = (tree / "dist").iterdir()
        made.append((built.name, built.read_bytes()))
    assert made[0] == made[1]


RUNNERS = {
    "uvx": f"uvx --quiet --python {sys.executable} --from {{}} darkroom-service",
    "pipx": f"uvx --quiet pipx run --python {sys.executable} --spec {{}} darkroom-service",
}


@pytest.mark.skipif(not shutil.which("uvx"), reason="uvx is not installed")
@pytest.mark.parametrize("runner", RUNNERS)
def test_the_wheel_runs_by_its_own_name(image: Path, tmp_path: Path, runner: str) -> None:
    """The distribution has a script of its name beside `darkroom`, and needs no set-up before it
    answers.
    """
    (wheel,) = (image / "wheel").glob("*.whl")
    environment = bare(os.environ["PATH"], PIPX_HOME=str(tmp_path / "pipx"))
    command = RUNNERS[runner].format(wheel)
    tried = subprocess.run(
        [*command.split(), "openapi", "--json"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if re.search("error sending request|Failed to fetch|dns error", tried.stderr):
        pytest.skip("uv reaches no package index")
    assert tried.returncode == 0, tried.stderr
    assert json.loads(tried.stdout)["info"]["version"] == VERSION
