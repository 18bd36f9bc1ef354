"""Measures how long retention holds the writer of an embedded store: `python -m
tests.bench.retention`. The figures are those of one machine and no goal.

Two kinds of tasks are old: ordinary tasks, and tasks of the largest possible size. A large task has
21 callbacks, of which one keeps 256 KiB and five 64 KiB, a request and events of 1 MiB, and 40
attempts at each delivery, with answers of 2 KiB. The owner has already erased half of the large
tasks.
"""

import argparse
import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from sqlalchemy import Connection, func, insert, select

from service.db.batching import Run
from service.db.clock import wall_clock
from service.db.sqlite import SqliteStore
from service.db.tables import attempts, callbacks, deliveries, events, steps, tasks
from service.db.transaction import Transaction
from service.resources import Resources, new_id
from service.upkeep import retention
from service.upkeep.retention import Retention, erase
from service.upkeep.store_figures import mark
from tests.stores import open_sqlite

OLD = 1_600_000_000_000
LARGEST, BODY = 1 << 20, 256 << 10


def fill(tx: Transaction, items: Sequence[tuple[int, int, bool]]) -> list[None]:
    """Inserts tasks that ended long ago. Each item is a range of numbers, and whether the tasks are
    of the largest size.
    """
    for first, last, large in items:
        rows: dict[Any, list[dict[str, Any]]] = {
            table: [] for table in (tasks, events, deliveries, attempts, steps, callbacks)
        }
        for number in range(first, last):
            task_id, at = new_id("task", OLD), OLD + number
            text = "x" * (LARGEST if large else 900)
            known = {
                "upstream": "evolink",
                "upstream_id": f"task-unified-{number}",
                "state": "completed",
                "model": "m",
                "prompt": "p" * 400,
            }
            times = {"created_at": at, "terminal_at": at, "settled_digest": "d"}
            rows[tasks].append(
                {
                    "id": task_id,
                    "owner": "o",
                    **known,
                    **times,
                    "request": {"x": text},
                    "metadata": {},
                    "body": text.encode(),
                }
            )
            for count, type in enumerate(("image.task.submitted", "image.task.completed")):
                event_id = new_id("event", OLD)
                told = {
                    "sequence": 2 * number + count + 1,
                    "id": event_id,
                    "owner": "o",
                    "type": type,
                    "task_id": task_id,
                    "time": at,
                }
                data: dict[str, Any] = {
                    "request": {"x": text},
                    "metadata": {},
                    "images": [],
                    "error": None,
                }
                rows[events].append({**told, "terminal": True if count else None, "data": data})
                for _ in range(2):
                    delivery_id, of = (
                        new_id("delivery", OLD),
                        {
                            "event_id": event_id,
                            "task_id": task_id,
                            "owner": "o",
                            "endpoint_id": "ep",
                        },
                    )
                    rows[deliveries].append(
                        {
                            "id": delivery_id,
                            **of,
                            "state": "delivered",
                            "created_at": at,
                            "finished_at": at,
                        }
                    )
                    tried = {
                        "delivery_id": delivery_id,
                        "time": at,
                        "status": 200,
                        "duration_ms": 3,
                        "answer": b"o" * (2048 if large else 100),
                    }
                    rows[attempts] += [
                        {"id": new_id("attempt", OLD), **tried} for _ in range(40 if large else 1)
                    ]
            rows[steps] += [
                {
                    "task_id": task_id,
                    "time": at,
                    "step": "image.stored",
                    "detail": {"sha256": "a" * 64},
                }
                for _ in range(8)
            ]
            for count in range(21 if large else 1):
                seen = {
                    "received_at": at,
                    "last_seen_at": at,
                    "count": 1,
                    "verdict": "accepted",
                    "status": "completed",
                    "digest": f"d{count}",
                }
                sizes = [BODY, *[BODY // 4] * 5] if large else [1500]
                body = b"z" * (sizes[count] if count < len(sizes) else 0)
                rows[callbacks].append(
                    {
                        "id": new_id("callback", OLD),
                        "task_id": task_id,
                        "owner": "o",
                        **seen,
                        "first": None,
                        "body": body,
                    }
                )
        for table, made in rows.items():
            tx.connection.execute(insert(table), made)
    return [None] * len(items)


def largest(connection: Connection) -> list[str]:
    return list(
        connection.execute(select(tasks.c.id).where(func.length(tasks.c.body) == LARGEST)).scalars()
    )


async def measured(folder: Path, ordinary: int, large: int) -> dict[str, list[float]]:
    """Milliseconds from the start of each transaction to the end of its commit, by kind of
    transaction.
    """
    held: dict[str, list[float]] = {}
    original = SqliteStore.transaction

    @asynccontextmanager
    async def timed(self: SqliteStore) -> AsyncIterator[Run]:
        names: list[str] = []
        began = time.perf_counter()
        async with original(self) as run:

            async def told(function: Any, *arguments: Any) -> Any:
                names.extend(call.operation.__name__ for call in arguments[0])
                return await run(function, *arguments)

            yield told
        held.setdefault("+".join(sorted(set(names))), []).append(
            (time.perf_counter() - began) * 1000
        )

    async with open_sqlite(folder / "old.db", process="bench", new_id=new_id) as store:
        for first in range(0, ordinary, 1000):
            await store.write(fill, (first, min(ordinary, first + 1000), False))
        for number in range(ordinary, ordinary + large):
            await store.write(fill, (number, number + 1, True))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SqliteStore, "transaction", timed)
            patch.setattr(retention, "PAUSE_S", 0.002)
            resources = cast("Resources", SimpleNamespace(store=store))

            async def work() -> dict[str, int]:
                for task_id in (await store.read(largest))[: large // 2]:
                    await erase(resources, task_id, None)
                return await Retention(resources, 30, None, 365, wall_clock).apply()

            working = asyncio.create_task(work())
            while not working.done():  # small commits beside it measure the disk
                await store.write(mark, None)
                await asyncio.sleep(0.02)
            print(await working)
    return held


def main() -> None:
    options = argparse.ArgumentParser(
        prog="python -m tests.bench.retention", description="Measure, and print a table."
    )
    options.add_argument("--ordinary", type=int, default=30_000)
    options.add_argument("--large", type=int, default=200)
    options.add_argument(
        "--folder", type=Path, default=Path(), help="on which disk (default: here)"
    )
    asked = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="data-bench-", dir=asked.folder) as name:
        held = asyncio.run(measured(Path(name), asked.ordinary, asked.large))
    print("| transactions | number | median | 99 % | longest |\n|---|---|---|---|---|")
    for what, took in sorted(held.items()):
        took.sort()
        figures = " | ".join(
            f"{value:.1f} ms"
            for value in (took[len(took) // 2], took[len(took) * 99 // 100], took[-1])
        )
        print(f"| {what} | {len(took)} | {figures} |")


if __name__ == "__main__":
    main()
