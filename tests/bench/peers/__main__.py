"""`make bench-peers`: Darkroom beside programs that do the same work on Celery, arq and DBOS.

Two tables compare their speed in rounds that take turns: one with a picture for each task, and one
with tasks that fail. The third kills each of them while it works. Every contender has both cores,
which the upstream and the load share with it.
"""

import argparse
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tests.bench.peers import kills, speed
from tests.bench.peers.contenders import CONTENDERS, Contender, missing, versions
from tests.bench.peers.kills import Storm, Verdict, killed
from tests.bench.peers.speed import Result, Scale, round_of
from tests.bench.program import MEDIANS, put, python_and_linux
from tests.environment import ROOT

PROGRAMS = sorted({contender.program for contender in CONTENDERS})


@contextmanager
def timed(what: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - started:.0f} s", flush=True)


def speeds(
    contenders: Sequence[Contender], rounds: int, scale: Scale, folder: Path
) -> dict[Contender, list[Result]]:
    """Every second round goes through the contenders from the last to the first."""
    folder.mkdir()
    results: dict[Contender, list[Result]] = {contender: [] for contender in contenders}
    for number in range(rounds):
        turn = contenders if number % 2 == 0 else contenders[::-1]
        for place, contender in enumerate(turn):
            with timed(f"round {number + 1}: {contender.name}"):
                made = round_of(contender, folder / f"{number}-{place}", scale)
            results[contender].append(made)
    return results


def storms(contenders: Sequence[Contender], storm: Storm, folder: Path) -> dict[Contender, Verdict]:
    verdicts = {}
    for place, contender in enumerate(contenders):
        with timed(f"kills: {contender.name}"):
            verdicts[contender] = killed(contender, folder / f"kills-{place}", storm)
    return verdicts


def arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser(
        prog="python -m tests.bench.peers",
        description="Compare with peers, and print three tables.",
    )
    options.add_argument("--rounds", type=int, default=5, help="of speed")
    options.add_argument("--tasks", type=int, default=200, help="of one round, for each contender")
    options.add_argument("--orders", type=int, default=500, help="that are submitted under kills")
    options.add_argument("--kills", type=int, default=8, help="of processes, for each contender")
    options.add_argument("--seconds", type=float, default=20, help="in which they come")
    options.add_argument("--seed", type=int, default=1, help="of the kills; timing counts too")
    options.add_argument("--only", default=",".join(PROGRAMS), help="of these programs, by commas")
    options.add_argument("--part", choices=["speed", "kills", "all"], default="all")
    options.add_argument("--quick", action="store_true", help="only to see that it runs")
    options.add_argument("--write", action="store_true", help="put them into docs/benchmarks.md")
    options.add_argument("--folder", type=Path, default=ROOT, help="on which disk")
    asked = options.parse_args()
    if asked.quick:
        asked.rounds, asked.tasks, asked.orders, asked.kills, asked.seconds = 1, 20, 20, 2, 3
    return asked


def about(rounds: int) -> str:
    """The machine and the versions that the figures depend on."""
    text = f"`make bench-peers` on {python_and_linux()}, {versions()}, {rounds} rounds. {MEDIANS}"
    return textwrap.fill(text, 100)


def main() -> None:
    asked = arguments()
    wanted = [each for each in CONTENDERS if each.program in asked.only.split(",")]
    problems = [problem for each in wanted if (problem := missing(each)) is not None]
    contenders = [each for each in wanted if missing(each) is None]
    print("\n".join(problems) or "No contender is missing.", flush=True)
    scale = Scale(asked.tasks, steady=5 if asked.quick else 20)
    storm = Storm(asked.orders, asked.kills, asked.seconds, asked.seed)
    whole = not problems and asked.only == ",".join(PROGRAMS)
    if asked.write and not whole:
        raise SystemExit("nothing is written, because a contender is missing")

    def show(mark: str, table: str) -> None:
        print(f"\n{table}\n", flush=True)
        if asked.write:
            put(table, mark)

    with tempfile.TemporaryDirectory(prefix="data-bench-", dir=asked.folder) as name:
        folder = Path(name)
        if asked.part != "kills":
            for mark, pictured in (("peers", True), ("peers-failures", False)):
                kind = replace(scale, pictured=pictured)
                results = speeds(contenders, asked.rounds, kind, folder / mark)
                show(mark, f"{about(asked.rounds)}\n\n{speed.table(results, kind)}")
        if asked.part != "speed":
            verdicts = storms([each for each in contenders if each.full], storm, folder)
            show("kills", kills.table(verdicts, storm))


if __name__ == "__main__":
    main()
