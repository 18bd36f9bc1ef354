"""Measures reads of stores with few and with many finished tasks: `python -m tests.bench.growth`.
Client and service share one process, so the figures are higher than those of a service alone.
"""

import argparse
import asyncio
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from service.app import Role
from tests.growth import fill, requests
from tests.servers import postgres_binaries, postgres_database, postgres_running
from tests.world import world

ROUNDS = 40
Columns = list[dict[str, list[float]]]
SHOWN = (
    "task",
    "timeline",
    "metrics",
    "list of all owners' tasks",
    "list of all owners' tasks, from the middle",
    "list of all owners' tasks, by metadata",
    "list of all owners' tasks, by metadata of none",
    "list of all owners' tasks, failed",
    "list of all owners' events, from the middle",
    "list of all owners' events, of a type without hits",
    "list of all owners' deliveries",
    "list of all owners' deliveries, dead",
    "ledger, of one owner",
)


async def measured(folder: Path, stores: Sequence[tuple[int, str | None]]) -> Columns:
    """The median milliseconds of each request on a store with so many finished tasks, and the
    milliseconds until a process on it is ready. Rounds of the stores take turns.
    """
    columns: Columns = [{name: [] for name in ("ready", *SHOWN)} for _ in stores]
    async with AsyncExitStack() as stack:
        worlds = []
        for (count, url), column in zip(stores, columns, strict=True):
            given: dict[str, Any] = (
                {} if url is None else {"database_url": url, "secret_key": "s" * 32}
            )
            opened = partial(world, folder / str(count), role=Role(workers=False), **given)
            async with opened() as here:
                for first in range(0, count, 1000):
                    last = min(count, first + 1000)
                    await here.context.resources.store.write(fill, (first, last))
            os.sync()  # a start syncs the file, and pages that the filling left would count
            began = time.perf_counter()
            here = await stack.enter_async_context(opened())
            column["ready"].append((time.perf_counter() - began) * 1000)
            worlds.append((here, requests(count), column))
        for _ in range(ROUNDS):
            for name in SHOWN:
                for here, paths, column in worlds:
                    began = time.perf_counter()
                    (await here.client.get(paths[name])).raise_for_status()
                    column[name].append((time.perf_counter() - began) * 1000)
    return columns


def main() -> None:
    options = argparse.ArgumentParser(
        prog="python -m tests.bench.growth", description="Measure, and print a table."
    )
    options.add_argument("--tasks", type=int, nargs="+", default=[1000, 100_000])
    options.add_argument("--folder", type=Path, default=Path(), help="on which disk")
    options.add_argument("--postgresql", action="store_true", help="on a server of its own")
    asked = options.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    binaries = postgres_binaries()
    if asked.postgresql and binaries is None:
        raise SystemExit("the machine has no binaries of PostgreSQL (`apt-get install postgresql`)")
    stores: list[tuple[int, str | None]] = [(count, None) for count in asked.tasks]
    with ExitStack() as stack:
        made = tempfile.TemporaryDirectory(prefix="data-bench-", dir=asked.folder)
        folder = Path(stack.enter_context(made))
        if asked.postgresql and binaries is not None:
            server = stack.enter_context(postgres_running(binaries))
            stores = [
                (count, stack.enter_context(postgres_database(server))) for count in asked.tasks
            ]
        columns = asyncio.run(measured(folder, stores))
    heads = " | ".join(f"{count:,} tasks" for count in asked.tasks)
    print(f"| p50 in ms | {heads} | factor |\n|---|{'---|' * len(columns)}---|")
    for name in ("ready", *SHOWN):
        figures = [statistics.median(column[name]) for column in columns]
        cells = " | ".join(f"{figure:.1f}" for figure in figures)
        print(f"| {name} | {cells} | {figures[-1] / figures[0]:.2f} |")


if __name__ == "__main__":
    main()
