"""The aiohttp transport: the guard as its resolver, URLs sent exactly as written, and a record of
whether there was a connection.
"""

import asyncio
import errno
import os
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import aiohttp
import yarl
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.client_proto import ResponseHandler

from service.errors import (
    CallTimedOut,
    ConnectionLost,
    EgressError,
    EgressRefused,
    NoRoute,
    NotConnected,
)
from service.fair_slots import FairSlots
from service.net.addresses import Address
from service.net.response_parser import ResponseEnd, ResponseParser
from service.net.service_client import CONNECT, USER_AGENT
from service.ops import tracing

Resolve = Callable[[str], Awaitable[Sequence[str]]]  # a host's addresses, OSError without any
# An iterator's pieces are sent as they come. Its content-length header is the caller's duty.
Content = bytes | AsyncIterator[bytes]
PIECE = 1 << 18  # bytes
# Look-ups at once, per purpose. An owner has one for each four that stay free, at most 26.
LOOKUPS, LOOKUPS_REST = 128, 4
# Failures of this machine: no name server answered, no network, no free port or descriptor.
LOCAL_ERRORS = {
    *(socket.EAI_AGAIN, socket.EAI_MEMORY, socket.EAI_SYSTEM),
    *(errno.ENETUNREACH, errno.ENETDOWN, errno.EMFILE, errno.ENFILE),
    *(errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL),
}
# Shorter than servers keep an idle connection (Node, uvicorn and Apache 5 s, gunicorn 2 s). A
# request that crosses the server's close is lost, and a lost submission may have been paid.
KEEP_ALIVE_S = 1.5


class SystemResolver:
    """The operating system's addresses of hosts, looked up on threads of one purpose.

    A look-up holds its thread until the name server answers or the system gives up, which may be
    long after the call was given up. So calls to a host share one look-up, and an owner has a fair
    share of the threads. A name server that never answers delays the calls of its own host.
    """

    def __init__(self, purpose: str) -> None:
        self._threads = ThreadPoolExecutor(LOOKUPS, thread_name_prefix=f"lookup-{purpose}")
        self._slots = FairSlots(LOOKUPS, LOOKUPS_REST)
        self._running: dict[str, asyncio.Future[Sequence[str]]] = {}

    async def __call__(self, host: str) -> Sequence[str]:
        if host not in self._running:
            holder = await self._slots.take()
            if host in self._running:  # another call has begun it meanwhile
                self._slots.give_back(holder)
            else:
                self._begin(host, holder)
        look_up = self._running[host]
        await asyncio.wait([look_up])  # a call that is given up leaves it to other calls
        return look_up.result()

    def _begin(self, host: str, holder: str) -> None:
        def ended(look_up: asyncio.Future[Sequence[str]]) -> None:
            del self._running[host]
            self._slots.give_back(holder)
            if not look_up.cancelled():
                look_up.exception()  # known, even if every call was given up

        loop = asyncio.get_running_loop()
        self._running[host] = loop.run_in_executor(self._threads, addresses_of, host)
        self._running[host].add_done_callback(ended)


def addresses_of(host: str) -> Sequence[str]:
    entries = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in entries))


@dataclass(slots=True)
class CallState:
    """The state that the caller and aiohttp's hooks share during a call. `connected`: the request
    may have been sent. `end` is that of the last response.
    """

    url: str = ""
    host: str = ""
    connected: bool = False
    end: ResponseEnd = field(default_factory=ResponseEnd)


# aiohttp passes nothing through to a connection.
CALL: ContextVar[CallState] = ContextVar("call")
TIMEOUT = aiohttp.ClientTimeout(sock_connect=CONNECT)


async def pieces(content: bytes) -> AsyncIterator[bytes]:
    """A large body in parts. aiohttp writes a single piece at once, which blocks the event loop."""
    for start in range(0, len(content), PIECE):
        yield content[start : start + PIECE]


