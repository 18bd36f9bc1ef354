"""The commands that need no service: `serve`, `worker`, `migrate`, `openapi` and `asyncapi`."""

import gc
import json
import sys
from collections.abc import Callable, Coroutine
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.output import Json, Text, option, put_result
from service.cli.sandbox_commands import Faults, Shares, serve_on_sandbox
from service.errors import ConfigurationError

if TYPE_CHECKING:
    import asyncio
    import socket
    from ssl import SSLContext

    from service.app import Role
    from service.settings import Settings

SWITCH_S = 0.0005
Host = Annotated[Text, option("Address to listen on (DARKROOM_HOST).")]
Port = Annotated[
    int | None,
    option("Port to listen on. 0 takes any free port (DARKROOM_PORT).", min=0, max=65535),
]


def serve(
    no_worker: Annotated[
        bool, option("Without workers: they run elsewhere (PostgreSQL).", "--no-worker")
    ] = False,
    sandbox: Annotated[
        bool, option("On a sandbox upstream of its own, with a store apart.", "--sandbox")
    ] = False,
    fault: Faults = None,
    share: Shares = None,
    host: Host = None,
    port: Port = None,
    as_json: Json = False,
) -> None:
    """Run web and workers in one process, until SIGTERM."""
    if sandbox and no_worker:
        raise typer.BadParameter("goes without --no-worker", param_hint="--sandbox")
    if (fault or share) and not sandbox:
        raise typer.BadParameter("goes only with --sandbox", param_hint="--fault, --share")
    import_quickly("service.app")
    from service.app import Role

    if sandbox:
        serve_on_sandbox(given(host, port, as_json), as_json, fault, share)
    else:
        start(Role(workers=not no_worker), given(host, port, as_json))


def worker(host: Host = None, port: Port = None, as_json: Json = False) -> None:
    """Run workers for `serve --no-worker` processes (PostgreSQL). Serves /healthz, /readyz and
    /metrics.
    """
    import_quickly("service.app")
    from service.app import Role
    from service.settings import load_settings

    # Links and events name the web processes, not the address of the options.
    start(Role(web=False), {"base_url": load_settings().base_url} | given(host, port, as_json))


def import_quickly(module: str) -> None:
    """Imports a module with all that it needs, in half of the time.

    structlog and httpx would import rich and pygments to print with, and uvicorn watchfiles to
    reload with, which a service never does. aiohttp would read the system's certificates twice for
    its own TLS contexts, and the service uses its own ones. Without certificates, aiohttp's trust
    no server. Collections of garbage would look through the modules again and again, and find none.
    """
    from ssl import SSLContext

    hidden = {"rich", "pygments", "watchfiles"} - sys.modules.keys()
    gc.disable()
    SSLContext.set_default_verify_paths = trust_none  # type: ignore[method-assign]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: it is not there
    try:
        import_module(module)
    finally:
        del SSLContext.set_default_verify_paths
        for name in hidden:
            del sys.modules[name]
        gc.freeze()
        gc.enable()


def trust_none(self: "SSLContext") -> None:
    """Takes the place of `set_default_verify_paths`."""


def given(host: str | None, port: int | None, as_json: bool) -> dict[str, Any]:
    """The options as settings. They win over the environment."""
    options = {"host": host, "port": port, "log_format": "json" if as_json else None}
    return {name: value for name, value in options.items() if value is not None}


def start(role: "Role", given: dict[str, Any]) -> None:
    from service.app import serve
    from service.settings import load_settings

    settings = load_settings(**given)
    if settings.sqlite_path and not (role.web and role.workers):
        raise ConfigurationError(
            "web and workers are split on PostgreSQL alone (DARKROOM_DATABASE_URL); on SQLite"
            " `darkroom serve` does both"
        )
    settings, bound = bound_settings(settings, given)
    run(settings, lambda stop: serve(settings, role, bound, stop))


def bound_settings(settings: "Settings", given: dict[str, Any]) -> "tuple[Settings, socket.socket]":
    """The socket, by preference the parent process's, and the settings with its address."""
    import os
    import socket

    from service.settings import load_settings
    from service.web.activation import inherited
    from service.web.server import bind

    if bound := inherited(os.environ):
        address = () if bound.family == socket.AF_UNIX else bound.getsockname()
        real = dict(zip(("host", "port"), address, strict=False))
    else:
        bound = bind(settings.host, settings.port)
        real = {"port": bound.getsockname()[1]}
    return load_settings(**given | real), bound


def run(settings: "Settings", work: "Callable[[asyncio.Event], Coroutine[Any, Any, None]]") -> None:
    """Runs `work` on uvloop. SIGTERM and SIGINT set the event that it is given."""
    import uvloop

    from service import VERSION
    from service.ops import logging, tracing
    from service.web.server import stopping

    logging.configure(settings.log_format, settings.log_level)
    # A callback waits for the interpreter several times, each time for at most so long behind the
    # threads that read the store.
    sys.setswitchinterval(SWITCH_S)

    async def until_stopped() -> None:
        with stopping() as stop:
            await work(stop)

    with tracing.tracing(VERSION):
        uvloop.run(until_stopped())


def migrate(as_json: Json = False) -> None:
    """Migrate the store's schema to this version. A start does the same unless DARKROOM_MIGRATE is
    off.
    """
    import asyncio

    from service.backends import open_store
    from service.db.schema import revision
    from service.ops import logging
    from service.settings import load_settings

    settings = load_settings(migrate="on")
    logging.configure("console", "warning", sys.stderr)

    async def migrated() -> str | None:
        async with open_store(settings) as store:
            return await store.read(revision)

    schema = asyncio.run(migrated())
    name = settings.sqlite_path or "the store on PostgreSQL"
    put_result({"schema": schema}, as_json, f"{name} has the schema {schema}")


def openapi(as_json: Json = False) -> None:
    """Print the OpenAPI document. With --json it is one line."""
    from service.web.openapi import document
    from service.web.routes.table import SPECS

    api = document(SPECS)
    put_result(api, as_json, json.dumps(api, indent=2))


def asyncapi(as_json: Json = False) -> None:
    """Print the AsyncAPI document of the events. With --json it is one line."""
    from service.web.asyncapi import document

    api = document()
    put_result(api, as_json, json.dumps(api, indent=2))
