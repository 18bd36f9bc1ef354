"""Administration of keys without the API: in the store itself when no process serves it."""

import sys
from collections.abc import Callable, Coroutine
from contextlib import closing
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from service.cli.api_client import ApiClient, CommandFailed, ServiceUnreachable
from service.cli.output import remark
from service.errors import ApiError
from service.strict_json import JSON

if TYPE_CHECKING:
    from service.db.batching import BatchingStore
    from service.db.sqlite import FileLock
    from service.settings import Settings
    from service.signing import Keyring

Action = Callable[["BatchingStore", "Keyring", JSON], Coroutine[Any, Any, JSON]]


def administer(request: Callable[[ApiClient], JSON], action: Action, asked: JSON) -> JSON:
    """Sends `request` if a service is named and answers. Otherwise runs `action` in the store.

    An embedded store is opened only while no process holds its lock. An address of another machine
    is never replaced by the store of this one.
    """
    from service.settings import load_settings

    settings = load_settings()
    directly = partial(in_store, settings, action, asked)
    with closing(ApiClient(settings, admin=True)) as client:
        if settings.sqlite_path is None:
            return request(client) if settings.api_key else directly()
        if "url" in settings.model_fields_set:
            try:
                return request(client)
            except ServiceUnreachable:
                if not is_local(settings.url):
                    raise
        return directly() if is_unserved(settings) else request(client)


def is_local(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def store_lock(path: Path) -> "FileLock":
    """The lock that the process holds that serves the store."""
    from service.db.sqlite import FileLock

    return FileLock(path.with_name(path.name + ".lock"))


def is_unserved(settings: "Settings") -> bool:
    """Whether no process holds the lock of the embedded store at this moment."""
    assert settings.sqlite_path is not None
    lock = store_lock(settings.sqlite_path)
    if lock.acquire():
        lock.release()
        return True
    return False


def in_store(settings: "Settings", action: Action, asked: JSON) -> JSON:
    """Runs an action in the store. Log lines go to standard error, beside the command's output."""
    import asyncio

    from service.backends import open_store_and_keys
    from service.ops import logging

    logging.configure("console", "warning", sys.stderr)

    async def run() -> JSON:
        async with open_store_and_keys(settings) as (store, keyring):
            return await action(store, keyring, asked)

    place = settings.sqlite_path or "PostgreSQL"
    remark(f"nobody serves this store: {place}; it was opened directly")
    try:
        return asyncio.run(run())
    except ApiError as error:
        raise CommandFailed(f"{error.code}: {error.message}") from None


async def create(store: "BatchingStore", keyring: "Keyring", asked: JSON) -> JSON:
    from service.db.clock import wall_clock
    from service.web.bodies import validated
    from service.web.key_schemas import NewKey
    from service.web.routes.key_routes import create_key

    body = validated(NewKey, asked)
    return await create_key(store, keyring, wall_clock(), body)


async def listed(store: "BatchingStore", _: "Keyring", __: JSON) -> JSON:
    from service.tasks.owner_keys import key_list
    from service.web.routes.key_routes import shown

    return {"data": [shown(row) for row in await store.read(key_list)]}


async def revoke(store: "BatchingStore", _: "Keyring", asked: JSON) -> JSON:
    from service.tasks.owner_keys import revoke_keys

    if not await store.write(revoke_keys, asked["id"]):
        raise CommandFailed("key_not_found: no key has that id")
    return {}


async def rotate_secret(store: "BatchingStore", keyring: "Keyring", asked: JSON) -> JSON:
    from service.db.clock import wall_clock
    from service.web.bodies import validated
    from service.web.routes.key_routes import rotate_callback_secret
    from service.web.schemas import SecretRotation

    body = validated(SecretRotation, asked)
    owner = body.owner or "admin"
    return await rotate_callback_secret(store, keyring, wall_clock(), owner, body.overlap_s)
