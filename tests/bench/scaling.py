"""What a second and a third worker add on PostgreSQL: `python -m tests.bench.scaling`.

One `darkroom serve` takes the callbacks, and `darkroom worker` processes share its work: 1, 2 and 4
processes in turns, each time with an empty database. All of them, the server, the upstream and the
load share the machine's cores.
"""

import subprocess
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from tests.bench.acknowledgement import SECRET_KEY
from tests.bench.load import percentile
from tests.bench.peers.contenders import CONTENDERS
from tests.bench.peers.speed import Result, Scale, round_of
from tests.bench.processes import cpu_seconds
from tests.bench.program import run, spread
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
            spread([percentile(run.waits, 0.5) * 1000 for run in runs], ".0f"),
            spread([percentile(run.waits, 0.99) * 1000 for run in runs], ".0f"),
        ]
        lines.append(f"| {count} | {' | '.join(figures)} |")
    return "\n".join(lines)


def scaling(folder: Path, rounds: int, quick: bool) -> str:
    scale = Scale(10 if quick else 150, steady=20)
    if (binaries := postgres_binaries()) is None:
        raise SystemExit("the machine has no binaries of PostgreSQL (`apt-get install postgresql`)")
    with postgres_running(binaries) as server:
        results = measured(server, rounds, scale, folder)
    said = [str(binaries / "postgres"), "--version"]
    version = subprocess.run(said, capture_output=True, text=True, check=True).stdout
    head = f"PostgreSQL {version.split()[2]}, {scale.tasks} tasks in each of {rounds} rounds, one"
    return f"{head} picture of 100 KB each.\n\n{table(results, scale)}"


if __name__ == "__main__":
    run("python -m tests.bench.scaling", "scaling", scaling, "scaling.md")
