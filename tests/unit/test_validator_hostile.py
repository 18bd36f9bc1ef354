"""Hostile images, checked in a child process whose memory and time are measured."""

import json
import os
from typing import Any

import pytest

from service.ids import EXTENSIONS
from service.images.validator_child import FORMATS, media_type
from tests.environment import ROOT, run_module
from tests.image_costs import BROKEN
from tests.pictures import bombs, samples

MAX_PIXELS = 1 << 22
PIXEL = 24  # bytes per pixel, from docs/operations.md
SECONDS = 10  # of processor time, most take a millisecond
SAFE = {"image/png", "image/jpeg", "image/webp", "image/gif", "image/avif"}


def checked(what: str) -> dict[str, Any]:
    """The report of `tests.image_costs`. Every image kept its limits of memory and time, and has a
    type that is safe to serve.
    """
    done = run_module("tests.image_costs", what, str(MAX_PIXELS), limit_s=110)
    assert done.returncode == 0, done.stderr[-2000:]
    report: dict[str, Any] = json.loads(done.stdout)
    assert {name: peak for name, peak in report["peaks"].items() if peak > PIXEL * MAX_PIXELS} == {}
    assert {name: seconds for name, seconds in report["seconds"].items() if seconds > SECONDS} == {}
    assert report["kinds"].keys() <= SAFE
    return report


def test_only_types_that_cannot_run_are_served() -> None:
    """No type is one that a browser executes or hands to another program. Input images may also
    be BMP or TIFF files.
    """
    assert {media_type(format) for format in FORMATS} == SAFE
    assert set(EXTENSIONS) == {*SAFE, "image/bmp", "image/tiff"}


def test_a_decompression_bomb_stays_within_its_limits() -> None:
    """Parts that expand are not read, and too many pixels are refused."""
    report, names = checked("bombs"), bombs().keys()
    assert report["judged"] == len(names)
    harmless = {
        "png whose pixels swell",
        "png with profiles that swell",
        "png of empty chunks",
        "jpeg with exif that swells",
        "jpeg of segments",
        "jpeg of comments",
        "jpeg of scans",
        "jpeg of 0xff",
        "jpeg of pictures",
        "webp of chunks",
    }
    assert names - report["said"].keys() == harmless


def test_thousands_of_broken_images_stay_within_their_limits() -> None:
    """The bytes of each format are flipped, cut, doubled and mixed."""
    report = checked("broken")
    assert report["judged"] == BROKEN * len(samples())
    assert report["kinds"].keys() == SAFE  # some of them are still whole images


def test_pillows_own_test_images_stay_within_their_limits() -> None:
    """Some of them once made the library crash, hang or use too much memory."""
    folder = ROOT / ".venv" / "pictures"
    if not folder.is_dir():
        said = "no test pictures in .venv/pictures: make pictures"
        pytest.fail(said, pytrace=False) if os.environ.get("CI") else pytest.skip(said)
    report = checked(str(folder))
    assert report["judged"] > 900
    assert sum(report["kinds"].values()) > 450
    assert report["kinds"].keys() == SAFE
