"""aiohttp sessions with the guard as their resolver, and with a record of each connection."""

import asyncio
import errno
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace

import aiohttp
import yarl
from aiohttp.abc import AbstractResolver, ResolveResult

from service import VERSION
from service.errors import CallTimedOut, ConnectionLost, EgressError, NoRoute, NotConnected
from service.net.addresses import Address

Resolve = Callable[[str], Awaitable[Sequence[str]]]  # a host's addresses, OSError without any
# An iterator's pieces are sent as they come. Its content-length header is the caller's duty.
Content = bytes | AsyncIterator[bytes]
USER_AGENT = f"Darkroom/{VERSION}"
# Seconds for TCP and TLS to one address. An address that drops packets must not use up the whole
# time of a long call.
CONNECT = 10.0
PIECE = 1 << 18  # bytes of a body that is sent
CHUNK = 1 << 14  # bytes of a body that is read
LOOKUPS = 64  # at once, per purpose
# Failures of this machine: no name server answered, no network, no free port or descriptor.
LOCAL_ERRORS = {
    *(socket.EAI_AGAIN, socket.EAI_MEMORY, socket.EAI_SYSTEM),
    *(errno.ENETUNREACH, errno.ENETDOWN, errno.EMFILE, errno.ENFILE),
    *(errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL),
}
# Shorter than servers keep an idle connection (Node, uvicorn and Apache 5 s, gunicorn 2 s). A
# request that crosses the server's close is lost, and a lost submission may have been paid.
KEEP_ALIVE_S = 1.5


@cache
def lookup_threads(purpose: str) -> ThreadPoolExecutor:
    """Threads for `getaddrinfo`, one pool per purpose. A subscriber's name server that never
    answers therefore delays no call to the upstream.
    """
    return ThreadPoolExecutor(LOOKUPS, thread_name_prefix=f"lookup-{purpose}")


async def system_resolve(purpose: str, host: str) -> Sequence[str]:
    """The operating system's addresses of a host."""
    entries = await asyncio.get_running_loop().run_in_executor(
        lookup_threads(purpose), lambda: socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    )
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in entries))


@dataclass(slots=True)
class CallState:
    """The state of a call. `connected`: aiohttp has a connection for it, either new (TLS done) or
    reused, so the request may have been sent.
    """

    url: str = ""
    host: str = ""
    connected: bool = False


async def mark_connected(_: object, trace: SimpleNamespace, __: object) -> None:
    trace.trace_request_ctx.connected = True


async def pieces(content: bytes) -> AsyncIterator[bytes]:
    """A large body in parts. aiohttp writes a single piece at once, which blocks the event loop."""
    for start in range(0, len(content), PIECE):
        yield content[start : start + PIECE]


@contextmanager
def translated(call: CallState) -> Iterator[None]:
    """Turns aiohttp's errors into EgressErrors.

    `call.connected` decides, because the class of an error does not say whether there was a
    connection. The library's messages may contain the URL and are dropped.
    """
    try:
        yield
    except EgressError:
        raise
    except (OSError, aiohttp.ClientError) as error:
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        # The root of asyncio's own timeout is a cancellation.
        late = isinstance(root, TimeoutError | asyncio.CancelledError)
        detail = getattr(root, "strerror", None) or type(root).__name__
        lost = CallTimedOut if late else ConnectionLost
        kind = lost if call.connected else not_connected(root)
        raise kind(f"{call.host}: {'no answer in time' if late else detail}") from error


def not_connected(error: BaseException) -> type[NotConnected]:
    """NoRoute when this machine is the cause."""
    local = isinstance(error, OSError) and error.errno in LOCAL_ERRORS
    return NoRoute if local else NotConnected


class GuardedResolver(AbstractResolver):
    """The transport's resolver. It returns checked addresses only."""

    def __init__(self, addresses: Callable[[str], Awaitable[Sequence[Address]]]) -> None:
        self._addresses = addresses

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        families = {4: socket.AF_INET, 6: socket.AF_INET6}
        return [
            ResolveResult(
                hostname=host,
                host=str(address),
                port=port,
                family=families[address.version],
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in await self._addresses(host)
        ]

    async def close(self) -> None:
        """The resolver holds no resources."""


def open_session(
    resolver: GuardedResolver, tls: ssl.SSLContext, connections: int, keep_alive: float
) -> aiohttp.ClientSession:
    """A session with its own pool, so that a connection for one purpose or scheme serves no other.
    Without decompression, no body can grow in memory.
    """
    trace = aiohttp.TraceConfig()
    trace.on_connection_create_end.append(mark_connected)
    trace.on_connection_reuseconn.append(mark_connected)
    connector = aiohttp.TCPConnector(
        resolver=resolver,
        use_dns_cache=False,
        limit=connections,
        keepalive_timeout=keep_alive,
        ssl=tls,
    )
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT),
        trace_configs=[trace],
    )


async def send(
    session: aiohttp.ClientSession,
    call: CallState,
    method: str,
    headers: Mapping[str, str],
    content: Content | None,
) -> aiohttp.ClientResponse:
    """One request, without redirects. The caller reads and closes the response's body.

    The URL is sent as written. aiohttp would decode `%2F` and `%7E` in it, which breaks links
    signed over their text.
    """
    sent = {"user-agent": USER_AGENT, "accept": "*/*"}
    sent |= {name.lower(): value for name, value in headers.items()}
    sent["accept-encoding"] = "identity"
    if isinstance(content, bytes) and len(content) > PIECE:
        sent["content-length"] = str(len(content))
        content = pieces(content)
    url = yarl.URL(call.url, encoded=True)
    return await session.request(
        method, url, headers=sent, data=content, allow_redirects=False, trace_request_ctx=call
    )


async def closed(response: aiohttp.ClientResponse) -> None:
    """Returns the connection to the pool, or closes it if the body is unread."""
    response.release()
    await response.wait_for_close()


def header_fields(response: aiohttp.ClientResponse) -> dict[str, str]:
    """Names in lower case. Repeated fields are joined with commas."""
    fields: dict[str, str] = {}
    for raw_name, raw in response.raw_headers:
        name = raw_name.decode("latin-1").lower()
        try:
            value = raw.decode()
        except UnicodeDecodeError:
            value = raw.decode("latin-1")
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    return fields
