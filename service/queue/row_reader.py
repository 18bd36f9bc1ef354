"""Reads the rows of jobs that begin together with one call."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from sqlalchemy import Connection

from service.db.batching import BatchingStore

Rows = Callable[[Connection, Sequence[str]], Mapping[str, Any]]


class RowReader:
    """The jobs of a claim begin in one turn of the event loop, after their leases are committed."""

    def __init__(self, store: BatchingStore, rows: Rows) -> None:
        self._store, self._rows = store, rows
        self._keys: list[str] = []
        self._reading: asyncio.Task[Mapping[str, Any]] | None = None

    async def read(self, key: str) -> Any:
        """The row, or None if the job has to read it alone: it is missing, or a read failed."""
        self._keys.append(key)
        if self._reading is None:
            self._reading = asyncio.create_task(self._read_all())
        return (await asyncio.shield(self._reading)).get(key)

    async def _read_all(self) -> Mapping[str, Any]:
        keys, self._keys, self._reading = self._keys, [], None
        with suppress(Exception):  # the job of the row that cannot be read fails alone
            return await self._store.read(self._rows, keys)
        return {}
