"""Every request that leaves: one guarded client a purpose, over httpx's aiohttp transport.

A URL is judged by its text (scheme, host list, port, literal address), its name by every address it has now, each redirect like a first
request. The transport's resolver is the judge itself, so a connection goes to an address that was judged and no second look-up exists.
The transports are driven without `httpx.AsyncClient`: no cookies are kept, no redirect is prepared, and no proxy or netrc of the
environment is read (a proxy would resolve names itself, behind the guard's back).
"""

import asyncio
import re
import socket
import ssl
import unicodedata
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache, partial
from ipaddress import AddressValueError, IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from types import MappingProxyType
from typing import Any, Self
from urllib.parse import urljoin

import aiohttp
import httpx
import yarl
from aiohttp.abc import AbstractResolver, ResolveResult
from httpx_aiohttp import AiohttpTransport

from service import VERSION
from service.errors import CallTimedOut, ConnectionLost, EgressError, EgressRefused, NotConnected

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Resolve = Callable[[str], Awaitable[Sequence[str]]]  # a host's addresses; OSError when it has none
NOTHING: Mapping[str, str] = MappingProxyType({})

MAX_URL = 2048
CONNECT = 10.0  # seconds for TCP and TLS to one host; a black hole must not eat a long call's whole time
PIECE = 1 << 18  # bytes
REDIRECTS = frozenset({301, 302, 303, 307, 308})
KEPT_ACROSS_ORIGINS = frozenset({"accept", "range", "user-agent"})
USER_AGENT = f"Darkroom/{VERSION}"
URL = re.compile(r"(https?)://([^/?#]*)([^#]*)(?:#.*)?", re.IGNORECASE | re.DOTALL)
SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE | re.ASCII)
AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(?::([0-9]{1,5}))?", re.IGNORECASE | re.ASCII)
LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?", re.ASCII)
NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.ASCII)  # a host that ends so is an IPv4 address (WHATWG URL)

GLOBAL_V6 = IPv6Network("2000::/3")  # all that IANA gives out as global unicast; no ULA, link- or site-local, multicast, NAT64
SPECIAL = tuple(  # IANA's special-purpose registries where `is_global` of some Python releases says otherwise
    ip_network(text)
    for text in (
        *("0.0.0.0/8", "100.64.0.0/10", "192.0.0.0/24", "192.88.99.0/24", "198.18.0.0/15", "224.0.0.0/4", "240.0.0.0/4"),
        *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),
    )
)
TRANSLATED = tuple(ip_network(text) for text in ("::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48"))  # SIIT, NAT64


@dataclass(frozen=True, slots=True)
class Rules:
    """What one purpose may reach.

    `networks`: not globally routable, reached all the same, with plain http too. `hosts`: None is any, `.x` every subdomain of x, `x`
    exactly x; it holds for literal addresses as well. `redirects`: how many a GET or HEAD follows, 0 makes a 3xx an answer like any
    other. `upgrade`: an http link to a host outside `networks` is fetched by https.
    """

    purpose: str
    networks: tuple[Network, ...] = ()
    hosts: tuple[str, ...] | None = None
    redirects: int = 0
    upgrade: bool = False


