"""A benchmark as a program: its options, the machine that its figures depend on, and its table,
which goes between the markers of a page.
"""

import argparse
import os
import platform
import sqlite3
import statistics
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tests.bench.processes import CORES
from tests.environment import ROOT

Table = Callable[[Path, int, bool], str]  # of a folder, the number of rounds, and `--quick`


def run(command: str, mark: str, table: Table, page: str = "benchmarks.md") -> None:
    """Measures, and prints the table below a line on the machine."""
    options = argparse.ArgumentParser(prog=command)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--quick", action="store_true", help="only to see that it runs")
    options.add_argument("--write", action="store_true", help=f"put it into docs/{page}")
    options.add_argument("--folder", type=Path, default=ROOT, help="on which disk")
    asked = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="data-bench-", dir=asked.folder) as name:
        about = textwrap.fill(machine(Path(name), command), 100)
        made = table(Path(name), 1 if asked.quick else asked.rounds, asked.quick)
    print(text := f"{about}\n\n{made}")
    if asked.write:
        put(text, mark, page)


def machine(folder: Path, command: str) -> str:
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
    versions = f"{python_and_linux()}, SQLite {sqlite3.sqlite_version}"
    return f"`{command}` on {versions}, {sync}. {MEDIANS}"


MEDIANS = "Medians of the rounds, with the least and the most."


def python_and_linux() -> str:
    linux = platform.release().partition("-")[0]
    return f"{len(CORES)} cores, Python {platform.python_version()}, Linux {linux}"


def compared(pairs: Sequence[tuple[float, float]]) -> list[str]:
    """The figures of two sides that took turns, and how many times as large the first one is."""
    factors = [one / other for one, other in pairs]
    return [spread(values, ".1f") for values in (*zip(*pairs, strict=True), factors)]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def written(page: str, table: str, mark: str = "bench") -> str:
    """The page with the table between the markers of that name. Raises ValueError unless the page
    has them once.
    """
    before, start, rest = page.partition(f"<!-- {mark} -->")
    _, end, after = rest.partition(f"<!-- /{mark} -->")
    if not start or not end or f"<!-- {mark} -->" in after:
        raise ValueError(f"the page has not one pair of {mark} markers")
    return f"{before}{start}\n{table}\n{end}{after}"


def put(text: str, mark: str = "bench", page: str = "benchmarks.md") -> None:
    """Writes the text between the markers of that name in a page of `docs`."""
    path = ROOT / "docs" / page
    path.write_text(written(path.read_text("utf-8"), text, mark), "utf-8")


def spread(values: Sequence[float], form: str) -> str:
    """The median, with the least and the most if there are several values."""
    least, most, median = (
        format(value, form) for value in (min(values), max(values), statistics.median(values))
    )
    return median if least == most else f"{median} ({least}–{most})"
