"""`darkroom sandbox`, and `darkroom serve --sandbox` on a sandbox upstream of its own."""

import json
import shlex
import sys
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from service.cli.api_client import pairs
from service.cli.direct_keys import acting
from service.cli.output import Json, Text, Texts, option, put_result
from service.cli.place import http_address, reached_at
from service.cli.sandbox_settings import KEY, LOOPBACK, LOOPBACKS, needed_settings, sandbox_words
from service.credits import millionths

if TYPE_CHECKING:
    import asyncio
    from ipaddress import IPv4Network, IPv6Network

    from service.settings import Settings
    from service.upstreams.sandbox import SandboxOptions
    from service.web.context import Context

BODY = '{"model": "wan2.5-text-to-image", "prompt": "a lighthouse in the fog"}'


Shares = Annotated[
    Texts,
    option("Share of the tasks that a fault meets, 0 to 1; may be repeated.", metavar="NAME=SHARE"),
]
FetchInputs = Annotated[
    bool,
    option(
        "Fetch the images of image_urls, and refuse those that are not there.",
        "--fetch-inputs/--no-fetch-inputs",
    ),
]
Price = Annotated[
    Text, option("Credits per image. Default: the catalogue's, else 1.5.", metavar="CREDITS")
]


Faults = Annotated[
    Texts, option("A default fault of every task; may be repeated.", metavar="NAME=VALUE")
]


class SandboxCommand(TyperCommand):
    """`darkroom sandbox`. Its help ends with the table of faults."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        from service.upstreams.sandbox import FAULTS

        title = "Faults, by --fault NAME=VALUE or by an object `sandbox` in a submission"
        rows = [(name, f"{fault.about}: {fault.takes.words}") for name, fault in FAULTS.items()]
        with formatter.section(title):
            formatter.write_dl(rows)


def sandbox(
    host: Annotated[str, option("Address to listen on.")] = LOOPBACK,
    port: Annotated[
        int, option("Port to listen on. 0 takes any free port.", min=0, max=65535)
    ] = 8090,
    api_key: Annotated[Text, option("The only key it accepts. Default: any key.")] = None,
    allow_networks: Annotated[
        Texts, option("Callbacks may also go there, with http; may be repeated.", metavar="CIDR")
    ] = None,
    delay: Annotated[float, option("Seconds a task takes.", min=0)] = 1.0,
    seed: Annotated[
        int | None, option("The same seed gives the same ids, faults and files.")
    ] = None,
    fault: Faults = None,
    share: Shares = None,
    base_url: Annotated[Text, option("Address in result links. Default: as requested.")] = None,
    price: Price = None,
    task_ttl: Annotated[float, option("Seconds a task is kept.", min=0)] = 86400,
    fetch_inputs: FetchInputs = True,
    result_ttl: Annotated[float, option("Seconds result links live.", min=0)] = 86400,
    catalogue: Annotated[
        Path | None, option("A file that extends the catalogue of models.", dir_okay=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Run the emulator of the upstream, until SIGTERM."""
    from service.upstreams.catalogue import load_catalogue
    from service.upstreams.sandbox import SandboxOptions

    options = SandboxOptions(
        catalogue=load_catalogue(catalogue),
        base_url=base_url,
        api_key=api_key,
        networks=networks(allow_networks or []),
        delay_s=delay,
        task_ttl_s=task_ttl,
        result_ttl_s=result_ttl,
        fetch_inputs=fetch_inputs,
        price=price_of(price),
        seed=seed,
        faults=default_faults(fault),
        shares=shares(share),
    )
    serve_sandbox(options, host, port, as_json)


def serve_sandbox(options: "SandboxOptions", host: str, port: int, as_json: bool) -> None:
    import uvloop

    from service.ops import logging
    from service.web.server import Server, bind, listening, stopping

    app = checked_sandbox(options)
    bound = bind(host, port, "--host, --port")
    logging.configure("json" if as_json else "console", "warning", sys.stderr)
    address = http_address(host, bound.getsockname()[1])
    reached = reached_at(host, bound.getsockname()[1])

    async def until_stopped() -> None:
        with stopping() as stop:
            async with listening(Server(app, bound, stop_s=1), stop):
                settings = needed_settings(options, reached)
                fields = {"address": address, "settings": settings}
                put_result(fields, as_json, *sandbox_words(address, settings))
                await stop.wait()

    uvloop.run(until_stopped())


def checked_sandbox(options: "SandboxOptions") -> Any:
    from service.upstreams.sandbox import create_sandbox

    try:
        return create_sandbox(options)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--fault, --share") from None


def default_faults(texts: list[str] | None) -> dict[str, Any]:
    """NAME=VALUE texts as faults. A value is JSON, or the text itself."""
    return {name: json_or_text(value) for name, value in pairs(texts, "--fault").items()}


