"""The store as each of its processes has it open, from one life to the next, with an event loop."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sqlalchemy import Connection

from service.db.batching import Call
from service.db.postgres import PostgresStore
from service.db.sqlite import SqliteStore
from service.db.transaction import Lease, Transaction
from tests.contract.conftest import wipe
from tests.contract.subject import Clock
from tests.property.life_checks import Snapshot, take_snapshot
from tests.property.life_work import Read, Write

Result = TypeVar("Result")
Backend = SqliteStore | PostgresStore


@dataclass(slots=True)
class Bench:
    """One store as each of its processes has it open. With `exclusive`, one process uses the file
    alone, and opening it again releases all leases.

    A write is one transaction of the store, without the queue of writes. A snapshot is taken inside
    the transaction, just before its commit.
    """

    openers: Sequence[Callable[[], AbstractAsyncContextManager[Backend]]]
    clock: Clock
    exclusive: bool
    steps: int = 0
    _open: list[Backend] = field(default_factory=list)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    _stores: AsyncExitStack = field(default_factory=AsyncExitStack)

    @property
    def processes(self) -> int:
        return len(self._open)

    @property
    def names(self) -> list[str]:
        return [store.process for store in self._open]

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return self._loop.run_until_complete(work)

    @contextmanager
    def opened(self) -> Iterator["Bench"]:
        try:
            self._open = [
                self.run(self._stores.enter_async_context(opener())) for opener in self.openers
            ]
            yield self
        finally:
            self.run(self._stores.aclose())
            self.run(self._loop.shutdown_default_executor())
            self._loop.close()

    def reopen(self) -> None:
        """Does what opening the file again does to its rows."""
        (store,) = self._open
        assert isinstance(store, SqliteStore)
        store.prepare(migrate=False)

    def reset(self) -> None:
        """Empties the store and sets the clock back to its start."""
        self.clock.now = Clock().now
        for process in range(self.processes):  # each process learns that the clock was set back
            self.write(process, [Write(wipe, None)], {}, Snapshot())

    def write(
        self, process: int, writes: Sequence[Write], places: dict[str, int], before: Snapshot
    ) -> tuple[list[Any], list[Lease], Snapshot]:
        """Returns the results, the new leases and the new snapshot."""
        store = self._open[process]
        # no caller waits for the call
        calls = [Call(write.operation, write.item, None) for write in writes]  # type: ignore[arg-type]

        def whole(connection: Connection) -> tuple[list[Any], Transaction]:
            results, tx = store.apply(connection, calls, places)
            return [results, tx.leased, take_snapshot(connection, before)], Transaction(
                connection, tx.now, tx.process, tx.new_id
            )  # sends no NOTIFY

        results, leased, snapshot = self._transact(store, whole)
        return results, leased, snapshot

    def read(self, process: int, read: Read) -> Any:
        return self.run(self._open[process % self.processes].read(read.query, *read.arguments))

    def _transact(
        self, store: Backend, whole: Callable[[Connection], tuple[list[Any], Transaction]]
    ) -> list[Any]:
        async def transact() -> list[Any]:
            async with store.transaction() as run:
                found, _ = await run(whole)
            return found

        return self.run(transact())
