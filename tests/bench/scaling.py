"""What a second and a third worker add on PostgreSQL: `python -m tests.bench.scaling`.

One `darkroom serve` takes the callbacks, and `darkroom worker` processes share its work: 1, 2 and 4
processes in turns, each time with an empty database. All of them, the server, the upstream and the
load share the machine's cores.
"""

import argparse
import platform
import subprocess
import tempfile
import textwrap
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from tests.bench.__main__ import put
from tests.bench.acknowledgement import SECRET_KEY, spread
from tests.bench.load import percentile
from tests.bench.peers.contenders import CONTENDERS
from tests.bench.peers.speed import Result, Scale, round_of
from tests.bench.processes import CORES, cpu_seconds
from tests.environment import ROOT
from tests.servers import postgres_binaries, postgres_database, postgres_running

PROCESSES = (1, 2, 4)


def server_cpu(url: str) -> float:
    """Seconds of CPU that a server of `postgres_running` and its children have used so far."""
    folder = Path(parse_qs(urlsplit(url).query)["host"][0])
    main = (folder / "data" / "postmaster.pid").read_text().splitlines()[0]
    return sum(cpu_seconds(int(main)))


def measured(server: str, rounds: int, scale: Scale, folder: Path) -> dict[int, list[Result]]:
    results: dict[int, list[Result]] = {count: [] for count in PROCESSES}
    for number in range(rounds):
        for count in PROCESSES if number % 2 == 0 else PROCESSES[::-1]:
            place = folder / f"{number}-{count}"
            with postgres_database(server) as database:
                settings = {"DATABASE_URL": database, "SECRET_KEY": SECRET_KEY}
                results[count].append(
                    round_of(
                        CONTENDERS[0],
                        place,
                        scale,
                        count - 1,
                        partial(server_cpu, server),
                        **settings,
                    )
                )
    return results


def table(results: dict[int, list[Result]], scale: Scale) -> str:
    head = (
        f"| processes | tasks a second | CPU a task, ms | of PostgreSQL, ms | p50 ms at"
        f" {scale.rate:g} a second | p99 ms |"
    )
    lines = [head, "|---|---|---|---|---|---|"]
    for count, runs in results.items():
        figures = [
            spread([run.rate for run in runs], ".0f"),
            spread([run.cpu * 1000 for run in runs], ".1f"),
            spread([run.server_cpu * 1000 for run in runs], ".1f"),
            spread([percentile(list(run.waits), 0.5) * 1000 for run in runs], ".0f"),
            spread([percentile(list(run.waits), 0.99) * 1000 for run in runs], ".0f"),
        ]
        lines.append(f"| {count} | {' | '.join(figures)} |")
    return "\n".join(lines)


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m tests.bench.scaling")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--tasks", type=int, default=150, help="of one round")
    options.add_argument("--write", action="store_true", help="put the table into docs/scaling.md")
    options.add_argument("--folder", type=Path, default=ROOT, help="on which disk")
    asked = options.parse_args()
    scale = Scale(asked.tasks, steady=20)
    if (binaries := postgres_binaries()) is None:
        raise SystemExit("the machine has no binaries of PostgreSQL (`apt-get install postgresql`)")
    with (
        tempfile.TemporaryDirectory(prefix="data-bench-", dir=asked.folder) as name,
        postgres_running(binaries) as server,
    ):
        said = [str(binaries / "postgres"), "--version"]
        version = subprocess.run(said, capture_output=True, text=True, check=True).stdout
        linux = platform.release().partition("-")[0]
        about = (
            f"{len(CORES)} cores, Python {platform.python_version()}, Linux {linux}, PostgreSQL"
            f" {version.split()[2]}, {asked.tasks} tasks in each of {asked.rounds} rounds, one"
            " picture of 100 KB each. Medians of the rounds, with the least and the most."
        )
        results = measured(server, asked.rounds, scale, Path(name))
    text = f"{textwrap.fill(about, 100)}\n\n{table(results, scale)}"
    print(text)
    if asked.write:
        put(text, "scaling", "scaling.md")


if __name__ == "__main__":
    main()
