"""Prints the packages of `requirements.lock` as a CycloneDX document: `make sbom`.

The installed packages tell their licences and requirements. A package that the lock pins for
another system is a component without them. One lock always makes one document.
"""

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

JSON = dict[str, Any]
LOCK = Path(__file__).parents[1] / "requirements.lock"
PROJECT = "darkroom-service"
APPROVED = "License :: OSI Approved :: "


def locked(lock: str) -> list[Requirement]:
    """The packages that a lock file pins."""
    return [Requirement(line) for line in re.findall(r"^(\S.*) \\$", lock, re.MULTILINE)]


def applies(
    requirement: Requirement,
    extras: Iterable[str] = (),
    environment: Mapping[str, str] | None = None,
) -> bool:
    """Whether a requirement holds in this environment, changed by `environment`."""
    marker = requirement.marker
    return marker is None or any(
        marker.evaluate({**(environment or {}), "extra": extra}) for extra in ("", *extras)
    )


@cache
def installed(pin: Requirement) -> bool:
    try:
        return pin.specifier.contains(version(pin.name), prereleases=True)
    except PackageNotFoundError:
        return False


def required(pin: Requirement) -> list[Requirement]:
    """What an installed package with these extras requires here."""
    found = map(Requirement, requires(pin.name) or ())
    return [requirement for requirement in found if applies(requirement, pin.extras)]


def component(pin: Requirement, kind: str = "library") -> JSON:
    name, pinned = pin.name, str(pin.specifier).removeprefix("==")
    purl = f"pkg:pypi/{name}@{pinned}"
    described = {"type": kind, "bom-ref": purl, "name": name, "version": pinned, "purl": purl}
    return described | ({"licenses": licences(name)} if installed(pin) else {})


def licences(name: str) -> list[JSON]:
    """The SPDX expression of an installed package, otherwise the name of its licence."""
    told = metadata(name)
    if expressions := told.get_all("License-Expression"):
        return [{"expression": expressions[0]}]
    approved = [
        text.removeprefix(APPROVED)
        for text in told.get_all("Classifier", [])
        if text.startswith(APPROVED)
    ]
    names = approved or [text.splitlines()[0] for text in told.get_all("License", [])]
    return [{"license": {"name": text}} for text in names]


def document(lock: str) -> JSON:
    extras = metadata(PROJECT).get_all("Provides-Extra", [])
    project = Requirement(f"{PROJECT}[{','.join(extras)}]=={version(PROJECT)}")
    components = {pin: component(pin) for pin in locked(lock)}
    refs = {pin.name: part["bom-ref"] for pin, part in components.items() if installed(pin)}
    top = component(project, "application")
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": top},
        "components": list(components.values()),
        "dependencies": [
            {
                "ref": part["bom-ref"],
                "dependsOn": sorted(
                    {refs[canonicalize_name(requirement.name)] for requirement in required(pin)}
                ),
            }
            for pin, part in [(project, top), *components.items()]
            if installed(pin)
        ],
    }


if __name__ == "__main__":
    print(json.dumps(document(LOCK.read_text()), indent=2))
