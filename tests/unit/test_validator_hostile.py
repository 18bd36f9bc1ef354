"""Pictures made to do harm: judged in a process of their own, whose memory and time are looked
at.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from service.ids import EXTENSIONS
from service.images.validator_child import MEDIA_TYPES
from tests.environment import ROOT, clean_environment
from tests.image_costs import BROKEN
from tests.pictures import bombs, samples

MAX_PIXELS = 1 << 22
PIXEL = 24  # bytes, as docs/operations.md says
SECONDS = 10  # of the processor; most take a millisecond
SAFE = {"image/png", "image/jpeg", "image/webp", "image/gif", "image/avif"}


def judged(what: str) -> dict[str, Any]:
    """What `tests.image_costs` tells; every picture kept its limits of time and memory, and has a
    type that is safe to serve.
    """
    command = [sys.executable, "-m", "tests.image_costs", what, str(MAX_PIXELS)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=clean_environment({}),
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told: dict[str, Any] = json.loads(done.stdout)
    assert {name: peak for name, peak in told["peaks"].items() if peak > PIXEL * MAX_PIXELS} == {}
    assert {name: seconds for name, seconds in told["seconds"].items() if seconds > SECONDS} == {}
    assert told["kinds"].keys() <= SAFE
    return told


def test_only_types_that_cannot_run_are_served() -> None:
    """Nothing that a browser would execute or hand to a program has a name here."""
    assert set(MEDIA_TYPES.values()) == SAFE == set(EXTENSIONS)


def test_a_bomb_costs_what_its_pixels_would() -> None:
    """What swells is not read, what is too much is refused, and neither takes memory or time."""
    told, names = judged("bombs"), bombs().keys()
    assert told["judged"] == len(names)
    harmless = {
        "png whose pixels swell",
        "png with profiles that swell",
        "png of empty chunks",
        "jpeg with exif that swells",
        "jpeg of segments",
        "jpeg of comments",
        "jpeg of scans",
        "jpeg of pictures",
        "webp of chunks",
    }
    assert names - told["said"].keys() == harmless


def test_thousands_of_broken_pictures_do_no_harm() -> None:
    """Flipped, cut, doubled and mixed bytes of each format: each is a picture or none."""
    told = judged("broken")
    assert told["judged"] == BROKEN * len(samples())
    assert told["kinds"].keys() == SAFE  # some of them are still whole


def test_the_image_librarys_own_tests_do_no_harm() -> None:
    """Its pictures, among them those that once made it crash, hang or swell."""
    folder = ROOT / ".venv" / "pictures"
    if not folder.is_dir():
        said = "no test pictures in .venv/pictures: make pictures"
        pytest.fail(said, pytrace=False) if os.environ.get("CI") else pytest.skip(said)
    told = judged(str(folder))
    assert told["judged"] > 900
    assert sum(told["kinds"].values()) > 450
    assert told["kinds"].keys() == SAFE