def json_or_text(value: str) -> Any:
    try:
        parsed = json.loads(value)
        json.dumps(parsed, allow_nan=False)
    except ValueError:
        return value
    return parsed


def shares(texts: list[str] | None) -> dict[str, float]:
    try:
        return {name: float(value) for name, value in pairs(texts, "--share").items()}
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--share") from None


def price_of(text: str | None) -> Decimal | None:
    if text is None:
        return None
    if (credits := millionths(text)) is None:
        raise typer.BadParameter(f"{text!r} is no number of credits", param_hint="--price")
    return Decimal(credits) / 1_000_000


def networks(texts: list[str]) -> "tuple[IPv4Network | IPv6Network, ...]":
    from ipaddress import ip_network

    try:
        return tuple(ip_network(part.strip()) for text in texts for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--allow-networks") from None


def dev_settings(settings: "Settings", upstream: str, options: dict[str, Any]) -> "Settings":
    """The settings of `serve --sandbox`, with a store apart from that of real tasks."""
    from service.settings import load_settings

    people = sys.stdout.isatty() and "log_format" not in settings.model_fields_set
    loopbacks = LOOPBACKS if settings.host == "localhost" else f"{LOOPBACKS},{settings.host}"
    own = {
        "port": settings.port,
        "data_dir": settings.data_dir / "sandbox",
        "database_url": "sqlite:///{data_dir}/darkroom.db",
        "blob_url": "file://{data_dir}/images",
        "image_base_url": None,
        "evolink_base_url": upstream,
        "evolink_api_key": KEY,
        "evolink_result_hosts": LOOPBACK,
        "upstream_networks": loopbacks,
        "endpoint_networks": loopbacks,
        "task_callback_networks": loopbacks,
        "callback_url": reached_at(settings.host, settings.port),
        "log_format": "console" if people else settings.log_format,
    }
    return load_settings(**options | own)


def serve_on_sandbox(
    given: dict[str, Any], as_json: bool, fault: list[str] | None, share: list[str] | None
) -> None:
    from service.app import Role, serve
    from service.cli.serve import bound_settings, run
    from service.settings import load_settings
    from service.upstreams.catalogue import load_catalogue
    from service.upstreams.sandbox import SandboxOptions
    from service.web.auth import SCOPES
    from service.web.key_schemas import NewKey
    from service.web.routes.key_routes import create_key
    from service.web.server import Server, bind, listening

    settings, bound = bound_settings(load_settings(**given), given)
    upstream = bind(LOOPBACK, 0)
    address = http_address(LOOPBACK, upstream.getsockname()[1])
    settings = dev_settings(settings, address, given)
    catalogue = load_catalogue(settings.catalogue)
    app = checked_sandbox(
        SandboxOptions(
            api_key=KEY,
            catalogue=catalogue,
            networks=settings.upstream_networks,
            faults=default_faults(fault),
            shares=shares(share),
        )
    )

    async def ready(context: "Context") -> None:
        resources = context.resources
        store, keyring, now = resources.store, resources.keyring, resources.clock()
        key = NewKey.model_validate({"owner": "dev", "scopes": list(SCOPES)})
        created = await create_key(store, keyring, now, key, acting(store))
        announce(settings, address, created["key"], as_json)

    async def work(stop: "asyncio.Event") -> None:
        async with listening(Server(app, upstream, stop_s=1), stop):
            await serve(settings, Role(), bound, stop, ready=ready)

    run(settings, work)


def announce(settings: "Settings", upstream: str, key: str, as_json: bool) -> None:
    """Prints the address, a key and a request that works."""
    address = reached_at(settings.host, settings.port)
    curl = (
        f"curl -sS {address}/v1/images/generations -H 'Authorization: Bearer {key}'"
        f" -H 'Content-Type: application/json' -H 'Prefer: wait=30' -d '{BODY}'"
    )
    # Each command names the service itself, so that it works in any folder and sets nothing for
    # later commands of the same terminal.
    program = f"DARKROOM_URL={address} DARKROOM_API_KEY={key} {program_path()}"
    receiver = f"{upstream}/sandbox/webhooks"
    console = f"{address}/console/" if settings.console == "on" else None
    put_result(
        {
            "address": address,
            "upstream": upstream,
            "key": key,
            "curl": curl,
            "console": console,
            "receiver": receiver,
        },
        as_json,
        f"\ndarkroom  {address}  (sandbox upstream {upstream}, files in {settings.data_dir})",
        f"key       {key}",
        *([f"console   {console}"] if console else []),
        f"receiver  {receiver} takes webhooks, with ?status=410 it refuses them",
        f"try       {curl}",
        f"or        {program} submit 'a lighthouse in the fog' --wait",
        f"then      {program} tasks\n",
    )


def program_path() -> str:
    """This program as a shell finds it from any folder."""
    path = Path(sys.argv[0]).resolve()
    if path.suffix == ".py":
        return f"{shlex.quote(sys.executable)} -m service"
    return shlex.quote(str(path))
