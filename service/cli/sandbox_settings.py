"""What a service needs to work with a sandbox."""

import shlex
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service.upstreams.sandbox import SandboxOptions

LOOPBACK = "127.0.0.1"
LOOPBACKS = "127.0.0.0/8,::1/128"
KEY = "sk-sandbox"
SERVICE = "http://127.0.0.1:8080"  # where `serve` listens by default


def needed_settings(options: "SandboxOptions", address: str) -> dict[str, str]:
    """What `darkroom serve` on this machine needs to work with a sandbox at the address."""
    from ipaddress import ip_address
    from urllib.parse import urlsplit

    results = urlsplit(options.base_url or address).hostname or LOOPBACK
    networks = LOOPBACKS.split(",")
    for host in dict.fromkeys((urlsplit(address).hostname or LOOPBACK, results)):
        with suppress(ValueError):  # a name
            if not ip_address(host).is_loopback:
                networks.append(host)
    settings = {
        "DARKROOM_EVOLINK_BASE_URL": address,
        "DARKROOM_EVOLINK_API_KEY": options.api_key or KEY,
        "DARKROOM_EVOLINK_RESULT_HOSTS": results,
        "DARKROOM_UPSTREAM_NETWORKS": ",".join(networks),
        "DARKROOM_DATA_DIR": "./data/sandbox",  # no real task is ever queried at a sandbox
    }
    if any(ip_address(LOOPBACK) in network for network in options.networks):
        settings["DARKROOM_CALLBACK_URL"] = SERVICE
    return settings


def sandbox_words(address: str, settings: dict[str, str]) -> list[str]:
    lines = [f"sandbox upstream at {address}", "darkroom serve works with it under these settings:"]
    lines += [f"  export {name}={shlex.quote(value)}" for name, value in settings.items()]
    if "DARKROOM_CALLBACK_URL" not in settings:
        lines.append(
            "Its callbacks go to public https addresses alone. With --allow-networks 127.0.0.0/8"
            f" they also go to DARKROOM_CALLBACK_URL={SERVICE}; without, the service asks it."
        )
    return lines