@dataclass(frozen=True, slots=True)
class Response:
    """An answer: header names in lower case, the body as sent (never decoded), cut at the caller's limit; `duration` in seconds."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    truncated: bool
    duration: float


@dataclass(frozen=True, slots=True)
class Streamed:
    """An answer whose body is still to come; `url` is the one that was fetched in the end. `chunks` may be iterated once."""

    status: int
    headers: Mapping[str, str]
    url: str
    chunks: Callable[[], AsyncIterator[bytes]]


@dataclass(frozen=True, slots=True)
class Target:
    """A URL taken apart without a doubt: `host` in ASCII, lower case, without brackets or last dot; `address` when it is a literal."""

    scheme: str
    host: str
    port: int | None
    path: str
    address: Address | None

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port is None else f":{self.port}"
        return str(httpx.URL(f"{self.scheme}://{host}{port}{self.path}"))

    @property
    def upgraded(self) -> "Target":
        return replace(self, scheme="https", port=None if self.port == 80 else self.port)

    @property
    def origin(self) -> tuple[str, str, int]:
        return self.scheme, self.host, self.port or (443 if self.scheme == "https" else 80)


def parse_url(text: str, base: str = "") -> Target:
    """Take a URL apart (relative to `base`); ValueError, with the reason, for everything two parsers might read differently."""
    if any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in text):
        raise ValueError("a URL has no control characters")
    url = text if not base or SCHEME.match(text) else urljoin(base, text)  # alone, `urljoin` would read `http:///x` as a path
    if len(url) > MAX_URL:
        raise ValueError(f"a URL has at most {MAX_URL} characters")
    if (parts := URL.fullmatch(url)) is None:
        raise ValueError("only http and https URLs are fetched")
    scheme, authority, path = parts[1].lower(), parts[2], parts[3]
    if "@" in authority:
        raise ValueError("a URL has no user name or password")
    if (place := AUTHORITY.fullmatch(authority)) is None:
        raise ValueError("the host or port of the URL is not valid")
    port = None if place[2] is None else int(place[2])
    if port is not None and not 0 < port < 65536:
        raise ValueError("the port of the URL is not valid")
    host, address = parse_host(place[1])
    return Target(scheme, host, port, path, address)


def parse_host(text: str) -> tuple[str, Address | None]:
    """A URL's host as ASCII, with its address if it is a literal; ValueError for every notation of an address but the plain one."""
    if text.startswith("["):
        try:
            literal = IPv6Address(text[1:-1])
        except AddressValueError as error:
            raise ValueError("the host of the URL is not valid") from error
        return str(literal), literal
    host = text
    if not host.isascii():
        if unicodedata.normalize("NFKC", host) != host:  # full-width digits and their like
            raise ValueError("the host of the URL is not in normal form")
        try:
            host = httpx.URL(f"https://{host}/").raw_host.decode("ascii")
        except httpx.InvalidURL as error:
            raise ValueError("the host of the URL is not valid") from error
    host = host.lower().removesuffix(".")
    labels = host.split(".")
    if NUMBER.fullmatch(labels[-1]):
        try:
            return host, IPv4Address(host)
        except AddressValueError as error:
            raise ValueError("the host of the URL is an address in an odd notation") from error
    if len(host) > 253 or not all(LABEL.fullmatch(label) for label in labels):
        raise ValueError("the host of the URL is not valid")
    return host, None


def embedded(address: Address) -> Iterator[IPv4Address]:
    """The IPv4 addresses that a gateway, a tunnel or the kernel may read out of an IPv6 address."""
    if isinstance(address, IPv4Address):
        return
    number = int(address)
    low = IPv4Address(number & 0xFFFFFFFF)
    compatible = 1 < number < 1 << 32  # ::/96 but for the unspecified address and loopback
    isatap = number >> 32 & 0xFCFFFFFF == 0x00005EFE  # in the interface's half, whatever its u and g bits
    if compatible or isatap or any(address in network for network in TRANSLATED):
        yield low
    if address.sixtofour:
        yield address.sixtofour
    if address.teredo:
        yield from address.teredo


def forbidden(address: Address, networks: Sequence[Network], *, plain: bool) -> str | None:
    """Why an address may not be connected to (`plain`: without TLS), or None. An IPv4 address inside is judged first, by the same rule."""
    if isinstance(address, IPv6Address) and address.scope_id is not None:
        return f"{address} has a zone"
    for inner in embedded(address):
        if (reason := forbidden(inner, networks, plain=plain)) is not None:
            return f"{address} stands for {reason}"
    if any(address in network for network in networks):
        return None
    routable = address.is_global and not address.is_multicast and not any(address in network for network in SPECIAL)
    if not routable or (address.version == 6 and address not in GLOBAL_V6):
        return f"{address} is not globally routable"
    return f"{address} is not in the networks that plain http may reach" if plain else None


