"""`make bench`: the service's cost compared with a bare route, and the time until a subscriber has
an event. The figures are those of one machine and no goal.

Everything runs on loopback, with the measured process on the first core and the measuring ones on
the last. The store is SQLite on the disk of `--folder`, with its usual durability.
"""

import argparse
import os
import platform
import sqlite3
import statistics
import tempfile
import time
from pathlib import Path

from tests.bench.acknowledgement import Scale, acknowledgement
from tests.bench.delivery import delivery
from tests.bench.processes import CORES
from tests.environment import ROOT

FULL = Scale(rounds=5, tasks=40_000, connections=64, warm_up=1, seconds=4)
QUICK = Scale(rounds=1, tasks=300, connections=8, warm_up=0, seconds=0.4)


def machine(folder: Path, command: str = "make bench") -> str:
    """The machine that the figures depend on, in one line."""
    path, took = folder / "sync", []
    with path.open("wb") as file:
        for _ in range(50):
            file.write(bytes(4096))
            file.flush()
            started = time.perf_counter()
            os.fdatasync(file.fileno())
            took.append(time.perf_counter() - started)
    sync = f"fdatasync {statistics.median(took) * 1000:.1f} ms"
    linux = platform.release().partition("-")[0]
    versions = f"Python {platform.python_version()}, Linux {linux}, SQLite {sqlite3.sqlite_version}"
    return (
        f"`{command}` on {len(CORES)} cores, {versions}, {sync}. Medians of the rounds, with"
        " the least and the most."
    )


def written(page: str, table: str, mark: str = "bench") -> str:
    """The page with the table between the markers of that name. Raises ValueError if the page has
    no such markers.
    """
    before, start, rest = page.partition(f"<!-- {mark} -->")
    _, end, after = rest.partition(f"<!-- /{mark} -->")
    if not start or not end:
        raise ValueError(f"the page has no {mark} markers")
    return f"{before}{start}\n{table}\n{end}{after}"


def put(text: str, mark: str = "bench", page: str = "benchmarks.md") -> None:
    """Writes the text between the markers of that name in a page of `docs`."""
    path = ROOT / "docs" / page
    path.write_text(written(path.read_text("utf-8"), text, mark), "utf-8")


def main() -> None:
    options = argparse.ArgumentParser(
        prog="python -m tests.bench", description="Measure, and print a table."
    )
    options.add_argument(
        "--quick", action="store_true", help="only to see that it runs: its figures mean nothing"
    )
    options.add_argument(
        "--write", action="store_true", help="put the table into docs/benchmarks.md"
    )
    options.add_argument(
        "--folder", type=Path, default=ROOT, help="on which disk (default: the checkout's)"
    )
    asked = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="data-bench-", dir=asked.folder) as name:
        folder = Path(name)
        parts = [machine(folder), acknowledgement(folder, QUICK if asked.quick else FULL)]
        warm_up, seconds = (0, 1) if asked.quick else (3, 90)
        parts.append(delivery(folder / "delivery", 10, warm_up, seconds))
    table = "\n\n".join(parts)
    print(table)
    if asked.write:
        put(table)


if __name__ == "__main__":
    main()
