"""Durable acknowledgement: the callbacks a second that the service commits and answers, compared
with a bare route that stores nothing.
"""

import asyncio
import json
import os
import shutil
import statistics
import subprocess
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from service.db.batching import BatchingStore
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
from tests.bench.program import markdown, spread
from tests.bench.wrk import compared
from tests.processes import service_settings
from tests.servers import execute, postgres_binaries, postgres_database, postgres_running
from tests.stores import open_postgres, open_sqlite

SECRET_KEY = "a secret key for benchmarks alone"
DAY_MS = 86_400_000
CHUNK = 500
ROWS = {
    "bare": "bare route: nothing is kept",
    "web": "`POST /callbacks/…` on SQLite, acknowledged durably, no workers in the process",
    "serve": "the same in `darkroom serve`, whose workers settle and download meanwhile",
    "slow": "the second row with every fsync 2 ms slower",
    "postgres": "`POST /callbacks/…` on PostgreSQL, no workers in the process",
}
LACKING = {
    "slow": "`cc` is not installed (`apt-get install gcc`): the row of slow fsyncs is left out.",
    "postgres": "PostgreSQL is not installed (`apt-get install postgresql`): its row is left out.",
}
SHIM = "slow_fsync.so"
Copied = Callable[[], AbstractContextManager[str]]


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


FULL = Scale(rounds=5, tasks=40_000, connections=64, warm_up=1, seconds=4)
QUICK = Scale(rounds=1, tasks=300, connections=8, warm_up=0, seconds=0.4)


def lacking() -> dict[str, str]:
    """A sentence for each row that this machine cannot have."""
    found = {"slow": shutil.which("cc"), "postgres": postgres_binaries()}
    return {name: LACKING[name] for name, program in found.items() if program is None}


async def prepare(folder: Path, upstream: str, count: int, database: str | None = None) -> None:
    """Prepares a store with `count` submitted tasks, and `requests` with a line for each task's
    callback. Each callback names one result. The PostgreSQL database gets the same tasks.
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
    sqlite = folder / "template" / "darkroom.db"
    await fill(open_sqlite(sqlite, process="bench", new_id=new_id), ids)
    if database is not None:
        await fill(open_postgres(database, process="bench", new_id=new_id), ids)


async def fill(opened: AbstractAsyncContextManager[BatchingStore], ids: Sequence[str]) -> None:
    async with opened as store:
        for start in range(0, len(ids), CHUNK):
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


def compile_shim(folder: Path) -> None:
    source = Path(__file__).with_name("slow_fsync.c")
    command = ["cc", "-shared", "-fPIC", "-o", str(folder / SHIM), str(source), "-ldl"]
    subprocess.run(command, check=True)


def settings_of(
    name: str, folder: Path, upstream: str, copied: Copied, stack: ExitStack
) -> dict[str, str]:
    """The environment of a row's process, which works on a copy of the prepared store."""
    shutil.rmtree(folder / "data", ignore_errors=True)
    if name == "postgres":
        url = stack.enter_context(copied())
        asyncio.run(execute(url, "CHECKPOINT"))  # or the server writes the copy during the run
        return service_settings(upstream, folder, SECRET_KEY=SECRET_KEY, DATABASE_URL=url)
    shutil.copytree(folder / "template", folder / "data")
    slow = {"LD_PRELOAD": str(folder / SHIM)} if name == "slow" else {}
    return service_settings(upstream, folder, SECRET_KEY=SECRET_KEY) | slow


def one_round(
    folder: Path, upstream: str, scale: Scale, rows: Sequence[str], copied: Copied
) -> dict[str, dict[str, float]]:
    """Measures each row once, one after another. Every run has a fresh process on a copy of the
    prepared store.
    """
    results = {}
    for name in rows:
        with ExitStack() as stack:
            bare = name == "bare"
            settings = {} if bare else settings_of(name, folder, upstream, copied, stack)
            program = ("tests.bench.servers", "bare" if bare else "web")
            command = ("service", "serve") if name == "serve" else program
            os.sync()  # or the first commits wait for what the copy has left to write
            address = stack.enter_context(
                server(*command, folder=folder, cores=MEASURED, **settings)
            )
            results[name] = measure(
                address,
                folder / "requests",
                "again" if bare else "once",  # a second callback for a task is a duplicate
                scale.connections,
                scale.warm_up,
                scale.seconds,
            )
    return results


def measured(folder: Path, scale: Scale) -> list[dict[str, dict[str, float]]]:
    """The rounds, each with the rows that this machine can have."""
    rows = [name for name in ROWS if name not in lacking()]
    with ExitStack() as stack:
        upstream = stack.enter_context(
            server("tests.bench.servers", "upstream", folder=folder, cores=MEASURING)
        )
        postgres, template = "", None
        if (binaries := postgres_binaries()) is not None:
            postgres = stack.enter_context(postgres_running(binaries))  # on all cores
            template = stack.enter_context(postgres_database(postgres))
        if "slow" in rows:
            compile_shim(folder)
        asyncio.run(prepare(folder, upstream, scale.tasks, template))
        copied = partial(postgres_database, postgres, urlsplit(template or "").path[1:])
        return [one_round(folder, upstream, scale, rows, copied) for _ in range(scale.rounds)]


def acknowledgement(folder: Path, scale: Scale) -> str:
    """The table, in Markdown, with a sentence for each row that is left out."""
    rounds = measured(folder, scale)
    head, rows = ("a second", "p50 ms", "p99 ms", "of bare", "of the second row"), []
    for name in rounds[0]:
        runs = [each[name] for each in rounds]
        figures = [
            spread([run["rate"] for run in runs], ".0f"),
            spread([run["p50"] * 1000 for run in runs], ".1f"),
            spread([run["p99"] * 1000 for run in runs], ".1f"),
            spread([each[name]["rate"] / each["bare"]["rate"] for each in rounds], ".2f"),
            spread([each[name]["rate"] / each["web"]["rate"] for each in rounds], ".2f"),
        ]
        rows.append([ROWS[name], *figures])
    ours = statistics.median(each["bare"]["rate"] for each in rounds)
    control = compared(folder, scale.connections, scale.seconds, ours)
    table = markdown((f"callbacks over {scale.connections} connections", *head), rows)
    return "\n".join([table, "", *lacking().values(), control])
