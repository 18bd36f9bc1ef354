"""Secrets in the store come under the first key of `DARKROOM_SECRET_KEY`, so that the last one can
be dropped some day.

At each start of a process with workers, and hourly: while a new key goes round, a process that has
not got it first writes with the old.
"""

import asyncio
from dataclasses import dataclass

import structlog

from service.errors import ConfigurationError
from service.events.secrets import SecretChange, change_secrets, stored_secrets
from service.queue.periodic import hourly
from service.resources import Resources

log = structlog.get_logger()

PAGE = 100
PAUSE_S = 0.05  # between pages


@dataclass(frozen=True, slots=True)
class Rekeying:
    """A job of every process with workers."""

    resources: Resources

    async def run(self) -> None:
        await hourly(self.resources, "rekey", self.rekey, at_once=True)

    async def rekey(self) -> int:
        """Goes through all secrets once; how many were encrypted anew. StoreUnavailable: the rest
        waits.
        """
        renewed, unreadable = 0, 0
        for table in ("endpoints", "owners"):
            last = ""
            while page := await self.resources.store.read(stored_secrets, table, last, PAGE):
                for key, secret in page:
                    try:
                        after = self.resources.keyring.renewed(secret)
                    except ConfigurationError:
                        unreadable += 1
                        continue
                    if after is not None:
                        change = SecretChange(table, key, secret, after)
                        renewed += await self.resources.store.write(change_secrets, change)
                last = page[-1][0]
                await asyncio.sleep(PAUSE_S)
        if renewed:
            log.info("secrets.rekeyed", count=renewed)
        if unreadable:
            log.error("secrets.unreadable", count=unreadable)
        return renewed
