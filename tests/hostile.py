"""A service among hostile names and URLs, and the proof that it connects to none of them."""

import json
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.traps import Place, Trap, connects, trap
from tests.upstream import Upstream, document
from tests.waiting import wait_until
from tests.world import World, world

JSON = dict[str, Any]

SYSTEM = socket.getaddrinfo

# The networks of the upstream and its results contain only 127.0.0.1. All other purposes have
# no private network at all.
_ADDRESSES = """
127.0.0.2 127.0.0.2. 127.2 127.0.2 2130706434 0x7f000002 0x7f.2 0177.0.0.2 017700000002 127.0.0.0x2
0 0.0.0.0 10.0.0.1 169.254.169.254 100.100.100.200 192.168.0.1. 172.16.0.1 168.63.129.16 224.0.0.1
[::1] [::] [0:0:0:0:0:0:0:1] [::ffff:127.0.0.2] [::FFFF:7f00:2] [::127.0.0.2] [::ffff:0:127.0.0.2]
[64:ff9b::7f00:2] [64:ff9b::127.0.0.2] [64:ff9b:1::7f00:2] [2002:7f00:2::1] [2001:0:7f00:2::1]
[fd00:ec2::254] [fe80::1] [fe80::1%25lo] [::1%25lo] [::1%lo] [::1].
１２７.0.0.2 127。0。0。2 127．0．0．2 127｡0｡0｡2 ①②⑦.0.0.2
127%2e0%2e0%2e2 %31%32%37.0.0.2 127.0.0.2%00
"""
ADDRESSES = _ADDRESSES.split()
ZONE = {
    "private.evil.test": ["127.0.0.2"],
    "second.evil.test": ["1.1.1.1", "127.0.0.2"],
    "first.evil.test": ["127.0.0.2", "1.1.1.1"],
    "mixed.evil.test": ["2606:4700::1111", "::ffff:127.0.0.2"],
    "gateway.evil.test": ["64:ff9b::7f00:2"],
    "tunnel.evil.test": ["2002:7f00:2::1"],
    "zone.evil.test": ["fe80::1%lo"],
    "metadata.evil.test": ["169.254.169.254"],
    "last.evil.test": [*(f"1.1.1.{number}" for number in range(60)), "127.0.0.2"],
    "many.evil.test": [f"1.1.{number}.1" for number in range(200)],
    "xn--bse-sna.evil.test": ["127.0.0.2"],
    "localhost": ["127.0.0.2"],
}
NAMES = (
    *(name for name in ZONE if not name.startswith("xn--")),
    "PRIVATE.evil.TEST.",
    "böse.evil.test",
    "LOCALHOST.",
)
_FORMS = r"""
https://u:p@127.0.0.2:{port}/ https://1.1.1.1@127.0.0.2:{port}/
https://127.0.0.2:{port}@private.evil.test/ https://public.evil.test\@127.0.0.2:{port}/
https://public.evil.test:443:{port}/ https:127.0.0.2:{port}/ //127.0.0.2/
https:///127.0.0.2:{port}/ https://127.0.0.2:0{port}0/
https://public.evil.test:25/ https://public.evil.test:6667/
ftp://127.0.0.2:{port}/ file:///etc/passwd gopher://127.0.0.2:{port}/x unix:///run/x
wss://127.0.0.2:{port}/
"""
FORMS = (
    *_FORMS.split(),
    "https://127.0.0.2:{port}/\r\nHost: x",
    "https://public.evil.test#@127.0.0.2:{port}/\x7f",
    "https://public.evil.test/" + "x" * 20_000,
)


