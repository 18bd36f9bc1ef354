"""The benchmarks run and print their tables. The tests do not judge the figures."""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import standardwebhooks

from tests.bench import acknowledgement, scaling
from tests.bench.acknowledgement import LACKING, ROWS, compile_shim, lacking
from tests.bench.delivery import KINDS, covered
from tests.bench.forks import printed
from tests.bench.peers import contenders
from tests.bench.peers.kills import judged
from tests.bench.peers.speed import Result, Scale
from tests.bench.program import spread, written
from tests.bench.servers import PICTURES, picture
from tests.environment import run_module
from tests.servers import missing, postgres_binaries


@pytest.mark.timeout(300)
def test_the_benchmark_runs_and_prints_its_tables(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """`make bench` succeeds, prints a line on the machine, fills every row that the machine can
    have, names the others, compares its load with `wrk` or says that it is missing, and leaves no
    files.
    """
    if postgres_binaries():  # to start another server takes longer than the rows
        server = nullcontext(request.getfixturevalue("postgres_server"))
        monkeypatch.setattr(acknowledgement, "postgres_running", lambda _: server)
    told = printed(capsys, "tests.bench", "--quick", "--folder", str(tmp_path))
    assert re.match(
        r"`make bench` on \d+ cores, Python 3\.\d+\.\d+, Linux \S+, SQLite \S+, fdatasync\s\d+\.\d"
        r"\sms\.",
        told,
    )
    row = r"^\| [^|]+ \| \d+ \|( \d+\.\d \|){2}( \d+\.\d\d \|){2}$"
    assert len(re.findall(row, told, re.MULTILINE)) == len(ROWS) - len(lacking())
    assert all(line in told.splitlines() for line in lacking().values())
    row = r"^\| [^|]+ \|( \d+\.\d \|){6}$"
    assert len(re.findall(row, told, re.MULTILINE)) == len(KINDS)
    assert re.search(r"^`wrk` (gets \d+ answers|is not installed)", told, re.MULTILINE)
    assert not list(tmp_path.iterdir())


@pytest.mark.timeout(300)
def test_the_benchmark_of_deliveries_fills_its_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each number of endpoints has its rates and their ratio. Each event has come once, or the
    benchmark fails.
    """
    told = printed(capsys, "tests.bench.deliveries", "--quick", "--folder", str(tmp_path))
    row = r"^\| (\d+) \| \d+ \| [1-9]\d* \| [1-9]\d* \| \d+\.\d\d \|$"
    assert re.findall(row, told, re.MULTILINE) == ["1", "10", "100"]
    assert re.search(r"^The receiver used at most \d+% of its core", told, re.MULTILINE)
    assert not list(tmp_path.iterdir())


@pytest.mark.timeout(300)
def test_the_benchmark_of_attacks_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Each attack has a row. So has each number of owners with silent endpoints."""
    figures = r"\|( \d+\.\d \|){3}$"
    told = printed(capsys, "tests.bench.attacks", "--quick")
    assert re.search(rf"^\| slow bodies {figures}", told, re.MULTILINE)
    told = printed(capsys, "tests.bench.silent_endpoints", "--quick")
    assert re.search(rf"^\| 1000 [^|]* 10 owners {figures}", told, re.MULTILINE)


@pytest.mark.timeout(300)
def test_the_benchmark_of_submissions_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both tables have all rows, filled with numbers, and nothing is left on the disk."""
    told = printed(capsys, "tests.bench.submissions", "--quick", "--folder", str(tmp_path))
    number, rows = r"-?\d+\.\d+", told.splitlines()
    assert rows[0].startswith("`python -m tests.bench.submissions` on ")
    flood = [
        row for row in rows if re.fullmatch(rf"\| [^|]+ \| \d+ \|( {number} \|){{3}} \d+ \|", row)
    ]
    alone = [row for row in rows if re.fullmatch(rf"\| [^|]+ \|( {number} \|){{2}}", row)]
    assert (len(flood), len(alone)) == (3, 3)
    assert not list(tmp_path.iterdir())


@pytest.mark.timeout(300)
def test_the_benchmark_of_memory_runs() -> None:
    """It prints the memory at first and after each tenth of the callbacks."""
    done = run_module("tests.bench.memory", "--callbacks", "500", limit_s=280)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\d+(, \d+){10}", done.stdout.splitlines()[-1])


@pytest.mark.timeout(300)
def test_the_benchmark_of_downloads_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table has every row for both pictures. Without `curl` two of them are missing."""
    told = printed(capsys, "tests.bench.downloads", "--quick", "--folder", str(tmp_path))
    missing = "`curl` is not installed" in told
    assert missing == (shutil.which("curl") is None)
    rows = [line for line in told.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == (9 if missing else 11)
    assert all(re.fullmatch(r"\| [^|]+ \|( \d+\.\d+ \|){2}", row) for row in rows), rows
    assert not list(tmp_path.iterdir())


@pytest.mark.timeout(300)
def test_the_comparison_with_peers_runs(tmp_path: Path) -> None:
    """All tables have a row for each contender. Their packages take 45 s to install, so CI does
    without.
    """
    if "DARKROOM_TEST_PEERS" not in os.environ:
        pytest.skip("DARKROOM_TEST_PEERS is not set, and the peers' packages are 180 MB")
    arguments = ("--quick", "--only", "arq", "--folder", str(tmp_path))
    done = run_module("tests.bench.peers", *arguments, limit_s=280)
    assert done.returncode == 0, done.stderr
    speeds = re.findall(r"^\| [^|]*arq[^|]* \|( [\d.]+ \|){4} \D", done.stdout, re.MULTILINE)
    assert len(speeds) == 4
    assert re.search(r"^\| [^|]*arq[^|]* \|( \d+ \|){6} ", done.stdout, re.MULTILINE)
    assert not list(tmp_path.iterdir())


def test_the_table_of_processes_has_a_row_for_each_number() -> None:
    """With the CPU of the service and of the server apart."""
    made = Result(rate=20, cpu=0.03, server_cpu=0.005, waits=[0.02, 0.04])
    table = scaling.table({count: [made] for count in scaling.PROCESSES}, Scale(10, 2))
    assert table.splitlines()[2:] == [
        f"| {count} | 20 | 30.0 | 5.0 | 20 | 40 |" for count in (1, 2, 4)
    ]


def test_a_peer_whose_packages_are_missing_is_skipped_with_a_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The line names the command that installs them. Darkroom itself is never missing."""
    monkeypatch.setattr(contenders, "PYTHON", tmp_path / "python")
    lines = [contenders.missing(each) for each in contenders.CONTENDERS]
    assert lines[0] is None
    assert all(line is not None and "skipped, `make bench-peers`" in line for line in lines[1:])


def test_the_verdict_on_killed_peers_counts_what_clients_and_the_upstream_saw() -> None:
    """An event that came twice under one id is not doubled. A task whose callback was answered is
    lost without an event, and with one that says that it failed.
    """
    secret = contenders.SECRET

    def event(at: float, id: str, subject: str, type: str = "image.task.completed") -> list[Any]:
        body, now = json.dumps({"type": type, "subject": subject}), datetime.now(UTC)
        signature = standardwebhooks.Webhook(secret).sign(id, now, body)
        headers = {"webhook-timestamp": str(int(now.timestamp())), "webhook-signature": signature}
        return [at, {"webhook-id": id, **headers}, body]

    events = [
        event(3.0, "m1", "again"),
        event(4.0, "m1", "again"),
        event(3.5, "m2", "doubled"),
        event(3.6, "m3", "doubled"),
        event(5.0, "m4", "uncertain", "image.task.failed"),
        event(5.0, "m5", "proved", "image.task.failed"),
    ]
    names = ("again", "doubled", "uncertain", "proved", "silent", "uncalled")
    orders = {name: [[f"up-{name}", "url", 1.0]] for name in names if name != "uncertain"}
    orders["again"].append(["up-second", "url", 2.0])
    seen = {"events": events, "orders": orders, "taken": ["up-again", "up-proved", "up-silent"]}
    verdict = judged(secret, {name: name for name in names}, seen)
    assert (verdict.lost, verdict.uncalled) == (3, 1)  # proved, silent and uncalled
    assert (verdict.doubled, verdict.again, verdict.twice, verdict.uncertain) == (1, 1, 1, 1)
    assert verdict.waits[:2] == [2.0, 2.5]


def test_the_table_goes_between_the_readmes_markers() -> None:
    """`--write` replaces only the text between the markers. It fails on a page without markers."""
    assert (
        written("a\n<!-- bench -->\nold\n<!-- /bench -->\nb\n", "new")
        == "a\n<!-- bench -->\nnew\n<!-- /bench -->\nb\n"
    )
    with pytest.raises(ValueError, match="bench"):
        written("a\n<!-- bench -->\n", "new")


def test_time_that_two_requests_share_is_the_upstreams_once() -> None:
    """The upstream's time is the union of its requests' intervals, limited to the measured
    interval.
    """
    assert covered([(0, 2), (1, 3), (5, 6), (9, 20)], 0.5, 10) == 2.5 + 1 + 1
    assert covered([], 0, 10) == 0


def test_a_single_round_has_no_range() -> None:
    """A range needs at least two rounds."""
    assert spread([2.0], ".1f") == "2.0"
    assert spread([3.0, 1.0, 2.0], ".0f") == "2 (1–3)"


def test_a_row_that_the_machine_cannot_have_is_left_out_with_a_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The line names the command that installs the missing server or compiler."""
    monkeypatch.setattr(acknowledgement, "postgres_binaries", lambda: None)
    monkeypatch.setenv("PATH", "")
    assert lacking() == LACKING
    assert all("apt-get install" in line for line in LACKING.values())


@pytest.mark.parametrize("call", ("fsync", "fdatasync"))
def test_a_slow_fsync_takes_2_ms_more(tmp_path: Path, call: str) -> None:
    """The library is compiled, and the call of a process that preloads it takes longer."""
    if "slow" in lacking():
        missing("cc", "PATH")
    compile_shim(tmp_path)
    program = (
        "import os, sys, time\nfile = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\n"
        f"began = time.perf_counter()\nos.{call}(file)\nprint(time.perf_counter() - began)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "file")]
    preloaded = {"LD_PRELOAD": str(tmp_path / acknowledgement.SHIM)}
    done = subprocess.run(command, env=preloaded, capture_output=True, text=True, check=True)
    assert float(done.stdout) >= 0.002


def test_the_pictures_are_as_large_as_their_rows_say() -> None:
    """Within a tenth."""
    sizes = {name: len(picture(**how)) for name, how in PICTURES.items()}
    assert sizes == pytest.approx({"100 KB": 1e5, "1 MB": 1e6}, rel=0.1)
