"""`darkroom serve --sandbox`: a service on a sandbox upstream of its own, in one process, to try
requests on.
"""

import asyncio
from typing import Any

from service.app import Role, serve
from service.cli.output import put, put_json, terminal
from service.cli.serve import LOOPBACK, LOOPBACKS, bound_settings, run
from service.settings import Settings, load_settings
from service.upstreams.sandbox import SandboxOptions, create_sandbox
from service.web.auth import SCOPES
from service.web.context import Context
from service.web.routes.key_routes import create_key
from service.web.server import Server, bind, listening

KEY = "sk-sandbox"
BODY = '{"model": "wan2.5-text-to-image", "prompt": "a lighthouse in the fog"}'


def reached(settings: Settings) -> str:
    """The service's address for this machine."""
    # asked for, not chosen
    host = LOOPBACK if settings.host in ("0.0.0.0", "::", "localhost") else settings.host  # noqa: S104
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.port}"


def dev_settings(settings: Settings, upstream: str, given: dict[str, Any]) -> Settings:
    """The settings over which the sandbox's go. Its store is a place of its own: no real task may
    ever meet a sandbox.
    """
    people = terminal() and "log_format" not in settings.model_fields_set
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
        "callback_url": reached(settings),
        "log_format": "console" if people else settings.log_format,
    }
    return load_settings(**given | own)


def serve_on_sandbox(given: dict[str, Any], as_json: bool) -> None:
    settings, bound = bound_settings(load_settings(**given), given)
    upstream = bind(LOOPBACK, 0)
    address = f"http://{LOOPBACK}:{upstream.getsockname()[1]}"
    settings = dev_settings(settings, address, given)
    options = SandboxOptions(api_key=KEY, networks=settings.upstream_networks)

    async def ready(context: Context) -> None:
        resources = context.resources
        made = await create_key(
            resources.store, resources.keyring, resources.clock(), "dev", SCOPES
        )
        tell(settings, address, made["key"], as_json)

    async def work(stop: asyncio.Event) -> None:
        async with listening(Server(create_sandbox(options), upstream, stop_s=1), stop):
            await serve(settings, Role(), bound, stop, ready=ready)

    run(settings, work)


def tell(settings: Settings, upstream: str, key: str, as_json: bool) -> None:
    """The address, a key, and a line that works."""
    address = reached(settings)
    curl = (
        f"curl -sS {address}/v1/images/generations -H 'Authorization: Bearer {key}'"
        f" -H 'Content-Type: application/json' -H 'Prefer: wait=30' -d '{BODY}'"
    )
    if as_json:
        put_json({"address": address, "upstream": upstream, "key": key, "curl": curl})
        return
    put(f"\ndarkroom  {address}  (sandbox upstream {upstream}, files in {settings.data_dir})")
    put(f"key       {key}")
    put(f"try       {curl}")
    put(
        f"or        export DARKROOM_URL={address} DARKROOM_API_KEY={key}; darkroom submit 'a"
        " lighthouse in the fog' --wait\n"
    )
