"""Reads the rows of jobs that begin together with one query."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Generic, TypeVar

from sqlalchemy import Connection

from service.db.batching import BatchingStore
from service.fair_slots import HOLDER

MOST = 32  # rows: a job uses its row some milliseconds after the read

Row = TypeVar("Row")


class SharedReads(Generic[Row]):
    """One query at a time. The jobs that ask meanwhile share the next ones."""

    def __init__(
        self, store: BatchingStore, query: Callable[[Connection, Sequence[str]], Mapping[str, Row]]
    ) -> None:
        self._store, self._query = store, query
        self._waiting: list[tuple[str, asyncio.Future[Row | None]]] = []
        self._reading: asyncio.Task[None] | None = None

    async def read(self, key: str) -> Row | None:
        """The row as it is now. None: it is missing, or the query failed and may succeed for this
        row alone.
        """
        row: asyncio.Future[Row | None] = asyncio.get_running_loop().create_future()
        self._waiting.append((key, row))
        if self._reading is None:
            self._reading = asyncio.create_task(self._read(), name="shared-reads")
        return await row

    async def _read(self) -> None:
        HOLDER.set("")  # the rows are those of many owners
        try:
            while self._waiting:
                batch, self._waiting = self._waiting[:MOST], self._waiting[MOST:]
                rows: Mapping[str, Row] = {}
                with suppress(Exception):
                    rows = await self._store.look_up(self._query, [key for key, _ in batch])
                for key, row in batch:
                    if not row.done():
                        row.set_result(rows.get(key))
        finally:
            self._reading = None
