"""The guarded HTTP client of one purpose."""

import asyncio
import ssl
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address
from types import MappingProxyType
from typing import Self

import aiohttp
import httpx

from service.errors import CallTimedOut, ConnectionLost, EgressError, EgressRefused, NotConnected
from service.net.addresses import Address, Network, forbidden
from service.net.deadline import until
from service.net.responses import Response, Streamed
from service.net.service_client import CONNECT, usual_trust
from service.net.transport import (
    KEEP_ALIVE_S,
    CallState,
    Content,
    GuardedResolver,
    Resolve,
    SystemResolver,
    fields_of,
    not_connected,
    open_session,
    redirected_by,
    send,
    translated,
)
from service.net.urls import MAX_URL, OddAddress, Target, parse_url

NOTHING: Mapping[str, str] = MappingProxyType({})
MAX_ADDRESSES = 64  # of a name, as an attacker may return very many
MAX_TRIED = 8  # addresses in one call, so that no name makes the service probe dozens of hosts
CHUNK = 1 << 18  # bytes. Each read sets a timer, so pieces are large
REDIRECTS = frozenset({301, 302, 303, 307, 308})
KEPT_ACROSS_ORIGINS = frozenset({"accept", "user-agent"})


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules for one purpose.

    `networks`: reachable although not globally routable, with plain http too. `hosts`: None allows
    every host, `.x` every subdomain of x, `x` exactly x, and the list also binds literal addresses.
    `redirects`: the most that a GET or HEAD follows. With 0, a 3xx is an ordinary response.
    `upgrade`: the client fetches an http link to a host outside `networks` by https. `max_url`: in
    characters. `networks_setting` and `hosts_setting` name the settings for the operator.
    """

    purpose: str
    networks: tuple[Network, ...] = ()
    hosts: tuple[str, ...] | None = None
    redirects: int = 0
    upgrade: bool = False
    max_url: int = MAX_URL
    networks_setting: str | None = None
    hosts_setting: str | None = None


class Egress:
    """The guarded client of one purpose, an async context manager.

    Raises EgressRefused (also reported to `on_refused`: purpose, host, reason), NotConnected,
    CallTimedOut, ConnectionLost. If the other side closes a reused connection, the client sends a
    GET once more. A POST raises ConnectionLost, as the other side may have seen it. `resolve`
    replaces the system's resolver, `tls` the usual trust. Idle connections live
    `keep_alive` seconds.
    """

    def __init__(
        self,
        rules: Rules,
        *,
        connections: int = 64,
        on_refused: Callable[[str, str, str], None] | None = None,
        resolve: Resolve | None = None,
        tls: ssl.SSLContext | None = None,
        keep_alive: float = KEEP_ALIVE_S,
    ) -> None:
        self.rules = rules
        self._connections = connections
        self._on_refused = on_refused
        self._resolve = resolve or SystemResolver(rules.purpose)
        self._tls = tls
        self._keep_alive = keep_alive
        self._sessions: dict[str, aiohttp.ClientSession] = {}

    async def __aenter__(self) -> Self:
        tls = self._tls or usual_trust()
        for scheme in ("https", "http"):
            resolver = GuardedResolver(partial(self._allowed_addresses, plain=scheme == "http"))
            self._sessions[scheme] = open_session(
                resolver, tls, self._connections, self._keep_alive
            )
        return self

    async def __aexit__(self, *_: object) -> None:
        for session in self._sessions.values():
            await session.close()

    def check_url(self, url: str) -> None:
        """Checks the text of a URL. Raises EgressRefused."""
        self._target(url)

    async def check(self, url: str) -> None:
        """Checks the text of a URL and every current address of its name. Raises EgressRefused, or
        NotConnected when the name has no address.
        """
        target = self._target(url)
        try:
            async with asyncio.timeout(CONNECT):
                target = await self._ready(target)
                if target.address is None:
                    await self._allowed_addresses(target.host, plain=target.scheme == "http")
        except TimeoutError as error:
            raise NotConnected("the name was not looked up in time") from error

    async def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] = NOTHING,
        content: Content | None = None,
        timeout: float,
        max_bytes: int = 1 << 20,
        body_timeout: float | None = None,
    ) -> Response:
        """One call, complete within `timeout` seconds, its body within `body_timeout`. A body over
        `max_bytes` is cut off. A body that breaks is the response's `failure`.
        """
        clock = asyncio.get_running_loop().time
        started, body = clock(), bytearray()
        failure: EgressError | None = None
        sending = self.stream(method, url, headers=headers, content=content, timeout=timeout)
        async with sending as answer, aclosing(answer.chunks()) as chunks:
            try:
                async with asyncio.timeout(body_timeout):
                    async for chunk in chunks:
                        body += chunk
                        if len(body) > max_bytes:
                            break
            except TimeoutError:
                failure = CallTimedOut("no whole body in time")
            except EgressError as error:
                failure = error
        kept = bytes(body[:max_bytes])
        return Response(answer.status, answer.headers, kept, clock() - started, failure)

    @asynccontextmanager
    async def stream(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] = NOTHING,
        content: Content | None = None,
        timeout: float,
        idle: float | None = None,
    ) -> AsyncGenerator[Streamed, None]:
        """One call, with a body read in pieces. It must be complete within `timeout` seconds, with
        no pause of `idle` seconds (by default `timeout`) between bytes.
        """
        clock = asyncio.get_running_loop().time
        end, call = clock() + timeout, CallState()
        with translated(call):
            async with until(end):
                response = await self._answer(call, method, url, headers, content, idle)

        async def chunks() -> AsyncGenerator[bytes, None]:
            chunk = b""
            while not response.content.at_eof():
                with translated(call):
                    async with until(min(end, clock() + (idle or timeout))):
                        chunk = await response.content.read(CHUNK)
                if chunk:
                    yield chunk
            if call.end.problem is not None:
                raise ConnectionLost(f"{call.host}: {call.end.problem}")

        try:
            yield Streamed(response.status, fields_of(response), call.url, chunks)
        finally:
            response.release()
            await response.wait_for_close()

    async def _answer(
        self,
        call: CallState,
        method: str,
        url: str,
        headers: Mapping[str, str],
        content: Content | None,
        idle: float | None,
    ) -> aiohttp.ClientResponse:
        """The head of the last response, after redirects. The caller reads and closes its body."""
        target = await self._ready(self._target(url))
        for _ in range(self.rules.redirects + 1):
            call.url, call.host = target.url, target.host
            async with asyncio.timeout(idle):
                response = await send(self._sessions[target.scheme], call, method, headers, content)
            redirected = method in ("GET", "HEAD") and response.status in REDIRECTS
            location = fields_of(response).get("location") if redirected else None
            if location is None or not self.rules.redirects:
                return response
            response.release()
            await response.wait_for_close()
            with redirected_by(target.host):
                following = await self._ready(self._target(location, call.url))
            if following.origin != target.origin:  # a key or cookie is for the first origin alone
                kept = [name for name in headers if name.lower() in KEPT_ACROSS_ORIGINS]
                headers = {name: headers[name] for name in kept}
            target = following
        raise self._refused(
            target.host, f"more than {self.rules.redirects} redirects", for_now=True
        )

    def _target(self, url: str, base: str = "") -> Target:
        """The parsed URL, after all checks of its text. Raises EgressRefused, perhaps hostless."""
        try:
            target = parse_url(url, base, self.rules.max_url)
        except ValueError as error:
            by, for_now = httpx.URL(base).host, not isinstance(error, OddAddress)
            raise self._refused("", str(error), for_now=for_now, by=by) from error
        rules, host, address = self.rules, target.host, target.address
        if target.scheme == "http" and not rules.networks:
            if not rules.upgrade:
                setting = rules.networks_setting
                raise self._refused(host, "plain http is not allowed", setting=setting)
            target = target.upgraded
        if address is not None:
            target = self._upgraded(target, (address,))
            if rule := forbidden(address, rules.networks, plain=target.scheme == "http"):
                rule, logged = f"its address {rule}", f"{address} {rule}"
                raise self._refused(host, rule, logged, setting=rules.networks_setting)
        if rules.hosts is not None and not any(
            host == entry or (entry[:1] == "." and host.endswith(entry)) for entry in rules.hosts
        ):
            reason = "the host is not one of those allowed"
            raise self._refused(host, reason, for_now=True, setting=rules.hosts_setting)
        return target

    def _upgraded(self, target: Target, addresses: Iterable[Address]) -> Target:
        """An http link as https, if the rules say so and it leads outside the networks."""
        upgrade = self.rules.upgrade and target.scheme == "http"
        outside = upgrade and any(
            forbidden(address, self.rules.networks, plain=True) for address in addresses
        )
        return target.upgraded if outside else target

    async def _ready(self, target: Target) -> Target:
        if target.scheme == "http" and self.rules.upgrade and target.address is None:
            return self._upgraded(target, await self._addresses(target.host))
        return target

    async def _addresses(self, host: str) -> Sequence[Address]:
        try:
            texts = (await self._resolve(host))[: MAX_ADDRESSES + 1]
        except OSError as error:
            raise not_connected(error)(f"{host}: {error.strerror or 'no address'}") from error
        if not texts:
            raise NotConnected(f"{host}: no address")
        if len(texts) > MAX_ADDRESSES:
            reason = f"the name has more than {MAX_ADDRESSES} addresses"
            raise self._refused(host, reason, for_now=True)
        return [ip_address(text) for text in texts]

    async def _allowed_addresses(self, host: str, *, plain: bool) -> Sequence[Address]:
        """One forbidden address refuses the whole host, because its owner controls the name."""
        addresses, rules = await self._addresses(host), self.rules
        for address in addresses:
            if (rule := forbidden(address, rules.networks, plain=plain)) is not None:
                rule, logged = f"its address {rule}", f"{address} {rule}"
                setting = rules.networks_setting
                raise self._refused(host, rule, logged, for_now=True, setting=setting)
        return addresses[:MAX_TRIED]

    def _refused(
        self,
        host: str,
        reason: str,
        logged: str = "",
        *,
        for_now: bool = False,
        setting: str | None = None,
        by: str = "",
    ) -> EgressRefused:
        """`reason` is for the client that named the host. `logged` may say more. `by` redirects."""
        more = f", and {setting} does not list it" if setting is not None else ""
        if self._on_refused is not None:
            self._on_refused(self.rules.purpose, host or by, (logged or reason) + more)
        message = f"{host}: {reason}{more}" if host else reason + more
        return EgressRefused(message, host=host, for_now=for_now, setting=setting)
