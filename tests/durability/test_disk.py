"""Tests of the model of the disk that the power-cut tests rely on: small traced programs with known
losses.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.durability.disk import Disk, kept, lost
from tests.durability.trace import moments, tracing

WRITE = (
    "file = os.open(at('new'), os.O_CREAT | os.O_WRONLY); os.write(file, b'ab');"
    " os.write(file, b'cd')\n"
)
NAMES = "os.fsync(os.open(at('.'), os.O_RDONLY))\n"
OLD = {"old": b"old"}
CASES = {
    "a name that was never synced": (WRITE + "os.fsync(file)", OLD),
    "data that was never synced": (WRITE + NAMES, OLD | {"new": b""}),
    "both synced": (WRITE + "os.fdatasync(file)\n" + NAMES, OLD | {"new": b"abcd"}),
    "written again after the sync": (
        WRITE + "os.fsync(file); os.pwrite(file, b'x', 1)\n" + NAMES,
        OLD | {"new": b"abcd"},
    ),
    "all synced": (WRITE + "os.sync()", OLD | {"new": b"abcd"}),
    "a rename that was never synced": ("os.rename(at('old'), at('other'))", OLD),
    "a removal that was never synced": ("os.unlink(at('old'))", OLD),
    "a removal": ("os.unlink(at('old'))\n" + NAMES, {}),
    "a link": ("os.link(at('old'), at('other'))\n" + NAMES, OLD | {"other": b"old"}),
    "cut short": (
        "os.truncate(at('old'), 1); os.fsync(os.open(at('old'), os.O_RDONLY))",
        {"old": b"o"},
    ),
    "through another descriptor": (
        WRITE + "os.fsync(os.dup(os.open(at('new'), os.O_RDONLY)))\n" + NAMES,
        OLD | {"new": b"abcd"},
    ),
    "a folder whose own name was never synced": (
        "os.mkdir(at('a'))\n" + (WRITE + "os.fsync(file)\n" + NAMES).replace("at('", "at('a/"),
        OLD,
    ),
    "moved into another folder": (
        "os.mkdir(at('a'))\n"
        + WRITE
        + (
            "os.fsync(file); os.rename(at('new'), at('a/b')); os.fsync(os.open(at('a'),"
            " os.O_RDONLY))\n"
        )
        + NAMES,
        OLD | {"a/b": b"abcd"},
    ),
    "moved out of a folder alone": (
        "os.mkdir(at('a'))\n" + WRITE + "os.fsync(file); os.rename(at('new'), at('a/b'))\n" + NAMES,
        OLD,
    ),
}


def found(place: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(place)): path.read_bytes()
        for path in place.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("name", CASES)
def test_only_what_was_synced_is_left(name: str, tmp_path: Path) -> None:
    """After a power cut the disk has data whose file was synced and names whose folder was synced.
    With all unsynced writes kept, it equals what programs see.
    """
    program, left = CASES[name]
    place, output = tmp_path / "place", tmp_path / "trace"
    place.mkdir()
    (place / "old").write_bytes(b"old")
    disk = Disk(place)
    command = [
        *tracing(output),
        sys.executable,
        "-I",
        "-S",
        "-c",
        f"import os\nat = {str(place)!r}.__add__('/').__add__\n{program}",
    ]
    subprocess.run(command, check=True)
    for moment in moments(output.read_text("ascii").splitlines(), {}):
        disk.observe(moment)
    assert disk.left(lost) == left
    assert disk.left(kept) == found(place)
    disk.lay(tmp_path / "after")
    assert found(tmp_path / "after") == left


def test_a_sync_covers_what_was_written_before_it_began(tmp_path: Path) -> None:
    """A write between the start and the end of a sync may be lost."""
    (tmp_path / "file").write_bytes(b"")
    path = "".join(f"\\x{byte:02x}" for byte in bytes(tmp_path / "file"))
    lines = [
        f'1 pwrite64(3<{path}>, "\\x61", 1, 0) = 1',
        f"1 fdatasync(3<{path}> <unfinished ...>",
        f'2 pwrite64(3<{path}>, "\\x62", 1, 1) = 1',
        "1 <... fdatasync resumed>) = 0",
        f"2 fdatasync(3<{path}> <unfinished ...>",
        "2 +++ killed by SIGKILL +++",
    ]
    disk = Disk(tmp_path)
    for moment in moments(lines, {}):
        disk.observe(moment)
    assert disk.left() == {"file": b"a"}
