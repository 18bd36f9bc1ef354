"""Group commit: what waits is gathered, run in one transaction, and every waiter is woken after the
commit.

A failed batch is run again one item at a time, so that one bad item fails alone. Operations carry
ids of their own, so that running one again after a commit whose answer was lost is harmless.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, ProgrammingError
from sqlalchemy.exc import TimeoutError as NoConnection

from service.db.store import Item, Result, Signals, Workers
from service.db.transaction import Transaction
from service.errors import StoreUnavailable
from service.events import outbox

MAX_BATCH = 100  # about 10 ms of statements
MAX_PATIENT = 20  # of those that are not urgent: what is urgent never waits longer than for so many
TRIES = 2  # of a single item: who lost a race for a unique key finds the winner's row at the second
GIVE_UP = 3  # items in a row that the store itself failed: the rest would fare no better
BESIDE_URGENT = 5

Begin = Callable[[Connection, dict[str, int]], Transaction]
Run = Callable[
    ..., Awaitable[tuple[list[Any], Transaction]]
]  # runs a function of a connection, and some arguments
Transactions = Callable[
    [], AbstractAsyncContextManager[Run]
]  # a transaction: committed at the end of the block, or rolled back


@dataclass(slots=True, eq=False)
class Call:
    """One item on its way into a transaction."""

    operation: Callable[[Transaction, Sequence[Any]], Sequence[Any]]
    item: Any
    future: "asyncio.Future[Any]"


@dataclass(slots=True)
class Batch:
    """What became of some calls: results, or exceptions, in their order; what was committed; the
    places left over.
    """

    results: list[Any]
    committed: list[Transaction]
    slots: dict[str, int]


def apply(
    connection: Connection, begin: Begin, calls: Sequence[Call], slots: dict[str, int]
) -> tuple[list[Any], Transaction]:
    """Runs the calls in an open transaction, operation by operation.

    The outbox comes last because its counter row stays locked until the commit.
    """
    tx = begin(connection, dict(slots))
    groups: dict[Callable[..., Any], list[int]] = {}
    for place, call in enumerate(calls):
        groups.setdefault(call.operation, []).append(place)
    results: list[Any] = [None] * len(calls)
    for operation, places in groups.items():
        made = operation(tx, [calls[place].item for place in places])
        for place, result in zip(places, made, strict=True):
            results[place] = result
        tx.write()
    outbox.flush(tx)
    return results, tx


def is_the_calls_own(error: Exception) -> bool:
    """Whether an item, not the store, is to blame: by the exception, or by its SQLSTATE class
    (data, constraint, syntax).
    """
    state = str(getattr(getattr(error, "orig", None), "sqlstate", None) or "")
    return isinstance(error, IntegrityError | DataError | ProgrammingError) or state[:2] in (
        "22",
        "23",
        "42",
    )


async def execute(
    transaction: Transactions, begin: Begin, calls: Sequence[Call], slots: dict[str, int]
) -> Batch:
    """Runs a batch; after a failure each of its calls in a transaction of its own."""

    async def transact(some: Sequence[Call], free: dict[str, int]) -> tuple[list[Any], Transaction]:
        async with transaction() as run:
            return await run(apply, begin, some, free)

    if len(calls) > 1:
        with suppress(
            Exception
        ):  # which call it was is found out below, and its caller gets the exception
            results, tx = await transact(calls, slots)
            return Batch(results, [tx], tx.slots)
    batch = Batch([], [], slots)
    unavailable = 0
    for call in calls:
        result: Any = StoreUnavailable("the store does not commit")
        for _ in range(TRIES if unavailable < GIVE_UP else 0):
            try:
                (result,), tx = await transact([call], batch.slots)
            except (DBAPIError, NoConnection, OSError) as error:
                if is_the_calls_own(error):
                    result = error
                    continue
                result = StoreUnavailable(f"the store does not commit: {type(error).__name__}")
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
        busy_ones: Callable[[], int] = lambda: 1,
    ) -> None:
        self._run_batch = run_batch
        self._busy_ones = (
            busy_ones  # committers of this process that are at work, this one included
        )
        self._signals = signals
        self._urgent: deque[Call] = deque()
        self._patient: deque[Call] = deque()
        self._wake = asyncio.Event()
        self._closing = False
        self._busy = False
        self.workers: Workers | None = None

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self._urgent and not self._patient and not self._busy

    async def write(
        self,
        operation: Callable[[Transaction, Sequence[Item]], Sequence[Result]],
        item: Item,
        *,
        urgent: bool = False,
    ) -> Result:
        if self._closing:
            raise StoreUnavailable("the store is closed")
        call = Call(operation, item, asyncio.get_running_loop().create_future())
        (self._urgent if urgent else self._patient).append(call)
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
            await asyncio.sleep(0)  # whoever runs in this turn of the loop comes along
            calls = self._next()
            if not calls:
                if self._closing:
                    return
                self._wake.clear()
                continue
            self._busy = True
            await self._commit(calls)
            self._busy = False

    def _next(self) -> list[Call]:
        calls = [self._urgent.popleft() for _ in range(min(len(self._urgent), MAX_BATCH))]
        places = min(len(self._patient), BESIDE_URGENT if calls else MAX_PATIENT)
        return calls + [self._patient.popleft() for _ in range(places)]

    def _places(self, workers: Workers) -> dict[str, int]:
        """The free places for a batch: its share, when other committers grant leases at the same
        time.
        """
        free, sharers = workers.reserve(), self._busy_ones()
        slots = {stage: -(-places // sharers) for stage, places in free.items()}
        workers.take((), {stage: places - slots[stage] for stage, places in free.items()})
        return slots

    async def _commit(self, calls: Sequence[Call]) -> None:
        workers = self.workers
        slots = self._places(workers) if workers else {}
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
            workers.take([lease for tx in batch.committed for lease in tx.leased], batch.slots)
        for tx in batch.committed:
            self._signals.notify(tx.touched)
            self._signals.notify(["events"] if tx.emitted else [])
            if workers:
                with suppress(
                    Exception
                    # what is committed is committed: the next batch must not wait for who is told
                    # of this one
                ):
                    workers.committed(tx)
