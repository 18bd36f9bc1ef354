"""The lock files pin all packages with all extras, and name no index."""

import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import requires
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.sbom import applies, installed, locked
from tests.environment import ROOT

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
RUN: list[str] = [
    *PROJECT["project"]["dependencies"],
    *(text for extra in PROJECT["project"]["optional-dependencies"].values() for text in extra),
]
GROUPS: dict[str, list[str]] = PROJECT["dependency-groups"]
WANTED = {
    "requirements.lock": RUN,
    "requirements-dev.lock": [*RUN, *GROUPS["dev"]],
    "requirements-build.lock": GROUPS["build"],
}

requirements_of = cache(requires)


def problems(lock: str, wanted: Sequence[str], python: str | None = None) -> Iterator[str]:
    """The requirements that a lock does not satisfy on a Python, by default on this one. Each is a
    sentence.

    The installed packages list their requirements. For another Python, the lock may pin another
    version of a package. That version is not installed here, so its requirements are unknown.
    """
    environment = {"python_version": python, "python_full_version": f"{python}.0"} if python else {}
    pins = {pin.name: pin for pin in locked(lock) if applies(pin, (), environment)}
    required = [("the project", Requirement(text)) for text in wanted]
    for name, pin in pins.items():
        if installed(pin):
            required += [
                (name, requirement)
                for requirement in map(Requirement, requirements_of(name) or ())
                if applies(requirement, pin.extras, environment)
            ]
        elif not python:
            yield f"{pin} is not installed"
    for package, requirement in required:
        found = pins.get(canonicalize_name(requirement.name))
        if (
            found is None
            or not requirement.specifier.contains(str(found.specifier)[2:], prereleases=True)
            or not requirement.extras <= found.extras
        ):
            yield f"{package} requires {requirement}, the lock has {found}"


@pytest.mark.parametrize("python", [None, "3.11", "3.12", "3.13"])
@pytest.mark.parametrize("name", WANTED)
def test_a_lock_satisfies_every_requirement(name: str, python: str | None) -> None:
    """pip does not resolve a lock. The lock must contain everything that the project, its packages
    and their extras require.
    """
    assert list(problems((ROOT / name).read_text(), WANTED[name], python)) == []


@pytest.mark.parametrize(
    ("pattern", "replacement", "problem"),
    [
        (r"^coverage\[toml\]==\S+", "coverage[toml]==7.10.1", "pytest-cov requires coverage"),
        (r"^coverage\[toml\]==", "coverage==", "pytest-cov requires coverage"),
        (r"^moto\[server\]==", "moto==", "the project requires moto"),
        (r"^flask-cors==.*\n(    .*\n)+", "", "moto requires flask-cors"),
    ],
    ids=["version", "extra of a package", "extra of the project", "package that an extra requires"],
)
def test_a_gap_in_a_lock_is_found(pattern: str, replacement: str, problem: str) -> None:
    """The gap is a version that is too low, a lost extra, or a package that only an extra
    requires.
    """
    name = "requirements-dev.lock"
    broken, count = re.subn(pattern, replacement, (ROOT / name).read_text(), flags=re.MULTILINE)
    assert count == 1
    assert any(found.startswith(problem) for found in problems(broken, WANTED[name], "3.11"))


@pytest.mark.parametrize("name", WANTED)
def test_a_lock_names_no_index(name: str) -> None:
    """A machine installs the packages from its own index. The hashes prove that they are the
    same.
    """
    text = (ROOT / name).read_text()
    assert "://" not in text
    assert not re.search(r"^-", text, re.MULTILINE)
    assert len(locked(text)) == len(re.findall(r"^\S", text, re.MULTILINE))


def test_the_lock_for_javascript_pins_by_hash_and_names_no_registry() -> None:
    """npm writes the address of each package into a lock unless it is told not to."""
    packages = json.loads((ROOT / "tests/consumers/package-lock.json").read_text())["packages"]
    del packages[""]
    assert {name for name, pin in packages.items() if "resolved" in pin} == set()
    assert {name for name, pin in packages.items() if "integrity" not in pin} == set()
