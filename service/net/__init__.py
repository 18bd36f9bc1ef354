"""All outgoing HTTP requests: one guarded client per purpose, over httpx's aiohttp transport.

The client checks the text of a URL (scheme, host list, port, literal address), then every address
that its host name has. It checks each redirect like a first request. The transport's resolver is
the guard itself. A connection therefore goes to a checked address, without a second look-up. The
transports run without `httpx.AsyncClient`. It would keep cookies, prepare redirects and read a
proxy or netrc from the environment, and a proxy resolves names itself, behind the guard's back.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from service.net.addresses import forbidden
    from service.net.egress_client import Egress, Rules
    from service.net.responses import Response, Streamed
    from service.net.service_client import usual_trust
    from service.net.transport import Resolve
    from service.net.urls import Target, parse_url

__all__ = [
    "Egress",
    "Resolve",
    "Response",
    "Rules",
    "Streamed",
    "Target",
    "forbidden",
    "parse_url",
    "usual_trust",
]
MODULES = {
    "Egress": "egress_client",
    "Resolve": "transport",
    "Response": "responses",
    "Rules": "egress_client",
    "Streamed": "responses",
    "Target": "urls",
    "forbidden": "addresses",
    "parse_url": "urls",
    "usual_trust": "service_client",
}


def __getattr__(name: str) -> Any:
    """Imports a name's module at its first use: client commands need no aiohttp."""
    if name not in MODULES:
        raise AttributeError(name)
    return getattr(import_module(f"service.net.{MODULES[name]}"), name)
