"""`make demo`, run as a user runs it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.environment import ROOT, clean_environment


@pytest.mark.timeout(300)
def test_the_demo_ends_well_and_leaves_its_files(tmp_path: Path) -> None:
    """`make demo` of the README: the last line, exit code 0, the files that it leaves, and a store
    that it empties first.
    """
    (tmp_path / "demo-data").mkdir()
    (tmp_path / "demo-data" / "stale").touch()
    command = [sys.executable, str(ROOT / "deploy" / "demo.py")]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=clean_environment({"DARKROOM_PORT": "nonsense"}),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "demo: 6 tasks, 12 events, 7 images, 0 lost, 0 doubled"
    assert (
        len(re.findall(r"image\.task\.\w+ .* evt_[a-z2-7]{26}  signature verified", done.stdout))
        == 12
    )
    uploads = re.findall(r"^  uploaded   file_[a-z2-7]{26}  640x480", done.stdout, re.MULTILINE)
    assert len(uploads) == 2
    (ledger,) = re.findall(r"^the ledger, in credits$(.*)", done.stdout, re.MULTILINE | re.DOTALL)
    tasks = re.split(r"^  task_[a-z2-7]{26}  ", ledger, flags=re.MULTILINE)[1:]
    assert [re.findall(r"^    (\w+ +-?\d+)  by", task, re.MULTILINE) for task in tasks] == [
        ["estimate     8", "reserve      8", "reserve     -8", "charge       8"],
        *([["estimate     2", "reserve      2", "reserve     -2"]] * 2),
        *([["estimate     2", "reserve      2", "reserve     -2", "charge       2"]] * 3),
    ]
    assert "  14 credits were spent, as the upstream's record says" in done.stdout
    assert "雾中的灯塔" in done.stdout
    left = {path.name for path in (tmp_path / "demo-data").iterdir()}
    assert {"service.log", "sandbox.log", "images", "darkroom.db"} <= left
    assert "stale" not in left
    images = tmp_path / "demo-data" / "images"
    assert [len(list(images.glob(f"{of}_*/*.png"))) for of in ("task", "file")] == [7, 2]


def test_a_demo_that_cannot_run_says_why_and_where_to_look(tmp_path: Path) -> None:
    """A failure prints one line with the reason and the place of the logs, and the exit code is not
    zero.
    """
    (tmp_path / "demo-data").write_text("in the way")
    command = [sys.executable, str(ROOT / "deploy" / "demo.py")]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=clean_environment({}),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.strip().startswith("demo failed: NotADirectoryError")
    assert "demo-data/service.log" in done.stderr
    assert "Traceback" not in done.stderr
