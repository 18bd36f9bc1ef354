"""What the container promises: images by digest, and limits."""

import re

import pytest

from tests.environment import ROOT

DIGEST = re.compile(r"[a-z0-9./-]+(:[A-Za-z0-9._-]+)?@sha256:[0-9a-f]{64}")
COMPOSE = (ROOT / "deploy" / "compose.yaml").read_text()


def test_every_base_image_is_named_by_its_digest() -> None:
    """An argument in a FROM line counts with its default. Stages of the file are no images."""
    text = (ROOT / "Dockerfile").read_text()
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)", text, re.MULTILINE))
    stages = set(re.findall(r" AS (\w+)$", text, re.MULTILINE))
    used = re.findall(r"(?:^FROM |--from=)(\S+)", text, re.MULTILINE)
    images = {re.sub(r"\$\{(\w+)\}", lambda name: arguments[name[1]], each) for each in used}
    assert images - stages
    assert all(DIGEST.fullmatch(image) for image in images - stages)


def test_compose_uses_no_image_of_a_registry_without_a_digest() -> None:
    services = re.split(r"\n(?=  \w)", COMPOSE.partition("\nservices:\n")[2])
    for service in services:
        for image in re.findall(r"^ +image: (\S+)", service, re.MULTILINE):
            assert re.search(r"^ +build:", service, re.MULTILINE) or DIGEST.fullmatch(image)


@pytest.mark.parametrize(
    "line",
    [
        *("mem_limit: 1g", "pids_limit: 1024", "nofile: 20512"),
        *("read_only: true", "no-new-privileges:true"),
    ],
)
def test_compose_limits_the_container(line: str) -> None:
    assert re.search(rf"^ +(- )?{re.escape(line)}\b", COMPOSE, re.MULTILINE)