@cache
def lookups() -> ThreadPoolExecutor:
    """Threads for `getaddrinfo` alone: a hostile name server that never answers must not hold those that write images."""
    return ThreadPoolExecutor(8, thread_name_prefix="lookup")


async def system(host: str) -> Sequence[str]:
    """The addresses the operating system knows for a host."""
    found = await asyncio.get_running_loop().run_in_executor(lookups(), lambda: socket.getaddrinfo(host, None, type=socket.SOCK_STREAM))
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))


@dataclass(slots=True)
class Call:
    """What the transport must know of the request it carries, and tell of it."""

    url: str = ""
    host: str = ""
    connected: bool = False


CALL: ContextVar[Call] = ContextVar("call")  # httpx passes nothing through to aiohttp's hooks


async def exact(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """Send the URL as it was written: aiohttp would decode `%2F` and `%7E` in it, which breaks links signed over their text."""
    request.url = yarl.URL(CALL.get().url, encoded=True)
    return await handler(request)


async def connected(*_: object) -> None:
    """aiohttp has a connection for the request, new (TLS done) or used before: from here on it may have been sent."""
    CALL.get().connected = True


async def pieces(content: bytes) -> AsyncIterator[bytes]:
    """A large body in parts: aiohttp writes one piece of bytes at a stroke, which holds up everybody else."""
    for start in range(0, len(content), PIECE):
        yield content[start : start + PIECE]


@contextmanager
def translated(call: Call) -> Iterator[None]:
    """Lower errors as ours. What counts is whether there was a connection: the class of httpx-aiohttp's errors does not tell."""
    try:
        yield
    except EgressError:
        raise
    except (OSError, httpx.HTTPError, aiohttp.ClientError) as error:
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        late = isinstance(root, TimeoutError | asyncio.CancelledError)  # asyncio's own limit is a cancellation at its root
        reason = "no answer in time" if late else getattr(root, "strerror", None) or type(root).__name__  # their texts may show the URL
        kind = NotConnected if not call.connected else CallTimedOut if late else ConnectionLost
        raise kind(f"{call.host}: {reason}") from error


class Judge(AbstractResolver):
    """The transport's resolver: it gives out no address that was not judged."""

    def __init__(self, addresses: Callable[[str], Awaitable[Sequence[Address]]]) -> None:
        self._addresses = addresses

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        families = {4: socket.AF_INET, 6: socket.AF_INET6}
        found = await self._addresses(host)
        return [
            ResolveResult(hostname=host, host=str(a), port=port, family=families[a.version], proto=0, flags=socket.AI_NUMERICHOST)
            for a in found
        ]

    async def close(self) -> None:
        """Nothing is held."""


class Egress:
    """The guarded client of one purpose, an async context manager.

    Raises EgressRefused (also told to `on_refused`: purpose, host, reason), NotConnected, CallTimedOut, ConnectionLost.
    On a kept connection that the other side closes a GET is sent once more; a POST is ConnectionLost, as it may have been seen.
    `tls` replaces the usual trust (`SSL_CERT_FILE`, else certifi's).
    """

    def __init__(
        self,
        rules: Rules,
        *,
        connections: int = 64,
        on_refused: Callable[[str, str, str], None] | None = None,
        resolve: Resolve = system,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.rules = rules
        self._connections = connections
        self._on_refused = on_refused
        self._resolve = resolve
        self._tls = tls
        self._transports: dict[str, AiohttpTransport] = {}

    async def __aenter__(self) -> Self:
        tls = self._tls or httpx.create_ssl_context()
        for scheme in ("https", "http"):
            judge = Judge(partial(self._judged_addresses, plain=scheme == "http"))
            trace = aiohttp.TraceConfig()
            trace.on_connection_create_end.append(connected)
            trace.on_connection_reuseconn.append(connected)
            session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(resolver=judge, use_dns_cache=False, limit=self._connections, ssl=tls),
                cookie_jar=aiohttp.DummyCookieJar(),
                middlewares=(exact,),
                trace_configs=[trace],
            )
            self._transports[scheme] = AiohttpTransport(verify=tls, client=session)
        return self

    async def __aexit__(self, *_: object) -> None:
        for transport in self._transports.values():
            await transport.aclose()

    def check_url(self, url: str) -> None:
        """Judge a URL by its text alone; EgressRefused."""
        self._target(url)

    async def check(self, url: str) -> None:
        """Judge a URL by its text and by every address its name has now; EgressRefused, NotConnected when it has none."""
        target = await self._ready(self._target(url))
        if target.address is None:
            try:
                async with asyncio.timeout(CONNECT):
                    await self._judged_addresses(target.host, plain=target.scheme == "http")
            except TimeoutError as error:
                raise NotConnected("the name was not looked up in time") from error

    async def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] = NOTHING,
        content: bytes | None = None,
        timeout: float,
        max_bytes: int = 1 << 20,
    ) -> Response:
        """One call, whole within `timeout` seconds. Of a body over `max_bytes` the beginning comes back."""
        started = asyncio.get_running_loop().time()
        call, body = Call(), bytearray()
        with translated(call):
            async with asyncio.timeout(timeout):
                response = await self._answer(call, method, url, headers, content)
                try:
                    async for chunk in response.aiter_raw():
                        body += chunk
                        if len(body) > max_bytes:
                            break
                finally:
                    await response.aclose()
        duration = asyncio.get_running_loop().time() - started
        return Response(response.status_code, dict(response.headers), bytes(body[:max_bytes]), len(body) > max_bytes, duration)

    @asynccontextmanager
    async def stream(
        self, method: str, url: str, *, headers: Mapping[str, str] = NOTHING, timeout: float, idle: float
    ) -> AsyncIterator[Streamed]:
        """One call whose body is read in pieces: whole within `timeout` seconds, with never `idle` seconds without a byte."""
        clock = asyncio.get_running_loop().time
        end, call = clock() + timeout, Call()
        with translated(call):
            async with asyncio.timeout_at(end):
                response = await self._answer(call, method, url, headers, None, idle)

        async def chunks() -> AsyncIterator[bytes]:
            raw, chunk = response.aiter_raw(), b""
            while True:
                with translated(call):
                    async with asyncio.timeout_at(min(end, clock() + idle)):
                        chunk = await anext(raw, b"")
                if not chunk:
                    return
                yield chunk

        try:
            yield Streamed(response.status_code, dict(response.headers), call.url, chunks)
        finally:
            await response.aclose()

    async def _answer(
        self, call: Call, method: str, url: str, headers: Mapping[str, str], content: bytes | None, idle: float | None = None
    ) -> httpx.Response:
        """The head of the last answer, after redirects; its body is unread and the caller closes it."""
        target = await self._ready(self._target(url))
        for _ in range(self.rules.redirects + 1):
            call.url, call.host = target.url, target.host
            async with asyncio.timeout(idle):
                response = await self._send(call, method, target, headers, content)
            location = response.headers.get("location")
            follow = self.rules.redirects and method in ("GET", "HEAD") and response.status_code in REDIRECTS
            if not follow or location is None:
                return response
            await response.aclose()
            following = await self._ready(self._target(location, call.url))
            if following.origin != target.origin:  # a key or a cookie is meant for who was asked
                headers = {name: value for name, value in headers.items() if name.lower() in KEPT_ACROSS_ORIGINS}
            target = following
        raise self._refused(target.host, f"more than {self.rules.redirects} redirects")

    async def _send(self, call: Call, method: str, target: Target, headers: Mapping[str, str], content: bytes | None) -> httpx.Response:
        sent = {"user-agent": USER_AGENT, "accept": "*/*"} | {name.lower(): value for name, value in headers.items()}
        sent["accept-encoding"] = "identity"  # nothing is decoded here, so nothing can swell
        body: bytes | AsyncIterator[bytes] | None = content
        if content is not None and len(content) > PIECE:
            body, sent["content-length"] = pieces(content), str(len(content))
        request = httpx.Request(method, call.url, headers=sent, content=body, extensions={"timeout": {"connect": CONNECT}})
        token = CALL.set(call)
        try:
            return await self._transports[target.scheme].handle_async_request(request)
        finally:
            CALL.reset(token)

    def _target(self, url: str, base: str = "") -> Target:
        """A URL judged by its text."""
        try:
            target = parse_url(url, base)
        except ValueError as error:
            raise self._refused("", str(error)) from error
        rules, host, address = self.rules, target.host, target.address
        if rules.hosts is not None and not any(host == known or (known[:1] == "." and host.endswith(known)) for known in rules.hosts):
            raise self._refused(host, "the host is not one of those allowed")
        if target.scheme == "http" and not rules.networks:
            if not rules.upgrade:
                raise self._refused(host, "plain http is not allowed")
            target = target.upgraded
        if address is not None:
            target = self._upgraded(target, (address,))
            self._judge(host, (address,), plain=target.scheme == "http")
        return target

    def _upgraded(self, target: Target, addresses: Iterable[Address]) -> Target:
        """An http link as https, if the rules say so and it leads out of the networks."""
        upgrade = self.rules.upgrade and target.scheme == "http"
        outside = upgrade and any(forbidden(address, self.rules.networks, plain=True) for address in addresses)
        return target.upgraded if outside else target

    def _judge(self, host: str, addresses: Iterable[Address], *, plain: bool) -> None:
        """All addresses of a host; one that is forbidden refuses them all, as the name is in somebody else's hands."""
        for address in addresses:
            if (reason := forbidden(address, self.rules.networks, plain=plain)) is not None:
                raise self._refused(host, reason)

    async def _ready(self, target: Target) -> Target:
        if target.scheme == "http" and self.rules.upgrade and target.address is None:
            return self._upgraded(target, await self._addresses(target.host))
        return target

    async def _addresses(self, host: str) -> Sequence[Address]:
        try:
            found = [ip_address(text) for text in await self._resolve(host)]
        except OSError as error:
            raise NotConnected(f"{host}: {error.strerror or 'no address'}") from error
        if not found:
            raise NotConnected(f"{host}: no address")
        return found

    async def _judged_addresses(self, host: str, *, plain: bool) -> Sequence[Address]:
        found = await self._addresses(host)
        self._judge(host, found, plain=plain)
        return found

    def _refused(self, host: str, reason: str) -> EgressRefused:
        if self._on_refused is not None:
            self._on_refused(self.rules.purpose, host, reason)
        return EgressRefused(f"{host}: {reason}" if host else reason)


def service_client(base_url: str, api_key: str | None) -> httpx.Client:
    """The command line's own client of the service: no guard, follows nothing; reads for as long as an answer may be held back."""
    headers = {"user-agent": USER_AGENT} | ({} if api_key is None else {"authorization": f"Bearer {api_key}"})
    return httpx.Client(
        base_url=base_url,
        headers=headers,
        timeout=httpx.Timeout(150, connect=CONNECT),  # `Prefer: wait` holds an answer for up to 120 s
        follow_redirects=False,
        trust_env=False,  # the service is near; a proxy of the environment would see the key
        verify=httpx.create_ssl_context(),
    )


def service_call(client: httpx.Client, method: str, path: str, **options: Any) -> httpx.Response:
    """One request of `service_client`, whatever its status; NotConnected, CallTimedOut, ConnectionLost."""
    try:
        return client.request(method, path, **options)
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise NotConnected(f"{client.base_url.host}: no connection") from error
    except httpx.TimeoutException as error:
        raise CallTimedOut(f"{client.base_url.host}: no answer in time") from error
    except httpx.HTTPError as error:
        raise ConnectionLost(f"{client.base_url.host}: the connection broke") from error
