"""The commands that serve, and those that need no service: `serve`, `worker`, `sandbox`, `migrate`,
`openapi`, `asyncapi`.
"""

import json
import sys
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from service.cli.client import pairs
from service.cli.output import Json, put, put_json
from service.errors import ConfigurationError
from service.strict_json import JSON

if TYPE_CHECKING:
    import asyncio
    import socket
    from ipaddress import IPv4Network, IPv6Network

    from sqlalchemy import Connection

    from service.app import Role
    from service.settings import Settings
    from service.upstreams.sandbox import SandboxOptions

Host = Annotated[str | None, typer.Option(help="Address to listen on (DARKROOM_HOST).")]
Port = Annotated[
    int | None,
    typer.Option(help="Port to listen on; 0: any free one (DARKROOM_PORT).", min=0, max=65535),
]
LOOPBACK = "127.0.0.1"
LOOPBACKS = "127.0.0.0/8,::1/128"


def serve(
    no_worker: Annotated[
        bool,
        typer.Option(
            "--no-worker", help="Only the web: `darkroom worker` does the work (PostgreSQL)."
        ),
    ] = False,
    sandbox: Annotated[
        bool,
        typer.Option(
            "--sandbox",
            help="On an upstream of its own, to try requests on; keeps what is real apart.",
        ),
    ] = False,
    host: Host = None,
    port: Port = None,
    as_json: Json = False,
) -> None:
    """Serve: web and workers in one process, until SIGTERM."""
    from service.app import Role

    if sandbox and no_worker:
        raise typer.BadParameter("goes without --no-worker", param_hint="--sandbox")
    if sandbox:
        from service.cli.dev import serve_on_sandbox

        serve_on_sandbox(given(host, port, as_json), as_json)
    else:
        start(Role(workers=not no_worker), given(host, port, as_json))


def worker(host: Host = None, port: Port = None, as_json: Json = False) -> None:
    """Do the work of `serve --no-worker` processes (PostgreSQL); listens too, for /healthz, /readyz
    and /metrics.
    """
    from service.app import Role

    start(Role(web=False), given(host, port, as_json))


def given(host: str | None, port: int | None, as_json: bool) -> dict[str, Any]:
    """The options as settings that go over the environment's."""
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
    """The settings with the address that is really listened on, and its socket: the one that was
    handed over, else one of its own.
    """
    import os
    import socket

    from service.settings import load_settings
    from service.web.activation import inherited
    from service.web.server import bind

    if bound := inherited(os.environ):
        real = (
            {}
            if bound.family == socket.AF_UNIX
            else dict(zip(("host", "port"), bound.getsockname(), strict=False))
        )
    else:
        bound = bind(settings.host, settings.port)
        real = {"port": bound.getsockname()[1]}
    return load_settings(**given | real), bound


def run(settings: "Settings", work: "Callable[[asyncio.Event], Coroutine[Any, Any, None]]") -> None:
    """Runs `work` on uvloop until SIGTERM or SIGINT; it is handed the event that they set."""
    import uvloop

    from service.ops import logging
    from service.web.server import stopping

    logging.configure(settings.log_format, settings.log_level)

    async def until_stopped() -> None:
        with stopping() as stop:
            await work(stop)

    uvloop.run(until_stopped())


