"""Jobs that begin together share a query, on a real embedded store."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest
from sqlalchemy import Connection

from service.db.batching import BatchingStore
from service.db.shared_reads import MOST, SharedReads
from service.resources import new_id
from tests.stores import open_sqlite
from tests.waiting import wait_until


@dataclass(slots=True)
class Rows:
    """Every key but `gone` has a row. A query for `bad` waits for `goes_on` and fails."""

    store: BatchingStore
    reads: SharedReads[str] = field(init=False)
    asked: list[list[str]] = field(default_factory=list)
    goes_on: asyncio.Event = field(default_factory=asyncio.Event)

    async def look_up(
        self, query: Callable[[Connection, Sequence[str]], Mapping[str, str]], keys: Sequence[str]
    ) -> Mapping[str, str]:
        """Takes the place of the store's."""
        self.asked.append(list(keys))
        if "bad" in keys:
            await self.goes_on.wait()
        return await self.store.look_up(query, keys)

    def query(self, _: Connection, keys: Sequence[str]) -> Mapping[str, str]:
        if "bad" in keys:
            raise ValueError("a row that cannot be read")
        return {key: f"row {key}" for key in keys if key != "gone"}

    async def read(self, *keys: str) -> list[str | None]:
        return await asyncio.gather(*(self.reads.read(key) for key in keys))


@pytest.fixture
async def rows(tmp_path: Path) -> AsyncIterator[Rows]:
    async with open_sqlite(tmp_path / "x.db", process="a", new_id=new_id) as store:
        made = Rows(store)
        made.reads = SharedReads(cast(BatchingStore, made), made.query)
        yield made


async def test_jobs_that_ask_together_share_a_query(rows: Rows) -> None:
    assert await rows.read("a", "gone", "b") == ["row a", None, "row b"]
    assert rows.asked == [["a", "gone", "b"]]
    assert await rows.read("c") == ["row c"]


async def test_a_query_is_for_few_rows(rows: Rows) -> None:
    """The last job must not work on a row of long ago."""
    keys = [str(number) for number in range(MOST + 1)]
    assert await rows.read(*keys) == [f"row {key}" for key in keys]
    assert rows.asked == [keys[:MOST], keys[MOST:]]


async def test_a_row_is_read_after_its_job_asked(rows: Rows) -> None:
    """A job that asks during a query gets its row from the next one. A job that was cancelled
    meanwhile and a failed query keep no other job from its row.
    """
    jobs = [asyncio.create_task(rows.reads.read(key)) for key in ("bad", "a", "b")]
    await wait_until(lambda: rows.asked)
    more = [asyncio.create_task(rows.reads.read(key)) for key in ("a", "b")]
    await asyncio.sleep(0)
    jobs[1].cancel()
    more[1].cancel()
    rows.goes_on.set()
    assert [await job for job in (jobs[0], jobs[2], more[0])] == [None, None, "row a"]
    assert rows.asked == [["bad", "a", "b"], ["a", "b"]]
