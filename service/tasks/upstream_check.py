"""Checks the settings of the upstream with a free call, and tells operators about its account."""

import asyncio
from contextlib import suppress
from dataclasses import dataclass

import structlog

from service.db.counters import set_counter
from service.db.transaction import Transaction, one_by_one
from service.errors import StoreUnavailable
from service.events import outbox
from service.resources import Resources
from service.tasks.account_breaker import AccountBreaker, is_document
from service.upstreams.base import Upstream

log = structlog.get_logger()

LOOK_S = 5.0  # how late the check sees that the upstream stopped answering
WAITS_S = (1.0, 2.0, 5.0, 15.0, 30.0, 60.0)  # the last one repeats
AGAIN_S = 1.0  # after the store did not commit
REFUSED = "account_refused"  # the counter that keeps what operators were told


@dataclass(frozen=True, slots=True)
class UpstreamCheck:
    """Asks for the credits at the start, which is free. The answer proves the address and the key.

    It asks again by `WAITS_S` while the upstream does not answer, or another program answers in its
    place, and once after an answer to a query that refuses the key.
    """

    resources: Resources
    upstream: Upstream
    breaker: AccountBreaker

    async def run(self) -> None:
        """Asks until cancelled. The breaker hears of a refusal from the upstream's adapter."""
        failures = 0
        while True:
            self.breaker.doubted.clear()
            answer = None
            with self.breaker.guarded():
                answer = await self.breaker.credits()
            failures = 0 if self.upstream.answering else failures + 1
            if answer is not None and is_document(answer):
                self.breaker.changed.set()  # another process may have told of a refusal
            if failures == 1:
                status = answer.status if answer else None
                log.error("upstream.unusable", status=status, setting="DARKROOM_EVOLINK_BASE_URL")
            await asyncio.sleep(WAITS_S[min(max(failures, 1), len(WAITS_S)) - 1])
            while self.upstream.answering and not self.breaker.doubted.is_set():
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_S):
                        await self.breaker.doubted.wait()

    async def announce(self) -> None:
        """Tells operators when the breaker opens and closes, until cancelled."""
        while True:
            await self.breaker.changed.wait()
            self.breaker.changed.clear()
            reason = self.breaker.reason if self.breaker.is_open else None
            try:
                await self.resources.store.write(tell, (self.upstream.name, reason))
            except StoreUnavailable:
                self.breaker.changed.set()
                await asyncio.sleep(AGAIN_S)


@one_by_one
def tell(tx: Transaction, item: tuple[str, str | None]) -> None:
    """Emits the operators' event about an upstream, unless another process has told the same.
    Without a reason, the upstream takes the service's key and account.
    """
    upstream, reason = item
    if set_counter(tx, REFUSED, int(reason is not None)):
        data = {"upstream": upstream} | ({} if reason is None else {"reason": reason})
        name = "account.restored" if reason is None else "account.refused"
        outbox.emit_operators(tx, name, data)
