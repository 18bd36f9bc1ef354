"""The store of one machine, open from example to example, as each of its processes has it, with a loop to run it."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from service.store import Store, Transaction
from tests.contract.conftest import wipe
from tests.contract.subject import Clock, Subject
from tests.property.life_checks import Seen, look
from tests.property.life_work import Read, Write

Result = TypeVar("Result")


def together(tx: Transaction, batches: Sequence[Sequence[Write]]) -> list[list[Any]]:
    """Writes of several kinds in one transaction, as a committer gathers them."""
    made = []
    for writes in batches:
        results: list[Any] = [None] * len(writes)
        for operation in dict.fromkeys(write.operation for write in writes):
            places = [place for place, write in enumerate(writes) if write.operation is operation]
            for place, result in zip(places, operation(tx, [writes[place].item for place in places]), strict=True):
                results[place] = result
            tx.write()
        made.append(results)
    return made


@dataclass(slots=True)
class Bench:
    """One store as each of its processes has it open. `exclusive`: the next process must open the file again, which frees all leases."""

    openers: Sequence[Callable[[], AbstractAsyncContextManager[Store]]]
    clock: Clock
    exclusive: bool
    subjects: list[Subject] = field(default_factory=list)
    steps: int = 0
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    _stores: AsyncExitStack = field(default_factory=AsyncExitStack)

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return self._loop.run_until_complete(work)

    @contextmanager
    def opened(self) -> Iterator["Bench"]:
        try:
            self.open()
            yield self
        finally:
            self.run(self._stores.aclose())
            self.run(self._loop.shutdown_default_executor())
            self._loop.close()

    def open(self) -> None:
        self.subjects = [Subject(self.run(self._stores.enter_async_context(opener())), self.clock) for opener in self.openers]

    def reopen(self) -> None:
        self.run(self._stores.aclose())
        self.open()

    def reset(self) -> None:
        """An empty store, at the beginning of time."""
        self.clock.now = Clock().now
        self.subjects[0].places.free = {}
        self.write(0, Write(wipe, None))

    def write(self, process: int, *writes: Write) -> list[Any]:
        return self.run(self.subjects[process].store.write(together, writes))

    def read(self, process: int, read: Read) -> Any:
        return self.run(self.subjects[process].store.read(read.query, *read.arguments))

    def look(self, before: Seen) -> Seen:
        return self.run(self.subjects[0].store.read(look, before))
