"""`make chaos`: kills, pauses and restarts every process while tasks are under way. Prints a table,
and exits with 1 if a task is lost or doubled.

On SQLite the run kills and pauses one `darkroom serve`. On PostgreSQL it uses two `serve
--no-worker` and two `worker`, and restarts the server too. The upstream is a sandbox with faults.
The upstream and the subscriber also go away and return.
"""

import argparse
import asyncio
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import SystemRandom

from tests.bench.load import percentile
from tests.bench.program import put
from tests.crash.chaos.storm import LAYOUTS, logs, storms
from tests.crash.chaos.verdict import Verdict, judge, seen
from tests.crash.chaos.weather import Scale
from tests.environment import ROOT
from tests.servers import postgres_binaries, postgres_running

NAMES = {
    "sqlite": "SQLite: one `serve`",
    "postgres": "PostgreSQL: 2 `serve --no-worker`, 2 `worker`",
}
NOTED = ("task.parked", "worker.failed", "http.failed", "store.failed")


@dataclass(frozen=True, slots=True)
class Report:
    """One run's column of the table. `broken` has its defects in words, `notes` its oddities that
    are no defects.
    """

    column: Mapping[str, str]
    broken: list[str]
    notes: list[str]


async def run(store: str, scale: Scale, seed: int, folder: Path, database: str = "") -> Report:
    started = time.monotonic()
    async with storms(store, scale, seed, folder, database) as storm:
        in_time = await storm.rage()
        verdict = judge(await seen(storm))
        members = storm.members
        notes = [f"{event}: {count}" for event in NOTED if (count := logs(members, event))]
        notes += [
            f"{member.folder.name} ended by itself: {dict(Counter(member.ends))}"
            for member in members
            if member.ends
        ]
        kinds = {"lost": verdict.lost, "doubled": verdict.doubled, "submitted twice": verdict.twice}
        kinds["cost"] = verdict.unequal
        broken = [
            f"{kind}: {name}: {about}"
            for kind, found in kinds.items()
            for name, about in found.items()
        ]
        broken += storm.odd + ([] if in_time else [f"not quiet after {scale.patience} s"])
        if "Traceback" in (said := (folder / "upstream.log").read_text()):
            broken.append(f"the upstream had a fault of its own: {said[-1000:]}")
        figures = {"tasks": len(storm.accepted), "kills": sum(member.kills for member in members)}
        figures |= {
            "pauses": sum(member.pauses for member in members),
            "server restarts": storm.restarts,
        }
        return Report(column(figures, verdict, time.monotonic() - started, seed), broken, notes)


def column(figures: Mapping[str, int], verdict: Verdict, took: float, seed: int) -> dict[str, str]:
    waits = verdict.waits or [0.0]
    return {
        **{name: str(count) for name, count in figures.items()},
        "**lost**": str(len(verdict.lost)),
        "**doubled terminal events**": str(len(verdict.doubled)),
        "**submitted twice**": str(len(verdict.twice)),
        "**ledger equals the upstream's record**": (
            f"no: {len(verdict.unequal)} differ" if verdict.unequal else "yes"
        ),
        "credits in the ledger, and in that record": " and ".join(map(in_credits, verdict.credits)),
        "credits charged for uncertain tasks": in_credits(verdict.unreported),
        "callbacks refused, and sent again": str(verdict.refused),
        "uncertain: proof never reached us": (
            f"{verdict.uncertain}, of which nothing was made: {verdict.unmade}"
        ),
        "callback to event, p50": f"{percentile(waits, 0.5):.2f} s",
        "callback to event, p99": f"{percentile(waits, 0.99):.1f} s",
        "duration": f"{took:.0f} s",
        "seed": str(seed),
    }


def in_credits(millionths: int) -> str:
    return f"{millionths / 1_000_000:g}"


def table(columns: Mapping[str, Mapping[str, str]]) -> str:
    first = next(iter(columns.values()))
    lines = [
        "| | " + " | ".join(NAMES[store] for store in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    return "\n".join(
        lines
        + [
            f"| {row} | " + " | ".join(column[row] for column in columns.values()) + " |"
            for row in first
        ]
    )


def ran(store: str, scale: Scale, seed: int, folder: Path) -> Report:
    with ExitStack() as stack:
        database = ""
        if store == "postgres":
            if (binaries := postgres_binaries()) is None:
                raise SystemExit("the machine has no binaries of PostgreSQL")
            database = stack.enter_context(postgres_running(binaries))
        return asyncio.run(run(store, scale, seed, folder, database))


def main() -> None:
    options = argparse.ArgumentParser(
        prog="python -m tests.crash.chaos", description="Kill, pause and restart; print a table."
    )
    options.add_argument("--store", choices=[*LAYOUTS, "both"], default="both")
    options.add_argument(
        "--tasks", type=int, default=200, help="how many are ordered, on each store"
    )
    options.add_argument("--kills", type=int, default=16)
    options.add_argument("--restarts", type=int, default=2, help="of the PostgreSQL server")
    options.add_argument(
        "--seconds",
        type=float,
        default=16,
        help="of trouble, on each store; then the run waits for every task to end",
    )
    options.add_argument(
        "--patience",
        type=float,
        default=1800,
        help="seconds after which a task that has not ended counts as lost",
    )
    options.add_argument(
        "--seed",
        type=int,
        help="of the faults and the moments; the outcome still depends on timing",
    )
    options.add_argument(
        "--folder", type=Path, default=ROOT, help="on which disk (default: the checkout's)"
    )
    options.add_argument(
        "--write", action="store_true", help="put the table into docs/reliability.md"
    )
    asked = options.parse_args()
    seed = SystemRandom().randrange(1 << 32) if asked.seed is None else asked.seed
    scale = Scale(asked.tasks, asked.kills, asked.restarts, asked.seconds, asked.patience)
    folder = Path(tempfile.mkdtemp(prefix="data-chaos-", dir=asked.folder))
    reports = {}
    for store in LAYOUTS if asked.store == "both" else [asked.store]:
        (folder / store).mkdir()
        reports[store] = ran(store, scale, seed, folder / store)
    text = table({store: report.column for store, report in reports.items()})
    print(text)
    broken = [
        f"{store}: {problem}" for store, report in reports.items() for problem in report.broken
    ]
    for line in [
        f"{store}: {note}" for store, report in reports.items() for note in report.notes
    ] + broken:
        print(line, file=sys.stderr)
    if broken:
        raise SystemExit(f"{len(broken)} problems; logs and stores are in {folder}")
    shutil.rmtree(folder)
    if asked.write:
        put(text, "chaos", "reliability.md")


if __name__ == "__main__":
    main()
