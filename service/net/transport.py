"""aiohttp as it is used here: with the judge as its resolver, URLs as they were written, and a word
on whether there was a connection.
"""

import asyncio
import errno
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache

import aiohttp
import httpx
import yarl
from aiohttp.abc import AbstractResolver, ResolveResult
from httpx_aiohttp import AiohttpTransport

from service import VERSION
from service.errors import CallTimedOut, ConnectionLost, EgressError, NoRoute, NotConnected
from service.net.addresses import Address

Resolve = Callable[[str], Awaitable[Sequence[str]]]  # a host's addresses; OSError when it has none

Content = (
    bytes | AsyncIterator[bytes]
)  # in pieces it is sent as they come; its content-length is the caller's to say
USER_AGENT = f"Darkroom/{VERSION}"
# seconds for TCP and TLS to one address; a black hole must not eat a long call's whole time
CONNECT = 10.0
PIECE = 1 << 18  # bytes
LOOKUPS = 64  # at once for a purpose
OURS = {
    *(socket.EAI_AGAIN, socket.EAI_MEMORY, socket.EAI_SYSTEM),  # no name server answered
    *(
        errno.ENETUNREACH,
        errno.ENETDOWN,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOBUFS,
        errno.ENOMEM,
        errno.EADDRNOTAVAIL,
    ),
}
# Shorter than servers keep an idle connection (5 s: Node, uvicorn, Apache; 2 s: gunicorn): a
# request that meets the server's close on its way is lost, and a lost submission may have been
# paid.
KEEP_ALIVE_S = 1.5


@cache
def lookups(purpose: str) -> ThreadPoolExecutor:
    """Threads for `getaddrinfo` alone, a pool a purpose: a subscriber's name server that never
    answers holds up no call upstream.
    """
    return ThreadPoolExecutor(LOOKUPS, thread_name_prefix=f"lookup-{purpose}")


async def system(purpose: str, host: str) -> Sequence[str]:
    """The addresses the operating system knows for a host."""
    threads = lookups(purpose)
    found = await asyncio.get_running_loop().run_in_executor(
        threads, lambda: socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    )
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))


@dataclass(slots=True)
class Call:
    """What the transport must know of the request it carries, and tell of it."""

    url: str = ""
    host: str = ""
    connected: bool = False


CALL: ContextVar[Call] = ContextVar("call")  # httpx passes nothing through to aiohttp's hooks


async def exact(
    request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    """Send the URL as it was written: aiohttp would decode `%2F` and `%7E` in it, which breaks
    links signed over their text.
    """
    request.url = yarl.URL(CALL.get().url, encoded=True)
    return await handler(request)


async def connected(*_: object) -> None:
    """aiohttp has a connection for the request, new (TLS done) or used before: from here on it may
    have been sent.
    """
    CALL.get().connected = True


async def pieces(content: bytes) -> AsyncIterator[bytes]:
    """A large body in parts: aiohttp writes one piece of bytes at a stroke, which holds up
    everybody else.
    """
    for start in range(0, len(content), PIECE):
        yield content[start : start + PIECE]


@contextmanager
def translated(call: Call) -> Iterator[None]:
    """Lower errors as ours. What counts is whether there was a connection: the class of
    httpx-aiohttp's errors does not tell.
    """
    try:
        yield
    except EgressError:
        raise
    except (OSError, httpx.HTTPError, aiohttp.ClientError) as error:
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        late = isinstance(
            root, TimeoutError | asyncio.CancelledError
        )  # asyncio's own limit is a cancellation at its root
        reason = (
            "no answer in time" if late else getattr(root, "strerror", None) or type(root).__name__
        )  # their texts may show the URL
        kind = (
            not_connected(root) if not call.connected else CallTimedOut if late else ConnectionLost
        )
        raise kind(f"{call.host}: {reason}") from error


def not_connected(error: BaseException) -> type[NotConnected]:
    """Whose fault it is that there was no connection."""
    return NoRoute if isinstance(error, OSError) and error.errno in OURS else NotConnected


class Judge(AbstractResolver):
    """The transport's resolver: it gives out no address that was not judged."""

    def __init__(self, addresses: Callable[[str], Awaitable[Sequence[Address]]]) -> None:
        self._addresses = addresses

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        families = {4: socket.AF_INET, 6: socket.AF_INET6}
        found = await self._addresses(host)
        return [
            ResolveResult(
                hostname=host,
                host=str(a),
                port=port,
                family=families[a.version],
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for a in found
        ]

    async def close(self) -> None:
        """Nothing is held."""


def open_transport(
    judge: Judge, tls: ssl.SSLContext, connections: int, keep_alive: float
) -> AiohttpTransport:
    """A pool of its own: what is connected to for one purpose, or one scheme, serves no other."""
    trace = aiohttp.TraceConfig()
    trace.on_connection_create_end.append(connected)
    trace.on_connection_reuseconn.append(connected)
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            resolver=judge,
            use_dns_cache=False,
            limit=connections,
            keepalive_timeout=keep_alive,
            ssl=tls,
        ),
        cookie_jar=aiohttp.DummyCookieJar(),
        middlewares=(exact,),
        trace_configs=[trace],
    )
    return AiohttpTransport(verify=tls, client=session)


async def send(
    transport: AiohttpTransport,
    call: Call,
    method: str,
    headers: Mapping[str, str],
    content: Content | None,
) -> httpx.Response:
    """One request, no redirect followed; the answer's body is unread and the caller closes it."""
    sent = {"user-agent": USER_AGENT, "accept": "*/*"} | {
        name.lower(): value for name, value in headers.items()
    }
    sent["accept-encoding"] = "identity"  # nothing is decoded here, so nothing can swell
    body = content
    if isinstance(content, bytes) and len(content) > PIECE:
        body, sent["content-length"] = pieces(content), str(len(content))
    request = httpx.Request(
        method, call.url, headers=sent, content=body, extensions={"timeout": {"connect": CONNECT}}
    )
    token = CALL.set(call)
    try:
        return await transport.handle_async_request(request)
    finally:
        CALL.reset(token)
