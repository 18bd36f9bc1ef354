"""Secrets that sign what is sent: an endpoint's, an owner's. Several at once while one takes over
from another.
"""

import json
from collections.abc import Sequence

from sqlalchemy import Connection, select

from service.db.tables import endpoints, owners
from service.errors import ConfigurationError
from service.signing import SECRET_PREFIX, Keyring

MOST = 8  # in overlaps


def encode_secrets(secrets: Sequence[tuple[str, int | None]]) -> str:
    """Secrets as they are encrypted: the newest first, each with the time (milliseconds) its
    overlap ends.
    """
    return json.dumps(secrets)


def _known(text: str) -> list[tuple[str, int | None]]:
    """An owner's that was never rotated stands alone."""
    return [(text, None)] if text.startswith(SECRET_PREFIX) else json.loads(text)


def valid_secrets(text: str, now: int) -> list[str]:
    """Those that sign now."""
    return [secret for secret, until in _known(text) if until is None or until > now]


def rotation(keyring: Keyring, held: bytes, new: str, now: int, overlap_ms: int) -> bytes:
    """`rotated` as it is encrypted; secrets that no key of ours decrypts have no overlap."""
    try:
        known = keyring.decrypt(held)
    except ConfigurationError:
        return keyring.encrypt(encode_secrets([(new, None)]))
    return keyring.encrypt(rotated(known, new, now, overlap_ms))


def rotated(text: str, new: str, now: int, overlap_ms: int) -> str:
    """The secrets with a new one in front; those before it sign until the overlap ends, and no
    longer than they would have.
    """
    ends = now + overlap_ms
    old = [(secret, ends if until is None else min(until, ends)) for secret, until in _known(text)]
    return encode_secrets([(new, None), *[each for each in old if each[1] > now][: MOST - 1]])


def callback_secret(connection: Connection, owner: str) -> bytes | None:
    """What an owner's tasks' own callbacks are signed with, encrypted; None before the owner's
    first key.
    """
    return connection.execute(
        select(owners.c.callback_secret).where(owners.c.name == owner)
    ).scalar()


def secrets(connection: Connection, table: str, after: str, limit: int) -> list[tuple[str, bytes]]:
    """Encrypted secrets of `endpoints` (by id) or `owners` (by name), from the one after
    `after`.
    """
    key, secret = {
        "endpoints": (endpoints.c.id, endpoints.c.secret),
        "owners": (owners.c.name, owners.c.callback_secret),
    }[table]
    return [
        (row[0], row[1])
        for row in connection.execute(
            select(key, secret).where(key > after).order_by(key).limit(limit)
        )
    ]
