"""Durable acknowledgement: the callbacks a second that the service commits and answers, compared
with a bare route that stores nothing.
"""

import asyncio
import json
import shutil
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from service.db.clock import wall_clock
from service.db.transaction import Lease
from service.resources import new_id
from service.signing import Keyring
from service.tasks.accept import insert_tasks
from service.tasks.rows import TaskRow
from service.tasks.state import State
from service.tasks.submissions import SubmissionResult, record_submissions
from service.upstreams.base import Accepted, Report
from tests.bench.processes import MEASURED, MEASURING, measure, server
from tests.bench.wrk import compared
from tests.processes import service_settings
from tests.stores import open_sqlite

SECRET_KEY = "a secret key for benchmarks alone"
DAY_MS = 86_400_000
CHUNK = 500
ROWS = {
    "bare": "bare route: nothing is kept",
    "web": "`POST /callbacks/…`, acknowledged durably, no workers in the process",
    "serve": "the same in `darkroom serve`, whose workers settle and download meanwhile",
}


@dataclass(frozen=True, slots=True)
class Scale:
    """The size of a measurement. Each run has `tasks` that wait for a callback. Times are in
    seconds.
    """

    rounds: int
    tasks: int
    connections: int
    warm_up: float
    seconds: float


async def prepare(folder: Path, upstream: str, count: int) -> None:
    """Prepares a store with `count` submitted tasks, and `requests` with a line for each task's
    callback. Each callback names one result.
    """
    keyring, ids = (
        Keyring([SECRET_KEY.encode()]),
        [new_id("task", wall_clock()) for _ in range(count)],
    )
    with (folder / "requests").open("w") as requests:
        for task_id in ids:
            body = {
                "id": f"upstream-{task_id}",
                "status": "completed",
                "results": [f"{upstream}/files/{task_id}.jpeg"],
                "progress": 100,
            }
            path = f"/callbacks/evolink/{task_id}/{keyring.callback_token('evolink', task_id)}"
            requests.write(json.dumps({"path": path, "body": json.dumps(body)}) + "\n")
    async with open_sqlite(
        folder / "template" / "darkroom.db", process="bench", new_id=new_id
    ) as store:
        for start in range(0, count, CHUNK):
            chunk = ids[start : start + CHUNK]
            await asyncio.gather(
                *(store.write(insert_tasks, waiting(task_id), urgent=True) for task_id in chunk)
            )
            await asyncio.gather(
                *(store.write(record_submissions, taken(task_id), urgent=True) for task_id in chunk)
            )


def waiting(task_id: str) -> TaskRow:
    return TaskRow(
        task_id,
        "bench",
        "evolink",
        "wan2.5-text-to-image",
        State.QUEUED,
        0,
        prompt="a lighthouse",
        request={"size": "1280x1280", "n": 1},
        body=b"{}",
    )


def taken(task_id: str) -> SubmissionResult:
    """The outcome of the task's submission. Its query is due long after the benchmark ends."""
    return SubmissionResult(
        Lease("submit", task_id, 0, 0),
        Accepted(Report(upstream_id=f"upstream-{task_id}")),
        wait_ms=DAY_MS,
    )


def one_round(folder: Path, upstream: str, scale: Scale) -> dict[str, dict[str, float]]:
    """Measures each row once, one after another. Every run has a fresh process on a copy of the
    prepared store.
    """
    results = {}
    for name in ROWS:
        with ExitStack() as stack:
            settings = {}
            if name != "bare":
                shutil.rmtree(folder / "data", ignore_errors=True)
                shutil.copytree(folder / "template", folder / "data")
                settings = service_settings(upstream, folder, SECRET_KEY=SECRET_KEY)
            command = ("service", "serve") if name == "serve" else ("tests.bench.servers", name)
            address = stack.enter_context(
                server(*command, folder=folder, cores=MEASURED, **settings)
            )
            repeat = (
                "again" if name == "bare" else "once"
            )  # a second callback for a task is a duplicate
            results[name] = measure(
                address,
                folder / "requests",
                repeat,
                scale.connections,
                scale.warm_up,
                scale.seconds,
            )
    return results


def acknowledgement(folder: Path, scale: Scale) -> str:
    """The table, in Markdown."""
    with server("tests.bench.servers", "upstream", folder=folder, cores=MEASURING) as upstream:
        asyncio.run(prepare(folder, upstream, scale.tasks))
        rounds = [one_round(folder, upstream, scale) for _ in range(scale.rounds)]
    lines = [
        (
            f"| callbacks over {scale.connections} connections | a second | p50 ms | p99 ms"
            " | of bare |"
        ),
        "|---|---|---|---|---|",
    ]
    for name, about in ROWS.items():
        runs = [each[name] for each in rounds]
        figures = [
            spread([run["rate"] for run in runs], ".0f"),
            spread([run["p50"] * 1000 for run in runs], ".1f"),
            spread([run["p99"] * 1000 for run in runs], ".1f"),
            spread([each[name]["rate"] / each["bare"]["rate"] for each in rounds], ".2f"),
        ]
        lines.append(f"| {about} | {' | '.join(figures)} |")
    ours = statistics.median(each["bare"]["rate"] for each in rounds)
    control = compared(folder, scale.connections, scale.seconds, ours)
    return "\n".join([*lines, "", control])


def spread(values: Sequence[float], form: str) -> str:
    """The median, with the least and the most if there are several values."""
    least, most, median = (
        format(value, form) for value in (min(values), max(values), statistics.median(values))
    )
    return median if least == most else f"{median} ({least}–{most})"