def linked(hosts: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{scheme}://{host}:{{port}}/x" for host in hosts for scheme in ("https", "http"))


HOSTILE = (*linked(ADDRESSES), *linked(NAMES), *FORMS)
# Results at these are never fetched and never named by a name server.
LITERAL = (*linked(ADDRESSES), *FORMS)


@dataclass(slots=True)
class Names:
    """The system's resolver for `zone` and for all names under .test. Each lookup gets the next
    answer, and the last answer repeats.
    """

    zone: dict[str, list[Sequence[str]]] = field(
        default_factory=lambda: {name: [addresses] for name, addresses in ZONE.items()}
    )

    def look_up(self, host: str, *more: Any, **options: Any) -> list[Any]:
        if host not in self.zone and not host.endswith(".test"):
            return SYSTEM(host, *more, **options)
        if host not in self.zone:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        rounds = self.zone[host]
        answer = rounds.pop(0) if len(rounds) > 1 else rounds[0]
        families = {True: socket.AF_INET6, False: socket.AF_INET}
        return [(families[":" in each], socket.SOCK_STREAM, 6, "", (each, 0)) for each in answer]


@dataclass(slots=True)
class Recorded:
    """An application, with the raw path and the headers of every request."""

    app: ASGIApp
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            target = scope["raw_path"].decode() + (
                "?" + scope["query_string"].decode() if scope["query_string"] else ""
            )
            headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}
            self.requests.append((f"{scope['method']} {target}", headers))
        await self.app(scope, receive, send)


def place(url: str) -> Place:
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


@dataclass(frozen=True, slots=True)
class Guarded:
    """A world without private networks. Only the upstream and its results may use 127.0.0.1."""

    world: World
    upstream: Upstream
    recorded: Recorded
    trap: Trap
    names: Names
    allowed: set[Place] = field(default_factory=set)  # further servers of the test

    @contextmanager
    def watched(self) -> Iterator[None]:
        """AssertionError if this process connects to any place but the service, its upstream and
        `allowed`, or if the trap gets a connection.
        """
        with connects() as trail:
            yield
        assert (
            trail - self.allowed - {place(self.world.url), place(self.world.sandbox_url)} == set()
        )
        assert self.trap.connections == 0

    def refusals(self, purpose: str) -> float:
        """The number of connections that the guard has refused for this purpose."""
        counter: float = self.world.context.resources.metrics.egress_refused.labels(
            purpose
        )._value.get()
        return counter

    async def calls_back(self, task: JSON, answer: JSONResponse) -> None:
        """The upstream ends the task and sends the callback."""
        self.upstream.queries[task["upstream_id"]] = [answer]
        body = {**json.loads(bytes(answer.body)), "id": task["upstream_id"]}
        assert (
            await self.world.stranger.post(self.world.callback_url(task["id"]), json=body)
        ).status_code == 200

    async def storing(self, *results: str) -> JSON:
        """A task that the upstream has completed with these results."""
        task = await self.world.submit()
        await self.calls_back(task, document("completed", *results))

        async def confirmed() -> bool:
            return (await self.world.task(task["id"]))["state"] not in ("queued", "submitted")

        await wait_until(confirmed)
        return task

    async def completed(self, *results: str) -> JSON:
        """The same in its terminal state."""
        return await self.world.ended((await self.storing(*results))["id"])


@asynccontextmanager
async def guarded(folder: Path) -> AsyncIterator[Guarded]:
    """The result hosts include all hostile names, so that only the check of addresses can refuse
    them.
    """
    upstream, names = Upstream(), Names()
    recorded = Recorded(upstream.app)
    hosts = (
        "127.0.0.1,127.0.0.2,10.0.0.1,169.254.169.254,::1,::,64:ff9b::7f00:2,localhost,.evil.test"
    )
    closed: dict[str, Any] = {
        "endpoint_networks": None,
        "task_callback_networks": None,
        "upstream_networks": "127.0.0.1/32",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", names.look_up)
        async with (
            trap() as made,
            world(
                folder,
                upstream=recorded,
                evolink_result_hosts=hosts,
                reconcile_after_s=600,
                no_results_after_s=0.2,
                **closed,
            ) as here,
        ):
            yield Guarded(here, upstream, recorded, made, names)
