"""Group commit: `BatchingStore` gathers waiting writes, runs them in one transaction and resolves
every caller's future after the commit.

When a batch fails, each of its items runs again in a transaction of its own, so that one bad item
fails alone. Operations carry their own ids. If the answer to a commit is lost, running the same
operation again therefore changes nothing.
"""

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, ProgrammingError
from sqlalchemy.exc import TimeoutError as NoConnection

from service.db.signals import Signals, Workers
from service.db.transaction import Transaction
from service.errors import StoreUnavailable

MAX_BATCH = 100  # about 10 ms of statements
MAX_PATIENT = 20  # items that are not urgent, so that an urgent item never waits for more of them
BESIDE_URGENT = 5  # items that are not urgent in a batch of urgent ones, so that they never starve
TRIES = 2  # of a single item: after losing a race for a unique key, the second finds that row
GIVE_UP = 3  # failures of the store in a row: the rest of the batch would fare no better

Item = TypeVar("Item")
Result = TypeVar("Result")
P = ParamSpec("P")
# Runs a function of a connection and some arguments inside the open transaction.
Run = Callable[..., Awaitable[tuple[list[Any], Transaction]]]


@dataclass(slots=True, eq=False)
class Call:
    """One item on its way into a transaction."""

    operation: Callable[[Transaction, Sequence[Any]], Sequence[Any]]
    item: Any
    future: "asyncio.Future[Any]"


@dataclass(slots=True)
class Batch:
    """The outcome of a batch: results or exceptions in the order of the calls, the committed
    transactions, and the slots that they left unused.
    """

    results: list[Any]
    committed: list[Transaction]
    slots: dict[str, int]


def blames_item(error: Exception) -> bool:
    """Whether the item is at fault and not the store, by the exception or by its SQLSTATE class
    (data, constraint, syntax).
    """
    state = str(getattr(getattr(error, "orig", None), "sqlstate", None) or "")
    by_type = isinstance(error, IntegrityError | DataError | ProgrammingError)
    return by_type or state[:2] in ("22", "23", "42")


