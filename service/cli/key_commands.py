"""`darkroom keys …`: through the API of the process that serves, or in the store itself when nobody
does.
"""

import sys
from collections.abc import Callable, Coroutine, Mapping
from contextlib import closing
from ipaddress import ip_address
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from service.cli.client import CommandFailed, NobodyAnswers, Service, segment
from service.cli.output import Json, put_fields, put_json, put_table, remark
from service.strict_json import JSON
from service.tasks import owner_keys

if TYPE_CHECKING:
    from service.db.store import Store
    from service.settings import Settings
    from service.signing import Keyring

Direct = Callable[["Store", "Keyring"], Coroutine[Any, Any, JSON]]
SCOPES = ("submit", "read", "subscribe", "admin")


def create(
    owner: Annotated[
        str, typer.Option(help="Whose key it is: tasks, endpoints and events belong to an owner.")
    ],
    scopes: Annotated[str, typer.Option(help="Comma-separated: submit, read, subscribe, admin.")],
    as_json: Json = False,
) -> None:
    """Make a key. It is shown now and never again; with the owner's first one, the secret that
    signs its tasks' callbacks.
    """
    wanted = list(dict.fromkeys(scope.strip() for scope in scopes.split(",") if scope.strip()))
    if not wanted or not set(wanted) <= set(SCOPES):
        raise typer.BadParameter(f"wants some of {', '.join(SCOPES)}", param_hint="--scopes")

    async def direct(store: "Store", keyring: "Keyring") -> JSON:
        from service.db.clock import wall_clock
        from service.errors import ApiError
        from service.web.bodies import validated
        from service.web.routes.key_routes import create_key
        from service.web.schemas import NewKey

        try:
            body = validated(NewKey, {"owner": owner, "scopes": wanted})
        except ApiError as error:
            raise CommandFailed(f"{error.code}: {error.message}") from None
        return await create_key(store, keyring, wall_clock(), body.owner, body.scopes)

    made = administer(
        lambda service: service.call("POST", "/v1/keys", body={"owner": owner, "scopes": wanted}),
        direct,
    )
    if as_json:
        put_json(made)
    else:
        put_fields(made)


def listed(as_json: Json = False) -> None:
    """List keys, by the beginning of each."""

    async def direct(store: "Store", _: "Keyring") -> JSON:
        from service.web.routes.key_routes import shown

        return {"data": [shown(row) for row in await store.read(owner_keys.key_list)]}

    page = administer(lambda service: service.call("GET", "/v1/keys"), direct)
    if as_json:
        put_json(page)
    else:
        rows = [{**key, "scopes": ",".join(key["scopes"])} for key in page["data"]]
        put_table(rows, "id", "hint", "owner", "scopes", "created_at", "revoked_at")


def revoke(id: Annotated[str, typer.Argument(metavar="ID")], as_json: Json = False) -> None:
    """End a key, within 5 seconds in every process."""

    async def direct(store: "Store", _: "Keyring") -> JSON:
        from service.tasks.owner_keys import revoke_keys

        if not await store.write(revoke_keys, id):
            raise CommandFailed("key_not_found: no key has that id")
        return {}

    administer(lambda service: service.call("DELETE", f"/v1/keys/{segment(id)}"), direct)
    done = {"id": id, "revoked": True}
    if as_json:
        put_json(done)
    else:
        put_fields(done)


def rotate_secret(
    owner: Annotated[str | None, typer.Option(help="Admin: whose; else the key's own.")] = None,
    overlap: Annotated[
        float, typer.Option(help="So long the old secret signs too.", min=0, metavar="SECONDS")
    ] = 86_400,
    as_json: Json = False,
) -> None:
    """Give an owner another callback secret. It is shown now and never again."""
    body: JSON = {"overlap_s": overlap} | ({} if owner is None else {"owner": owner})

    async def direct(store: "Store", keyring: "Keyring") -> JSON:
        from service.db.clock import wall_clock
        from service.errors import ApiError
        from service.web.bodies import validated
        from service.web.routes.key_routes import rotate_callback_secret
        from service.web.schemas import SecretRotation

        try:
            asked = validated(SecretRotation, body)
            return await rotate_callback_secret(
                store, keyring, wall_clock(), asked.owner or "admin", asked.overlap_s
            )
        except ApiError as error:
            raise CommandFailed(f"{error.code}: {error.message}") from None

    made = administer(
        lambda service: service.call("POST", "/v1/keys/rotate-secret", body=body), direct
    )
    if as_json:
        put_json(made)
    else:
        put_fields(made)


KEYS: Mapping[str, Callable[..., None]] = {
    "create": create,
    "list": listed,
    "revoke": revoke,
    "rotate-secret": rotate_secret,
}


# --- which way
# --------------------------------------------------------------------------------------------------


def administer(through_api: Callable[[Service], JSON], direct: Direct) -> JSON:
    """Goes through the API where a service is named and answers; else, on this machine, to a store
    that nobody has.
    """
    from service.settings import load_settings

    settings = load_settings()
    with closing(Service(settings, admin=True)) as service:
        if settings.sqlite_path is None:
            return through_api(service) if settings.api_key else in_store(settings, direct)
        if "url" in settings.model_fields_set:
            try:
                return through_api(service)
            except NobodyAnswers:
                if not local(settings.url):
                    raise
        return in_store(settings, direct) if free(settings) else through_api(service)


def local(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def free(settings: "Settings") -> bool:
    """Whether nobody has the embedded store at this moment."""
    from service.db.sqlite import FileLock

    path = settings.sqlite_path
    assert path is not None
    lock = FileLock(path.with_name(path.name + ".lock"))
    if lock.acquire():
        lock.release()
        return True
    return False


def in_store(settings: "Settings", direct: Direct) -> JSON:
    """Does it in the store itself; the log goes to standard error, as standard output is the
    command's.
    """
    import asyncio

    from service.app import new_keyring, open_store
    from service.ops import logging
    from service.settings import secret_keys
    from service.signing import Keyring

    logging.configure("console", "warning", sys.stderr)

    async def act() -> JSON:
        keyring = None if settings.key_is_missing else Keyring(secret_keys(settings))
        async with open_store(settings) as store:
            return await direct(store, keyring or await new_keyring(settings, store))

    remark(
        f"nobody serves this store: {settings.sqlite_path or 'PostgreSQL'}; it was opened directly"
    )
    return asyncio.run(act())