class SandboxCommand(TyperCommand):
    """`darkroom sandbox`, whose help ends with the table of faults."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        from service.upstreams.sandbox import FAULTS

        with formatter.section(
            "Faults, by --fault NAME=VALUE or by an object `sandbox` in a submission"
        ):
            formatter.write_dl(
                [(name, f"{fault.about}: {fault.takes.words}") for name, fault in FAULTS.items()]
            )


def sandbox(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = LOOPBACK,
    port: Annotated[
        int, typer.Option(help="Port to listen on; 0: any free one.", min=0, max=65535)
    ] = 8090,
    api_key: Annotated[
        str | None, typer.Option(help="The only key it takes; without it any will do.")
    ] = None,
    allow_networks: Annotated[
        list[str] | None,
        typer.Option(
            help="Where callbacks may go besides public https addresses; may be repeated.",
            metavar="CIDR",
        ),
    ] = None,
    delay: Annotated[float, typer.Option(help="Seconds a task takes.", min=0)] = 1.0,
    seed: Annotated[
        int | None,
        typer.Option(help="For the same ids, faults and files in every run of the same requests."),
    ] = None,
    fault: Annotated[
        list[str] | None,
        typer.Option(
            help="A fault of every task unless it says otherwise; may be repeated.",
            metavar="NAME=VALUE",
        ),
    ] = None,
    share: Annotated[
        list[str] | None,
        typer.Option(
            help="What share of the tasks, 0 to 1, a fault by --fault strikes; may be repeated.",
            metavar="NAME=SHARE",
        ),
    ] = None,
    base_url: Annotated[
        str | None,
        typer.Option(help="The address in result links; without it the one that was asked."),
    ] = None,
    task_ttl: Annotated[
        float, typer.Option(help="Seconds until a task is forgotten.", min=0)
    ] = 86400,
    result_ttl: Annotated[
        float, typer.Option(help="Seconds until result links die.", min=0)
    ] = 86400,
    as_json: Json = False,
) -> None:
    """Run the upstream's emulator, until SIGTERM."""
    from service.upstreams.sandbox import SandboxOptions

    options = SandboxOptions(
        base_url=base_url,
        api_key=api_key,
        networks=networks(allow_networks or []),
        delay_s=delay,
        task_ttl_s=task_ttl,
        result_ttl_s=result_ttl,
        seed=seed,
        faults=default_faults(fault),
        shares=shares(share),
    )
    serve_sandbox(options, host, port, as_json)


def serve_sandbox(options: "SandboxOptions", host: str, port: int, as_json: bool) -> None:
    import uvloop

    from service.ops import logging
    from service.upstreams.sandbox import create_sandbox
    from service.web.server import Server, bind, listening, stopping

    try:
        app = create_sandbox(options)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--fault, --share") from None
    bound = bind(host, port)
    logging.configure("json" if as_json else "console", "warning", sys.stderr)
    address = f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}"

    async def until_stopped() -> None:
        with stopping() as stop:
            async with listening(Server(app, bound, stop_s=1), stop):
                if as_json:
                    put_json({"address": address})
                else:
                    put(f"sandbox upstream at {address}")
                await stop.wait()

    uvloop.run(until_stopped())


def default_faults(texts: list[str] | None) -> dict[str, Any]:
    """NAME=VALUE texts as faults: a value is JSON, or the text itself."""
    return {name: json_or_text(value) for name, value in pairs(texts, "--fault").items()}


def shares(texts: list[str] | None) -> dict[str, float]:
    try:
        return {name: float(value) for name, value in pairs(texts, "--share").items()}
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--share") from None


def networks(texts: list[str]) -> "tuple[IPv4Network | IPv6Network, ...]":
    from ipaddress import ip_network

    try:
        return tuple(ip_network(part.strip()) for text in texts for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--allow-networks") from None


def json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def migrate(as_json: Json = False) -> None:
    """Bring the store's schema to this program's version. A start does so by itself unless
    DARKROOM_MIGRATE is off.
    """
    import asyncio

    from alembic.migration import MigrationContext

    from service.app import open_store
    from service.ops import logging
    from service.settings import load_settings

    settings = load_settings(migrate="on")
    logging.configure("console", "warning", sys.stderr)

    def revision(connection: "Connection") -> str | None:
        return MigrationContext.configure(connection).get_current_revision()

    async def act() -> str | None:
        async with open_store(settings) as store:
            return await store.read(revision)

    schema = asyncio.run(act())
    if as_json:
        put_json({"schema": schema})
    else:
        put(f"the store's schema is {schema}")


def openapi(as_json: Json = False) -> None:
    """Print the OpenAPI document; with --json in one line."""
    from service.web.openapi import document
    from service.web.routes.table import SPECS

    put_document(document(SPECS), as_json)


def asyncapi(as_json: Json = False) -> None:
    """Print the AsyncAPI document, of events; with --json in one line."""
    from service.web.asyncapi import document

    put_document(document(), as_json)


def put_document(made: JSON, as_json: bool) -> None:
    if as_json:
        put_json(made)
    else:
        put(json.dumps(made, indent=2))
