"""Owners and their API keys. The store keeps the hash of a key, never the key."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, insert, select, update

from service.db.operator_tables import api_keys
from service.db.paging import Row, Selection, page
from service.db.tables import endpoints, owners, tasks
from service.db.transaction import Transaction, one_by_one

ALL = Selection()


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A new key. `callback_secret` (encrypted) becomes the owner's with the owner's first key."""

    id: str
    owner: str
    hash: str
    hint: str
    scopes: tuple[str, ...]
    callback_secret: bytes


@dataclass(frozen=True, slots=True)
class NewOwner:
    """An owner without a key, like `admin` with `DARKROOM_ADMIN_KEY`. The secret is encrypted."""

    name: str
    callback_secret: bytes


@one_by_one
def insert_owners(tx: Transaction, item: NewOwner) -> None:
    """Inserts an owner that does not exist, so that its tasks' callbacks can be signed."""
    existing = select(owners.c.name).where(owners.c.name == item.name)
    if tx.connection.execute(existing).first() is None:
        values = {"name": item.name, "callback_secret": item.callback_secret}
        tx.connection.execute(insert(owners).values(**values, created_at=tx.now))


@one_by_one
def insert_keys(tx: Transaction, item: StoredKey) -> bool:
    """Inserts a key. True for the owner's first one, which brings the callback secret."""
    execute, own = tx.connection.execute, owners.c.name == item.owner
    insert_owners(tx, [NewOwner(item.owner, item.callback_secret)])
    secret = execute(select(owners.c.callback_secret).where(own).with_for_update()).scalar_one()
    first = execute(select(api_keys.c.id).where(api_keys.c.owner == item.owner)).first() is None
    if first:  # no client has seen the secret of an owner without a key
        execute(update(owners).where(own).values(callback_secret=item.callback_secret))
    if execute(select(api_keys.c.id).where(api_keys.c.id == item.id)).first() is None:
        values = {name: getattr(item, name) for name in ("id", "owner", "hash", "hint")}
        values |= {"scopes": list(item.scopes), "created_at": tx.now}
        execute(insert(api_keys).values(values))
    return first or secret == item.callback_secret


def revoke_keys(tx: Transaction, ids: Sequence[str]) -> list[bool]:
    """Revokes keys. False for ids that do not exist."""
    valid = (api_keys.c.id.in_(ids), api_keys.c.revoked_at.is_(None))
    tx.connection.execute(update(api_keys).where(*valid).values(revoked_at=tx.now))
    existing = select(api_keys.c.id).where(api_keys.c.id.in_(ids))
    stored = set(tx.connection.execute(existing).scalars())
    return [id in stored for id in ids]


def key_row(connection: Connection, hash: str) -> Row | None:
    valid = (api_keys.c.hash == hash, api_keys.c.revoked_at.is_(None))
    return connection.execute(select(api_keys).where(*valid)).mappings().first()


def key_list(connection: Connection, wanted: Selection = ALL) -> list[Row]:
    return list(connection.execute(page(select(api_keys), api_keys, wanted)).mappings())


def needs_its_key(connection: Connection) -> bool:
    """Whether the store has an encrypted secret or a task with a signed callback URL."""
    return any(
        connection.execute(select(column).limit(1)).first()
        for column in (owners.c.name, endpoints.c.id, tasks.c.id)
    )