class BatchingStore(ABC):
    """Durable state with group commit. A backend supplies the abstract methods.

    Each of the `committers` runs one transaction at a time and takes its next batch from the one
    queue that all of them share.
    """

    committers = 1

    def __init__(
        self, process: str, new_id: Callable[[str, int], str], flush: Callable[[Transaction], None]
    ) -> None:
        self.signals = Signals()
        self.process = process
        self.workers: Workers | None = None
        self._new_id = new_id
        self._flush = flush
        self._urgent: deque[Call] = deque()
        self._patient: deque[Call] = deque()
        self._wake = asyncio.Event()
        self._closing = False
        self.busy = 0  # committers with a batch in hand
        self.give_way: Callable[[], None] = lambda: None  # called by threads with a long read

    @abstractmethod
    def transaction(self) -> AbstractAsyncContextManager[Run]:
        """A transaction: committed at the end of the block, or rolled back after an exception."""

    @abstractmethod
    def now(self, connection: Connection) -> int:
        """The store's time at the start of a transaction."""

    @abstractmethod
    def clock(self) -> int:
        """The store's time in milliseconds since 1970 UTC, to compare with stored times."""

    @abstractmethod
    async def read(
        self, query: Callable[Concatenate[Connection, P], Result], *args: P.args, **kwargs: P.kwargs
    ) -> Result:
        """Runs a query on a connection that sees every earlier commit. Reads for different holders
        take turns (`fair_slots`).
        """

    async def look_up(
        self, query: Callable[Concatenate[Connection, P], Result], *args: P.args, **kwargs: P.kwargs
    ) -> Result:
        """Like `read`, for a query that finds few rows by their keys. On SQLite the event loop
        stands still meanwhile, and holders take no turns.
        """
        return await self.read(query, *args, **kwargs)

    def attach(self, workers: Workers) -> None:
        """From now on transactions lease rows to these workers."""
        self.workers = workers

    def detach(self) -> None:
        """Transactions lease no more rows, because the process is about to stop."""
        self.workers = None

    async def write(
        self,
        operation: Callable[[Transaction, Sequence[Item]], Sequence[Result]],
        item: Item,
        *,
        urgent: bool = False,
    ) -> Result:
        """Runs the operation over this and other waiting items in one transaction. Urgent items go
        first. It returns after the commit. StoreUnavailable: nothing was committed.
        """
        if self._closing:
            raise StoreUnavailable("the store is closed")
        call = Call(operation, item, asyncio.get_running_loop().create_future())
        (self._urgent if urgent else self._patient).append(call)
        self._wake.set()
        result: Result = await call.future
        return result

    @asynccontextmanager
    async def committing(self) -> AsyncIterator[None]:
        """Commits batches until the end of the block, and then all writes that still wait."""
        committers = (self._commit_batches() for _ in range(self.committers))
        running = asyncio.gather(*committers)
        try:
            yield
        finally:
            self._closing = True
            self._wake.set()
            await running

    async def _commit_batches(self) -> None:
        while True:
            await self._wake.wait()
            await asyncio.sleep(0)  # every caller of this turn of the loop joins the batch
            calls = self._next()
            if calls:
                self.busy += 1
                await self._commit(calls)
                self.busy -= 1
            elif self._closing:
                return
            else:
                self._wake.clear()

    def _next(self) -> list[Call]:
        calls = [self._urgent.popleft() for _ in range(min(len(self._urgent), MAX_BATCH))]
        count = min(len(self._patient), BESIDE_URGENT if calls else MAX_PATIENT)
        return calls + [self._patient.popleft() for _ in range(count)]

    async def _commit(self, calls: Sequence[Call]) -> None:
        workers = self.workers
        slots = self._slots(workers) if workers else {}
        try:
            batch = await self.execute(calls, slots)
        except Exception as error:  # noqa: BLE001 - no connection: every caller gets the failure
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
            workers.take([lease for tx in batch.committed for lease in tx.leased], batch.slots)
        for tx in batch.committed:
            if workers:
                with suppress(Exception):  # the commit stands, and the next batch must not wait
                    workers.committed(tx)
            self.signals.notify(tx.touched, tx.touched)
            self.signals.notify(["events"] if tx.emitted else [])

    def _slots(self, workers: Workers) -> dict[str, int]:
        """The free slots for a batch: its share, if other committers have work at the same time."""
        free = workers.reserve()
        sharers = min(self.committers, self.busy + bool(self._urgent or self._patient))
        slots = {stage: -(-count // sharers) for stage, count in free.items()}
        workers.take((), {stage: count - slots[stage] for stage, count in free.items()})
        return slots

    async def execute(self, calls: Sequence[Call], slots: dict[str, int]) -> Batch:
        """Runs a batch. If it fails, runs each of its calls in a transaction of its own."""
        if len(calls) > 1:
            with suppress(Exception):  # the single runs below find the call that failed
                results, tx = await self._transact(calls, slots)
                return Batch(results, [tx], tx.slots)
        batch = Batch([], [], slots)
        unavailable = 0
        for call in calls:
            result: Any = StoreUnavailable("the store does not commit")
            for _ in range(TRIES if unavailable < GIVE_UP else 0):
                try:
                    (result,), tx = await self._transact([call], batch.slots)
                except (DBAPIError, NoConnection, OSError) as error:
                    if blames_item(error):
                        result = error
                        continue
                    result = StoreUnavailable(f"the store does not commit: {type(error).__name__}")
                    result.__cause__ = error
                except Exception as error:  # noqa: BLE001 - the caller of this item gets it
                    result = error
                else:
                    batch.committed.append(tx)
                    batch.slots = tx.slots
                    unavailable = 0
                    break
            unavailable += isinstance(result, StoreUnavailable)
            batch.results.append(result)
        return batch

    async def _transact(
        self, calls: Sequence[Call], slots: dict[str, int]
    ) -> tuple[list[Any], Transaction]:
        async with self.transaction() as run:
            return await run(self.apply, calls, slots)

    def begin(self, connection: Connection, slots: dict[str, int]) -> Transaction:
        shares = self.workers.shares() if self.workers else {}
        now = self.now(connection)
        return Transaction(connection, now, self.process, self._new_id, slots, shares)

    def apply(
        self, connection: Connection, calls: Sequence[Call], slots: dict[str, int]
    ) -> tuple[list[Any], Transaction]:
        """Runs the calls in an open transaction, operation by operation.

        The outbox comes last because its counter row stays locked until the commit.
        """
        tx = self.begin(connection, dict(slots))
        groups: dict[Callable[..., Any], list[int]] = {}
        for index, call in enumerate(calls):
            groups.setdefault(call.operation, []).append(index)
        results: list[Any] = [None] * len(calls)
        for operation, indexes in groups.items():
            answers = operation(tx, [calls[index].item for index in indexes])
            for index, result in zip(indexes, answers, strict=True):
                results[index] = result
            tx.write()
        tx.finish()
        self._flush(tx)
        return results, tx
