"""`make sbom` lists the locked packages as CycloneDX."""

import json
import tarfile
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]  # it has no types
import pytest
from referencing import Registry
from referencing.jsonschema import DRAFT7

from deploy.sbom import LOCK, document, locked

# The schemas of CycloneDX 1.6 under the Apache licence that the archive holds.
SCHEMAS = Path(__file__).parents[1] / "fixtures" / "cyclonedx.tar.xz"
JSON = dict[str, Any]


@pytest.fixture(scope="module")
def schemas() -> dict[str, JSON]:
    with tarfile.open(SCHEMAS) as archive:
        return {
            f"http://cyclonedx.org/schema/{Path(member.name).name}": json.load(file)
            for member in archive
            if member.name.endswith(".json") and (file := archive.extractfile(member))
        }


def test_the_document_is_valid(schemas: dict[str, JSON]) -> None:
    """It conforms to the schema of CycloneDX 1.6."""
    resources = {uri: DRAFT7.create_resource(schema) for uri, schema in schemas.items()}
    registry: Registry[Any] = Registry().with_resources(resources.items())
    (schema,) = (schema for uri, schema in schemas.items() if "/bom-" in uri)
    jsonschema.Draft7Validator(schema, registry=registry).validate(document(LOCK.read_text()))


def test_the_document_names_every_locked_package() -> None:
    """Each installed package has a licence. Every dependency is a listed package."""
    pins = locked(LOCK.read_text())
    made = document(LOCK.read_text())
    assert [part["name"] for part in made["components"]] == [pin.name for pin in pins]
    assert all(part.get("licenses", True) for part in made["components"])
    graph = {node["ref"]: node["dependsOn"] for node in made["dependencies"]}
    assert {ref for refs in graph.values() for ref in refs} <= set(graph)
    assert len(graph[made["metadata"]["component"]["bom-ref"]]) >= 15
