"""Administration of keys: through the API, or in the store itself when no process serves it."""

import sys
from collections.abc import Callable, Coroutine
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from service.cli.api_client import ApiClient, CommandFailed, ServiceUnreachable
from service.cli.place import CHOSEN, Place, place
from service.errors import ApiError
from service.strict_json import JSON

if TYPE_CHECKING:
    from service.db.batching import BatchingStore
    from service.events.secrets import Write
    from service.settings import Settings
    from service.signing import Keyring

Action = Callable[["BatchingStore", "Keyring", JSON], Coroutine[Any, Any, JSON]]


def administer(
    request: Callable[[ApiClient], JSON], action: Action, fields: JSON
) -> tuple[JSON, Place | str]:
    """Sends `request` to the service that the command line names, or that a variable names with a
    key for it. Otherwise runs `action` in the store here. Returns where that was, too.

    An embedded store is opened only while no process holds its lock. An address of another machine
    is never replaced by the store of this one.
    """
    at, choice = place(), CHOSEN.get()
    client = ApiClient(at, admin=True)
    if choice.url:
        return request(client), at
    keyed = bool(at.api_key or at.admin_key)
    if at.named_by and not choice.local and (keyed or not is_local(at.url)):
        try:
            return request(client), at
        except ServiceUnreachable:
            if not is_local(at.url):
                raise
    from service.settings import load_settings

    settings = load_settings()
    if settings.sqlite_path is None:
        through = at.api_key and not choice.local
        return (request(client), at) if through else in_store(settings, action, fields)
    if is_unserved(settings):
        return in_store(settings, action, fields)
    if not keyed:
        raise CommandFailed(
            f"a process serves this store: {settings.sqlite_path}; set DARKROOM_API_KEY or"
            " DARKROOM_ADMIN_KEY to a key with the scope admin, or stop that process"
        )
    return request(client), at


def is_local(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_unserved(settings: "Settings") -> bool:
    """Whether no process holds the lock of the embedded store at this moment."""
    from service.db.file_lock import store_lock

    assert settings.sqlite_path is not None
    with store_lock(settings.sqlite_path) as alone:
        return alone


def in_store(settings: "Settings", action: Action, fields: JSON) -> tuple[JSON, str]:
    """Runs an action in the store. Log lines go to standard error, beside the command's output."""
    import asyncio

    from service.backends import open_store_and_keys
    from service.ops import logging

    logging.configure("console", "warning", sys.stderr)

    async def run() -> JSON:
        async with open_store_and_keys(settings) as (store, keyring):
            return await action(store, keyring, fields)

    try:
        document = asyncio.run(run())
    except ApiError as error:
        raise CommandFailed(f"{error.code}: {error.message}") from None
    path = settings.sqlite_path
    return document, f"{path}, which no process serves" if path else "the store on PostgreSQL"


def acting(store: "BatchingStore") -> Callable[[str, str, JSON | None], "Write"]:
    """Writes each act with an entry of the audit, without a key."""
    from service.db.clock import wall_clock
    from service.resources import new_id
    from service.tasks.audit import ActEntry, acted

    def write(action: str, target: str, detail: JSON | None) -> "Write":
        async def act(operation: Any, item: Any) -> Any:
            id = new_id("act", wall_clock())
            entry = ActEntry(id, "admin", None, action, target, detail=detail)
            return await acted(store, entry, operation, item)

        return act

    return write


async def create(store: "BatchingStore", keyring: "Keyring", fields: JSON) -> JSON:
    from service.db.clock import wall_clock
    from service.web.bodies import validated
    from service.web.key_schemas import NewKey
    from service.web.routes.key_routes import create_key

    return await create_key(store, keyring, wall_clock(), validated(NewKey, fields), acting(store))


async def listed(store: "BatchingStore", _: "Keyring", __: JSON) -> JSON:
    from service.tasks.owner_keys import key_list
    from service.web.routes.key_routes import shown

    return {"data": [shown(row) for row in await store.read(key_list)]}


async def revoke(store: "BatchingStore", _: "Keyring", fields: JSON) -> JSON:
    from service.tasks.owner_keys import revoke_keys

    if not await acting(store)("key.revoke", fields["id"], None)(revoke_keys, fields["id"]):
        raise CommandFailed("key_not_found: no key has that id")
    return {}


async def rotate_secret(store: "BatchingStore", keyring: "Keyring", fields: JSON) -> JSON:
    from service.db.clock import wall_clock
    from service.web.bodies import validated
    from service.web.key_schemas import SecretRotation
    from service.web.routes.key_routes import rotate_callback_secret

    body = validated(SecretRotation, fields)
    owner = body.owner or "admin"
    now = wall_clock()
    return await rotate_callback_secret(store, keyring, now, owner, body.overlap_s, acting(store))
