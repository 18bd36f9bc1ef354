"""API keys: made, listed, revoked; owners' callback secrets. A key is shown once; the store has its
hash.
"""

import base64
import os
from collections.abc import Sequence

import structlog
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.db.paging import Row
from service.db.store import Store
from service.errors import ApiError
from service.events.outbox import OPERATORS
from service.events.secrets import rotate_secret
from service.ids import rfc3339
from service.resources import new_id
from service.signing import Keyring, hash_api_key, new_secret
from service.strict_json import JSON
from service.tasks import owner_keys
from service.tasks.owner_keys import NewKey as StoredKey
from service.tasks.owner_keys import NewOwner, insert_keys, insert_owners, revoke_keys
from service.web.auth import HINT_CHARS, KEY_PREFIX
from service.web.bodies import page, place_of, query_limit, read_cursor, read_json, validated
from service.web.context import context_of
from service.web.routes.task_routes import caller_of
from service.web.schemas import NewKey, SecretRotation

log = structlog.get_logger()


async def create_key(
    store: Store, keyring: Keyring, now: int, owner: str, scopes: Sequence[str]
) -> JSON:
    """Makes a key; the answer holds it, and the owner's callback secret if this is its first."""
    key = KEY_PREFIX + base64.b32encode(os.urandom(25)).decode().lower()  # 200 bits
    secret = new_secret(os.urandom(32))
    stored = StoredKey(
        new_id("key", now),
        owner,
        hash_api_key(key),
        key[:HINT_CHARS],
        tuple(scopes),
        keyring.encrypt(secret),
    )
    first = await store.write(insert_keys, stored)
    rows = await store.read(owner_keys.key_list)
    row = next(row for row in rows if row["id"] == stored.id)
    return {**shown(row), "key": key, "callback_secret": secret if first else None}


def shown(row: Row) -> JSON:
    return {
        "id": row["id"],
        "owner": row["owner"],
        "hint": row["hint"],
        "scopes": row["scopes"],
        "created_at": rfc3339(row["created_at"]),
        "revoked_at": rfc3339(row["revoked_at"]) if row["revoked_at"] is not None else None,
    }


async def create(request: Request) -> Response:
    resources = context_of(request).resources
    body = validated(NewKey, await read_json(request))
    made = await create_key(
        resources.store, resources.keyring, resources.clock(), body.owner, body.scopes
    )
    log.info("admin.action", action="key.create", subject=made["id"])
    return JSONResponse(made, 201)


async def rotate_callback_secret(
    store: Store, keyring: Keyring, now: int, owner: str, overlap_s: float
) -> JSON:
    """Another callback secret; those before it sign too for so many seconds. ApiError 404: there is
    no such owner.
    """
    if owner == OPERATORS:  # the owner of DARKROOM_ADMIN_KEY may have no row yet
        first = keyring.encrypt(new_secret(os.urandom(32)))
        await store.write(insert_owners, NewOwner(owner, first))
    secret = await rotate_secret(store, keyring, now, "owners", owner, overlap_s)
    if secret is None:
        raise ApiError(404, "owner_not_found", "no owner has that name", param="owner")
    return {"owner": owner, "callback_secret": secret}


async def rotate(request: Request) -> Response:
    resources, caller = context_of(request).resources, caller_of(request)
    body = validated(SecretRotation, await read_json(request, empty=True))
    owner = body.owner or caller.owner
    if owner != caller.owner and caller.sees is not None:
        raise ApiError(
            403,
            "permission_denied",
            "owner: only the scope admin may rotate others' secrets",
            param="owner",
        )
    made = await rotate_callback_secret(
        resources.store, resources.keyring, resources.clock(), owner, body.overlap_s
    )
    log.info("admin.action", action="owner.rotate", subject=owner)
    return JSONResponse(made)


async def listed(request: Request) -> Response:
    limit, after = query_limit(request), read_cursor(request)
    rows = await context_of(request).resources.store.read(owner_keys.key_list)
    older = [row for row in reversed(rows) if after is None or place_of(row) < after]
    return page(older, limit, place_of, shown)


async def revoke(request: Request) -> Response:
    key_id = request.path_params["key_id"]
    if not await context_of(request).resources.store.write(revoke_keys, key_id):
        raise ApiError(404, "key_not_found", "no key has that id")
    log.info("admin.action", action="key.revoke", subject=key_id)
    return Response(status_code=204)
