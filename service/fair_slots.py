"""Fair shares of slots: threads, requests, jobs of a stage.

A slot is held until its work ends, and nothing takes it back meanwhile. So the share of a holder
must leave slots free, also while no other holder has work. The rule is the dynamic threshold of
Choudhury and Hahne (1998): a share ends where it is as large as a part of the free rest. If all of
the rest counts, one greedy holder gets half of the slots. The next one gets half of what is left,
and so on. With a quarter of it they get a fifth each, and ten of them leave a tenth free.
"""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar

# The holder of the work at hand: an owner, or a client's address while its key is not verified.
HOLDER: ContextVar[str] = ContextVar("holder", default="")


def has_share(used: int, free: int, rest: int = 1) -> bool:
    """Whether a holder may take another slot: one for each `rest` free ones, or the first."""
    return rest * used < free


class FairSlots:
    """Slots for work that waits for them. Holders take turns, and none takes all slots."""

    def __init__(self, total: int, rest: int = 1) -> None:
        self._free, self._rest = total, rest
        self._used = Counter[str]()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # the next holder first

    async def take(self) -> str:
        """Waits for a slot for `HOLDER`, which `give_back` takes."""
        holder, slot = HOLDER.get(), asyncio.get_running_loop().create_future()
        self._waiting.setdefault(holder, deque()).append(slot)
        self._admit()
        try:
            await slot
        except asyncio.CancelledError:
            if slot.done() and not slot.cancelled():  # admitted in this turn of the loop
                self.give_back(holder)
            raise
        return holder

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """A slot for `HOLDER` until the end of the block."""
        holder = await self.take()
        try:
            yield
        finally:
            self.give_back(holder)

    def give_back(self, holder: str) -> None:
        self._free += 1
        self._used[holder] -= 1
        if not self._used[holder]:
            del self._used[holder]
        self._admit()

    def _admit(self) -> None:
        while (holder := self._next()) is not None:
            queue = self._waiting.pop(holder)
            slot = queue.popleft()
            if queue:
                self._waiting[holder] = queue
            if not slot.cancelled():
                self._free -= 1
                self._used[holder] += 1
                slot.set_result(None)

    def _next(self) -> str | None:
        if not self._free:
            return None
        shares = (h for h in self._waiting if has_share(self._used[h], self._free, self._rest))
        return next(shares, None)
