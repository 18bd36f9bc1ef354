"""The durable state after a process has died at a checkpoint, before another process starts. The
table of docs/reliability.md must be true at that moment.

A correct final state proves less: a client that retries, or an upstream that calls again, can
repair a loss.
"""

import asyncio
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg

FIGURES = """
    SELECT (SELECT min(state) FROM tasks) AS state,
        (SELECT count(*) FROM tasks WHERE upstream_id IS NOT NULL) AS bound,
        (SELECT count(*) FROM tasks WHERE submit_due_at IS NOT NULL
            AND submit_lease_until IS NULL) AS waiting,
        (SELECT count(*) FROM tasks WHERE erased_at IS NOT NULL AND prompt IS NULL) AS erased,
        (SELECT count(*) FROM inbox) AS inbox,
        (SELECT count(*) FROM callbacks) AS callbacks,
        (SELECT count(*) FROM images WHERE state = 'stored') AS stored
"""
TASKS = "SELECT id FROM tasks"
DELIVERED, PENDING = (
    f"SELECT event_id FROM deliveries WHERE state = '{state}'" for state in ("delivered", "pending")
)


@dataclass(frozen=True, slots=True)
class Death:
    """Figures of the store, ids, and what the clients and servers saw. `told` has the task ids that
    the client knows, `posts` the number of submissions, and `heard` the events that the subscriber
    received. `files` counts images under their final names, `unfinished` temporary files.
    """

    figures: Mapping[str, Any]
    tasks: Sequence[str]
    delivered: Sequence[str]
    pending: Sequence[str]
    told: Sequence[str]
    posts: int
    heard: Sequence[str]
    files: int
    unfinished: int

    def of(self, name: str) -> Any:
        return self.figures[name]


# The process's other jobs go on until it dies. Each check covers only state that no other job can
# change.
TRUE_AT: Mapping[str, Callable[[Death], bool]] = {
    "submit.checked": lambda death: not death.told and not death.tasks,
    "submit.inserted": lambda death: not death.told and len(death.tasks) == 1,
    "submission.claimed": lambda death: death.of("state") == "queued" and death.posts == 0,
    "submission.started": lambda death: death.of("state") == "submitting" and death.posts == 0,
    "submission.answered": lambda death: (
        death.of("state") in ("submitting", "submitted") and death.posts == 1
    ),
    "submission.recorded": lambda death: death.of("bound") == 1 and death.posts == 1,
    "account.held": lambda death: (
        death.of("state") == "queued" and death.of("waiting") == 1 and death.posts == 0
    ),
    "account.restored": lambda death: death.of("state") == "queued" and death.posts == 0,
    "inbox.received": lambda death: death.of("inbox") == 0 == death.of("callbacks"),
    "inbox.committed": lambda death: death.of("inbox") > 0 and death.of("callbacks") == 0,
    "inbox.waiting": lambda death: death.of("inbox") > 0 and death.of("callbacks") == 0,
    "settle.claimed": lambda death: death.of("state") == "submitted",
    "settle.answered": lambda death: death.of("state") == "submitted",
    "settle.recorded": lambda death: death.of("state") in ("storing", "completed"),
    "download.fetched": lambda death: death.of("stored") == 0 and death.unfinished > 0,
    "download.saved": lambda death: death.of("stored") == 0 and death.files > 0,
    "download.recorded": lambda death: 0 < death.of("stored") <= death.files,
    "delivery.claimed": lambda death: bool(set(death.pending) - set(death.heard)),
    "delivery.answered": lambda death: bool(set(death.pending) & set(death.heard)),
    "delivery.recorded": lambda death: bool(set(death.delivered) & set(death.heard)),
    "erase.committed": lambda death: death.of("erased") == 1,
}


def pictures(folder: Path) -> tuple[list[Path], list[Path]]:
    """The images under their final names, and the temporary files."""
    found = [path for path in (folder / "images").rglob("*") if path.is_file()]
    return [path for path in found if ".incoming" not in path.parts], [
        path for path in found if ".incoming" in path.parts
    ]


async def death(
    data: Path, database: str | None, *, told: Sequence[str], posts: int, heard: Sequence[str]
) -> Death:
    """`data` is the dead process's folder. `database` is the address of its store on PostgreSQL."""
    statements = (FIGURES, TASKS, DELIVERED, PENDING)
    (figures,), *ids = await (
        asyncio.to_thread(embedded, data, statements)
        if database is None
        else remote(database, statements)
    )
    tasks, delivered, pending = [[str(next(iter(row.values()))) for row in rows] for rows in ids]
    files, unfinished = pictures(data)
    return Death(
        figures, tasks, delivered, pending, told, posts, heard, len(files), len(unfinished)
    )


def embedded(data: Path, statements: Sequence[str]) -> list[list[dict[str, Any]]]:
    """Reads a copy, because opening the store would repair what the dead process left."""
    with tempfile.TemporaryDirectory() as folder:
        for path in data.glob("*.db*"):
            shutil.copy(path, folder)
        (name,) = Path(folder).glob("*.db")
        with closing(sqlite3.connect(name)) as connection:
            connection.row_factory = sqlite3.Row
            return [
                [dict(row) for row in connection.execute(statement)] for statement in statements
            ]


async def remote(database: str, statements: Sequence[str]) -> list[list[dict[str, Any]]]:
    connection = await asyncpg.connect(database)
    try:
        return [
            [dict(row) for row in await connection.fetch(statement)] for statement in statements
        ]
    finally:
        await connection.close()
