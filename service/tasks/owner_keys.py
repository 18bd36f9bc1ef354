"""Owners and their API keys. A key itself is never kept, only its hash."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, insert, select, update

from service.db.paging import Row
from service.db.tables import api_keys, endpoints, owners, tasks
from service.db.transaction import Transaction


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key to be made; `callback_secret` (encrypted) becomes the owner's if this is its first."""

    id: str
    owner: str
    hash: str
    hint: str
    scopes: tuple[str, ...]
    callback_secret: bytes


@dataclass(frozen=True, slots=True)
class NewOwner:
    """An owner that has no key yet, like `admin` with `DARKROOM_ADMIN_KEY` alone; `callback_secret`
    is encrypted.
    """

    name: str
    callback_secret: bytes


def insert_owners(tx: Transaction, items: Sequence[NewOwner]) -> list[None]:
    """Makes owners that are not there, so that their tasks' callbacks can be signed."""
    for item in items:
        if (
            tx.connection.execute(select(owners.c.name).where(owners.c.name == item.name)).first()
            is None
        ):
            tx.connection.execute(
                insert(owners).values(
                    name=item.name, callback_secret=item.callback_secret, created_at=tx.now
                )
            )
    return [None] * len(items)


def insert_keys(tx: Transaction, items: Sequence[NewKey]) -> list[bool]:
    """Makes keys; True where it is the owner's first, which brings the callback secret."""
    results = []
    for item in items:
        insert_owners(tx, [NewOwner(item.owner, item.callback_secret)])
        mine = owners.c.name == item.owner
        kept = tx.connection.execute(
            select(owners.c.callback_secret).where(mine).with_for_update()
        ).scalar_one()
        keyless = (
            tx.connection.execute(
                select(api_keys.c.id).where(api_keys.c.owner == item.owner)
            ).first()
            is None
        )
        if keyless:  # nobody was shown the one it has
            tx.connection.execute(
                update(owners).where(mine).values(callback_secret=item.callback_secret)
            )
        if (
            tx.connection.execute(select(api_keys.c.id).where(api_keys.c.id == item.id)).first()
            is None
        ):
            tx.connection.execute(
                insert(api_keys).values(
                    id=item.id,
                    owner=item.owner,
                    hash=item.hash,
                    hint=item.hint,
                    scopes=list(item.scopes),
                    created_at=tx.now,
                )
            )
        results.append(keyless or kept == item.callback_secret)
    return results


def revoke_keys(tx: Transaction, ids: Sequence[str]) -> list[bool]:
    """Ends keys; False for ids that are not there. Revoking again changes nothing."""
    statement = (
        update(api_keys)
        .where(api_keys.c.id.in_(ids), api_keys.c.revoked_at.is_(None))
        .values(revoked_at=tx.now)
    )
    tx.connection.execute(statement)
    known = set(
        tx.connection.execute(select(api_keys.c.id).where(api_keys.c.id.in_(ids))).scalars()
    )
    return [id in known for id in ids]


def key_row(connection: Connection, hash: str) -> Row | None:
    return (
        connection.execute(
            select(api_keys).where(api_keys.c.hash == hash, api_keys.c.revoked_at.is_(None))
        )
        .mappings()
        .first()
    )


def needs_its_key(connection: Connection) -> bool:
    """Whether there is anything that was encrypted, or a callback URL that was signed."""
    return any(
        connection.execute(select(column).limit(1)).first()
        for column in (owners.c.name, endpoints.c.id, tasks.c.id)
    )


def key_list(connection: Connection) -> list[Row]:
    return list(
        connection.execute(
            select(api_keys).order_by(api_keys.c.created_at, api_keys.c.id)
        ).mappings()
    )
