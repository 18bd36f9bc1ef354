"""Group commit: what waits is gathered, run in one transaction, and every waiter is woken after the commit.

A failed batch is run again one item at a time, so that one bad item fails alone. Operations carry ids of their own, so
that running one again after a commit whose answer was lost is harmless.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import InterfaceError, OperationalError

from service.errors import StoreUnavailable
from service.store import Item, Result, Signals, Transaction, Workers
from service.store.operations import outbox

MAX_BATCH = 500
TRIES = 2  # of a single item: who lost a race for a unique key finds the winner's row at the second
GIVE_UP = 3  # items in a row that the store itself failed: the rest would fare no better

Begin = Callable[[Connection, dict[str, int]], Transaction]


@dataclass(slots=True, eq=False)
class Call:
    """One item on its way into a transaction."""

    operation: Callable[[Transaction, Sequence[Any]], Sequence[Any]]
    item: Any
    future: "asyncio.Future[Any]"


@dataclass(slots=True)
class Batch:
    """What became of some calls: results, or exceptions, in their order; what was committed; the places left over."""

    results: list[Any]
    committed: list[Transaction]
    slots: dict[str, int]


def transact(connection: Connection, begin: Begin, calls: Sequence[Call], slots: dict[str, int]) -> tuple[list[Any], Transaction]:
    """Runs the calls in one transaction, operation by operation.

    The outbox comes last because its counter row stays locked until the commit.
    """
    with connection.begin():
        tx = begin(connection, dict(slots))
        groups: dict[Callable[..., Any], list[int]] = {}
        for place, call in enumerate(calls):
            groups.setdefault(call.operation, []).append(place)
        results: list[Any] = [None] * len(calls)
        for operation, places in groups.items():
            for place, result in zip(
                places,
                operation(tx, [calls[place].item for place in places]),
                strict=True,
            ):
                results[place] = result
            tx.write()
        outbox.flush(tx)
    return results, tx


def execute(connection: Connection, begin: Begin, calls: Sequence[Call], slots: dict[str, int]) -> Batch:
    """Runs a batch; after a failure each of its calls in a transaction of its own."""
    if len(calls) > 1:
        with suppress(Exception):  # which call it was is found out below, and its caller gets the exception
            results, tx = transact(connection, begin, calls, slots)
            return Batch(results, [tx], tx.slots)
    batch = Batch([], [], slots)
    unavailable = 0
    for call in calls:
        result: Any = StoreUnavailable("the store does not commit")
        for _ in range(TRIES if unavailable < GIVE_UP else 0):
            try:
                (result,), tx = transact(connection, begin, [call], batch.slots)
            except (OperationalError, InterfaceError) as error:
                result = StoreUnavailable(f"the store does not commit: {type(error.orig).__name__}")
                result.__cause__ = error
            except Exception as error:  # noqa: BLE001 - handed to the one who made this call
                result = error
            else:
                batch.committed.append(tx)
                batch.slots = tx.slots
                unavailable = 0
                break
        unavailable += isinstance(result, StoreUnavailable)
        batch.results.append(result)
    return batch


class Committer:
    """Gathers calls and hands them to `run_batch`, one batch at a time."""

    def __init__(
        self,
        run_batch: Callable[[Sequence[Call], dict[str, int]], Awaitable[Batch]],
        signals: Signals,
    ) -> None:
        self._run_batch = run_batch
        self._signals = signals
        self._pending: list[Call] = []
        self._wake = asyncio.Event()
        self._closing = False
        self._busy = False
        self.workers: Workers | None = None

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self._pending and not self._busy

    async def write(
        self,
        operation: Callable[[Transaction, Sequence[Item]], Sequence[Result]],
        item: Item,
    ) -> Result:
        if self._closing:
            raise StoreUnavailable("the store is closed")
        call = Call(operation, item, asyncio.get_running_loop().create_future())
        self._pending.append(call)
        self._wake.set()
        result: Result = await call.future
        return result

    def close(self) -> None:
        """Lets `run` end once everything that waits is committed."""
        self._closing = True
        self._wake.set()

    async def run(self) -> None:
        while True:
            await self._wake.wait()
            if not self._pending:
                if self._closing:
                    return
                self._wake.clear()
                continue
            calls, self._pending = self._pending[:MAX_BATCH], self._pending[MAX_BATCH:]
            self._busy = True
            await self._commit(calls)
            self._busy = False

    async def _commit(self, calls: Sequence[Call]) -> None:
        workers = self.workers
        slots = workers.reserve() if workers else {}
        try:
            batch = await self._run_batch(calls, slots)
        except Exception as error:  # noqa: BLE001 - no connection to be had: every caller is told
            failure = StoreUnavailable("the store cannot be reached")
            failure.__cause__ = error
            batch = Batch([failure] * len(calls), [], slots)
        for call, result in zip(calls, batch.results, strict=True):
            if call.future.done():
                continue
            if isinstance(result, Exception):
                call.future.set_exception(result)
            else:
                call.future.set_result(result)
        if workers:
            workers.take([grant for tx in batch.committed for grant in tx.granted], batch.slots)
        for tx in batch.committed:
            self._signals.notify(tx.touched)
            self._signals.notify(["events"] if tx.emitted else [])
            self._signals.notify(f"work:{stage}" for stage in tx.due)
            if workers:
                workers.committed(tx)
