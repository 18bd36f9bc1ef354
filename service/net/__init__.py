"""Every request that leaves: one guarded client a purpose, over httpx's aiohttp transport.

A URL is judged by its text (scheme, host list, port, literal address), its name by every address it
has now, each redirect like a first request. The transport's resolver is the judge itself, so a
connection goes to an address that was judged and no second look-up exists. The transports are
driven without `httpx.AsyncClient`: no cookies are kept, no redirect is prepared, and no proxy or
netrc of the environment is read (a proxy would resolve names itself, behind the guard's back).
"""

from service.net.addresses import forbidden
from service.net.client import Egress, Response, Rules, Streamed
from service.net.command import service_call, service_client
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
    "service_call",
    "service_client",
]
