"""No list, filter or figure reads the whole store: a request costs the same with ten times as many
finished tasks, and its statements are looked up in indexes (docs/benchmarks.md).
"""

import re
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import asyncpg
from sqlalchemy import Engine, event

from service.app import Role
from tests.api import ASYNC, SUBMIT, got, order
from tests.growth import fill, requests
from tests.world import World, world

FEW, MANY = 200, 2000
MOST = 1.15  # growth, beside what a page with more rows costs
STEPS = 10  # of SQLite's machine, between two calls of the counter
GROWING = ("tasks", "callbacks", "images", "events", "deliveries", "attempts", "steps", "ledger")
SCAN = re.compile(rf"^SCAN (?P<table>{'|'.join(GROWING)}|task_metadata)\b(?P<how>.*)")
SEQUENTIAL = re.compile(rf"Seq Scan on (?:{'|'.join(GROWING)}|task_metadata)\b")
Statement = tuple[str, Any]


@asynccontextmanager
async def filled(folder: Path, count: int, **settings: Any) -> AsyncIterator[World]:
    async with world(folder, role=Role(workers=False), **settings) as here:
        for first in range(0, count, 500):
            await here.context.resources.store.write(fill, (first, min(count, first + 500)))
        yield here


@contextmanager
def sent() -> Iterator[list[Statement]]:
    """The statements that any store sends, with their parameters."""
    statements: list[Statement] = []

    def note(_c: Any, _k: Any, text: str, parameters: Any, _x: Any, many: bool) -> None:
        statements.extend((text, each) for each in (parameters if many else [parameters]))

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield statements
    finally:
        event.remove(Engine, "before_cursor_execute", note)


async def read_all(here: World, count: int) -> None:
    for name, path in requests(count).items():
        answer = await here.client.get(path)
        assert answer.status_code == 200, (name, answer.text)


async def change(here: World) -> None:
    """A submission, its callback and its cancel."""
    body = order(metadata={"shop": "one"})
    task = got(await here.client.post(SUBMIT, json=body, headers=ASYNC))
    answer = await here.stranger.post(here.callback_url(task["id"]), content=b"{}")
    assert answer.status_code == 200, answer.text
    got(await here.client.post(f"/v1/tasks/{task['id']}/cancel"))


async def statements_of(here: World, count: int) -> dict[str, Any]:
    """The distinct statements of all requests, with the parameters of one of them."""
    with sent() as statements:
        await read_all(here, count)
        await change(here)
    return {text: parameters for text, parameters in statements if "SELECT" in text}


def scanned(plan: str, statement: str, partial: set[str]) -> bool:
    """Whether a line of SQLite's plan reads a whole table. The beginning of an index does not, nor
    an index of rows that wait for work.
    """
    if not (found := SCAN.match(plan)):
        return False
    index = found["how"].rpartition(" ")[2]
    return "USING" not in found["how"] or ("LIMIT" not in statement and index not in partial)


async def test_no_statement_of_a_request_scans_a_table_of_sqlite(tmp_path: Path) -> None:
    async with filled(tmp_path, FEW) as here:
        statements = await statements_of(here, FEW)
    bad = []
    with closing(sqlite3.connect(tmp_path / "data" / "darkroom.db")) as connection:
        named = "SELECT name FROM sqlite_master WHERE type = 'index' AND sql LIKE '% WHERE %'"
        partial = {row[0] for row in connection.execute(named)}
        for text, parameters in statements.items():
            plan = connection.execute(f"EXPLAIN QUERY PLAN {text}", parameters)
            bad += [(row[3], text) for row in plan if scanned(row[3], text, partial)]
    assert len(statements) > 50
    assert not bad, bad


async def test_no_statement_of_a_request_scans_a_table_of_postgresql(
    postgres_url: str, tmp_path: Path
) -> None:
    settings = {"database_url": postgres_url, "secret_key": "s" * 32}
    bad = []
    async with filled(tmp_path, FEW, **settings) as here:
        statements = await statements_of(here, FEW)
        connection = await asyncpg.connect(postgres_url)
        await connection.execute("SET enable_seqscan = off")
        for text, parameters in statements.items():
            plan = "\n".join(
                row[0] for row in await connection.fetch(f"EXPLAIN {text}", *parameters)
            )
            if SEQUENTIAL.search(plan):
                bad.append((plan, text))
        await connection.close()
    assert len(statements) > 50
    assert not bad, bad


async def steps_of(folder: Path, count: int) -> dict[str, int]:
    """The steps of SQLite's virtual machine for each request."""
    taken: Counter[str] = Counter()
    current = ""  # none yet

    def note() -> None:
        taken[current] += 1

    def watch(connection: Any, _: object) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.set_progress_handler(note, STEPS)

    event.listen(Engine, "connect", watch)
    try:
        async with filled(folder, count) as here:
            await read_all(here, count)  # the first reads prepare what later ones have ready
            for name, path in requests(count).items():
                current, taken[name] = name, 0
                assert (await here.client.get(path)).status_code == 200
    finally:
        event.remove(Engine, "connect", watch)
    return taken


async def test_ten_times_as_many_tasks_make_no_request_dearer(tmp_path: Path) -> None:
    """On SQLite, in steps of its machine, which no busy machine changes."""
    few, many = await steps_of(tmp_path / "few", FEW), await steps_of(tmp_path / "many", MANY)
    dearer = {
        name: (few[name], many[name])
        for name in requests(FEW)
        if many[name] > few[name] * MOST + 100
    }
    assert not dearer
