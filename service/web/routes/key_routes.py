"""API keys, and owners' callback secrets. A key is shown once. The store keeps its hash."""

import base64
import os
from collections.abc import Callable
from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.credits import credits_number, millionths
from service.db.batching import BatchingStore
from service.db.paging import Row
from service.errors import ApiError
from service.events import secrets
from service.events.outbox import OPERATORS
from service.ids import rfc3339, rfc3339_or_none
from service.resources import new_id
from service.signing import Keyring, hash_api_key, new_secret
from service.strict_json import JSON
from service.tasks import owner_keys
from service.tasks.audit import unless
from service.tasks.budgets import Budget, set_budgets
from service.tasks.owner_keys import NewOwner, StoredKey, insert_keys, insert_owners, revoke_keys
from service.web.acts import perform, performing
from service.web.auth import HINT_CHARS, KEY_PREFIX, caller_of
from service.web.bodies import read_model
from service.web.context import resources_of
from service.web.key_schemas import NewKey, SecretRotation
from service.web.list_page import page, position_of

Acting = Callable[[str, str, JSON | None], secrets.Write]


async def create_key(
    store: BatchingStore, keyring: Keyring, now: int, body: NewKey, acting: Acting
) -> JSON:
    """Creates a key. `acting` writes an action on a target, with an entry of the audit."""
    owner, scopes, set_budget = body.owner, body.scopes, None
    if body.budget is not None:  # before the key, which could spend without it
        limit = millionths(body.budget.credits)
        budget = Budget(owner, body.budget.period, limit)
        set_budget = {"period": budget.period, "credits": credits_number(limit)}
        await acting("budget.set", owner, set_budget)(set_budgets, budget)
    key = KEY_PREFIX + base64.b32encode(os.urandom(25)).decode().lower()  # 200 bits
    id, hint, secret = new_id("key", now), key[:HINT_CHARS], new_secret(os.urandom(32))
    stored = StoredKey(id, owner, hash_api_key(key), hint, tuple(scopes), keyring.encrypt(secret))
    detail: JSON = {"owner": owner, "scopes": list(scopes)}
    first = await acting("key.create", id, detail)(insert_keys, stored)
    row = next(row for row in await store.read(owner_keys.key_list) if row["id"] == id)
    shown_once = {"key": key, "callback_secret": secret if first else None}
    return {**shown(row), **shown_once, "budget": set_budget}


def shown(row: Row) -> JSON:
    return {
        **{name: row[name] for name in ("id", "owner", "hint", "scopes")},
        "created_at": rfc3339(row["created_at"]),
        "revoked_at": rfc3339_or_none(row["revoked_at"]),
    }


async def create(request: Request) -> Response:
    """Create an API key."""
    resources, body = resources_of(request), await read_model(request, NewKey)
    store, keyring, now = resources.store, resources.keyring, resources.clock()
    document = await create_key(store, keyring, now, body, partial(performing, request))
    return JSONResponse(document, 201)


async def rotate_callback_secret(
    store: BatchingStore, keyring: Keyring, now: int, owner: str, overlap_s: float, acting: Acting
) -> JSON:
    """Gives an owner a new callback secret. Raises ApiError 404 for an unknown owner."""
    if owner == OPERATORS:  # the owner of DARKROOM_ADMIN_KEY may have no row yet
        first = keyring.encrypt(new_secret(os.urandom(32)))
        await store.write(insert_owners, NewOwner(owner, first))
    write = acting("owner.rotate", owner, None)
    secret = await secrets.rotate_secret(store, keyring, now, "owners", owner, overlap_s, write)
    if secret is None:
        raise ApiError(404, "owner_not_found", "no owner has that name", param="owner")
    return {"owner": owner, "callback_secret": secret}


async def rotate_secret(request: Request) -> Response:
    """Create a new callback secret. Both secrets sign during the overlap."""
    resources, caller = resources_of(request), caller_of(request)
    body = await read_model(request, SecretRotation)
    owner = body.owner or caller.owner
    if owner != caller.owner and caller.sees is not None:
        message = "owner: only the scope admin may rotate others' secrets"
        raise ApiError(403, "permission_denied", message, param="owner")
    store, keyring, now = resources.store, resources.keyring, resources.clock()
    acting: Acting = partial(performing, request)
    document = await rotate_callback_secret(store, keyring, now, owner, body.overlap_s, acting)
    return JSONResponse(document)


async def listed(request: Request) -> Response:
    """List API keys, newest first."""
    return await page(request, owner_keys.key_list, position_of, shown)


async def revoke(request: Request) -> Response:
    """Revoke an API key."""
    key_id = request.path_params["key_id"]
    act = "key.revoke", key_id, revoke_keys, key_id, unless("missing")
    if not await perform(request, *act):
        raise ApiError(404, "key_not_found", "no key has that id")
    return Response(status_code=204)
