"""Signing secrets of endpoints and owners. After a rotation, the old and the new secret both sign
until the overlap ends.

The store keeps an encrypted list, newest secret first, each with the time (milliseconds) its
overlap ends. A secret that was never rotated is kept alone, without a list.
"""

import json
import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Column, Connection, select, update

from service.db.batching import BatchingStore
from service.db.tables import endpoints, owners
from service.db.transaction import Transaction, one_by_one
from service.errors import ApiError, ConfigurationError
from service.signing import SECRET_PREFIX, Keyring, new_secret

# Writes one item with an operation of the store, and returns its result.
Write = Callable[[Callable[[Transaction, Sequence[Any]], Sequence[Any]], Any], Awaitable[Any]]
MAX_SECRETS = 8  # of one endpoint or owner, overlaps included
ROTATION_TRIES = 5
COLUMNS: dict[str, tuple[Column[Any], Column[Any]]] = {
    "endpoints": (endpoints.c.id, endpoints.c.secret),
    "owners": (owners.c.name, owners.c.callback_secret),
    "headers": (endpoints.c.id, endpoints.c.headers),
}


def _decode(text: str) -> list[tuple[str, int | None]]:
    return [(text, None)] if text.startswith(SECRET_PREFIX) else json.loads(text)


def valid_secrets(text: str, now: int) -> list[str]:
    return [secret for secret, until in _decode(text) if until is None or until > now]


def rotated(text: str, new: str, now: int, overlap_ms: int) -> str:
    """Puts a new secret first. The secrets before it sign until the overlap ends, and no longer
    than they would have.
    """
    ends = now + overlap_ms
    old = [(secret, ends if until is None else min(until, ends)) for secret, until in _decode(text)]
    return json.dumps([(new, None), *[item for item in old if item[1] > now][: MAX_SECRETS - 1]])


async def rotate_secret(
    store: BatchingStore,
    keyring: Keyring,
    now: int,
    table: str,
    key: str,
    overlap_s: float,
    write: Write,
) -> str | None:
    """Gives an endpoint or owner a new secret and returns it, or None if the row does not exist.

    `write` writes the change with an entry of the audit. An old secret that no key decrypts gets no
    overlap. Raises ApiError 409 if other rotations of the same secret win `ROTATION_TRIES` times.
    """
    for _ in range(ROTATION_TRIES):
        before = await store.read(stored_secret, table, key)
        if before is None:
            return None
        text = secret = new_secret(os.urandom(32))
        with suppress(ConfigurationError):
            text = rotated(keyring.decrypt(before), secret, now, round(overlap_s * 1000))
        change = SecretChange(table, key, before, keyring.encrypt(text))
        if await write(change_secrets, change):
            return secret
    raise ApiError(409, "conflict", "the secret is being rotated by other requests")


@dataclass(frozen=True, slots=True)
class SecretChange:
    """Replaces the encrypted secret `before` of a row of `table`."""

    table: str  # a key of `COLUMNS`
    key: str
    before: bytes
    after: bytes


@one_by_one
def change_secrets(tx: Transaction, item: SecretChange) -> bool:
    """Changes a secret. False: the row is gone, or its secret is no longer `before`."""
    key, secret = COLUMNS[item.table]
    statement = update(key.table).where(key == item.key, secret == item.before)
    return tx.connection.execute(statement.values({secret: item.after})).rowcount == 1


def stored_secret(connection: Connection, table: str, key: str) -> bytes | None:
    """The encrypted secret of an endpoint (by id) or an owner (by name)."""
    column, secret = COLUMNS[table]
    return connection.execute(select(secret).where(column == key)).scalar()


def stored_secrets(
    connection: Connection, table: str, after: str, limit: int
) -> list[tuple[str, bytes]]:
    """A page of ids or names with their encrypted secrets, in order, that come after `after`."""
    key, secret = COLUMNS[table]
    rows = connection.execute(
        select(key, secret).where(key > after, secret.is_not(None)).order_by(key).limit(limit)
    )
    return [(row[0], row[1]) for row in rows]