@contextmanager
def translated(call: CallState) -> Iterator[None]:
    """Turns the libraries' errors into EgressErrors.

    `call.connected` decides, because the class of aiohttp's errors does not say whether there was a
    connection. The libraries' messages may contain the URL and are dropped.
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
        detail = problem_of(root)
        lost = CallTimedOut if late else ConnectionLost
        kind = lost if call.connected else not_connected(root)
        raise kind(f"{call.host}: {'no answer in time' if late else detail}") from error


@contextmanager
def redirected_by(host: str) -> Iterator[None]:
    """Makes every refusal `for_now`, because the host may redirect elsewhere the next time."""
    try:
        yield
    except EgressRefused as error:
        named, message = error.host or host, f"{host} redirects: {error}"
        raise EgressRefused(message, host=named, for_now=True, setting=error.setting) from error


def problem_of(error: BaseException) -> str:
    """The error in words. asyncio's own contain the address, which the caller may not know."""
    if not isinstance(error, OSError):
        return type(error).__name__
    if (
        error.errno is not None
        and error.errno in errno.errorcode
        and not isinstance(error, ssl.SSLError)
    ):
        return os.strerror(error.errno)
    return error.strerror or type(error).__name__


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


class LenientHandler(ResponseHandler):
    """A connection. `ResponseParser` reads its responses."""

    def set_response_params(self, **params: Any) -> None:
        """Called before each request on the connection, whether it is new (TLS done) or reused."""
        early, self._tail = self._tail, b""
        super().set_response_params(**params)
        call = CALL.get()
        call.connected = True
        self._parser = ResponseParser(  # type: ignore[assignment]
            self,
            call.end,
            params["timer"],
            params["read_bufsize"],
            without_body=params["skip_payload"],
        )
        if early:
            self.data_received(early)


def open_session(
    resolver: GuardedResolver, tls: ssl.SSLContext, connections: int, keep_alive: float
) -> aiohttp.ClientSession:
    """A session with its own pool, so that a connection for one purpose or scheme serves no
    other.
    """
    connector = aiohttp.TCPConnector(
        resolver=resolver,
        use_dns_cache=False,
        limit=connections,
        keepalive_timeout=keep_alive,
        ssl=tls,
    )
    # aiohttp has no public way to choose the parser of responses.
    factory = partial(LenientHandler, loop=asyncio.get_running_loop())
    connector._factory = factory  # type: ignore[assignment]  # noqa: SLF001
    return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())


async def send(
    session: aiohttp.ClientSession,
    call: CallState,
    method: str,
    headers: Mapping[str, str],
    content: Content | None,
) -> aiohttp.ClientResponse:
    """One request, without redirects. The caller reads and releases the response."""
    sent = {"user-agent": USER_AGENT, "accept": "*/*"}
    sent |= {name.lower(): value for name, value in headers.items()}
    sent["accept-encoding"] = "identity"  # without decoding, no body can grow in memory
    if isinstance(content, bytes) and len(content) > PIECE:
        sent["content-length"] = str(len(content))
        content = pieces(content)
    # As written: aiohttp would decode `%2F` and `%7E`, which breaks links signed over their text.
    url = yarl.URL(call.url, encoded=True)
    about = {"http.request.method": method, "server.address": call.host, "url.scheme": url.scheme}
    with tracing.span(method, "client", attributes=about) as span:
        if (traceparent := tracing.current()) is not None:
            sent["traceparent"] = traceparent
        call.end = ResponseEnd()
        token = CALL.set(call)
        try:
            response = await session.request(
                method,
                url,
                headers=sent,
                data=content or None,
                allow_redirects=False,
                timeout=TIMEOUT,
            )
        finally:
            CALL.reset(token)
        span.set(**{"http.response.status_code": response.status})
        if response.status >= 400:
            span.fail(str(response.status))
        return response


def fields_of(response: aiohttp.ClientResponse) -> dict[str, str]:
    """The header fields, names in lower case. Values of one name are one list."""
    fields: dict[str, str] = {}
    for raw_name, raw_value in response.raw_headers:
        try:
            value = raw_value.decode()
        except UnicodeDecodeError:
            value = raw_value.decode("latin-1")
        name = raw_name.decode()
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    return fields
