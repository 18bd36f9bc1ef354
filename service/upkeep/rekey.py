"""Rekeying encrypts the stored secrets under the first key of `DARKROOM_SECRET_KEY`, so that the
last key can be dropped.

It runs at the start of each process with workers and every hour. While a new key is rolled out, a
process that does not have it first still writes with the old one.
"""

import asyncio

import structlog

from service.errors import ConfigurationError
from service.events.secrets import COLUMNS, SecretChange, change_secrets, stored_secrets
from service.resources import Resources

log = structlog.get_logger()

PAGE = 100
PAUSE_S = 0.05  # between pages


async def rekey(resources: Resources) -> int:
    """Looks at every secret once and returns how many it encrypted again.

    StoreUnavailable: the rest waits for the next run.
    """
    renewed, unreadable = 0, 0
    for table in COLUMNS:
        last = ""
        while page := await resources.store.read(stored_secrets, table, last, PAGE):
            for key, secret in page:
                try:
                    after = resources.keyring.renewed(secret)
                except ConfigurationError:
                    unreadable += 1
                    continue
                if after is not None:
                    # The change is refused if the secret was rotated or deleted meanwhile.
                    change = SecretChange(table, key, secret, after)
                    renewed += await resources.store.write(change_secrets, change)
            last = page[-1][0]
            await asyncio.sleep(PAUSE_S)
    if renewed:
        log.info("secrets.rekeyed", count=renewed)
    if unreadable:
        log.error("secrets.unreadable", count=unreadable)
    return renewed
