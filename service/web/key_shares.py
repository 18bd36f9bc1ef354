"""Shares of what a process gives out at once, so that one key or one address never takes all of it.
The figures are in docs/overload.md.
"""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

from starlette.requests import HTTPConnection
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from service.errors import ApiError

BODIES, BODIES_OF_ADDRESS, BODIES_OF_KEY = 250, 200, 50  # that are not complete yet
SLOW_S = 1.0  # after which a body or a connection may be ended for another


def address_of(client: tuple[str, int] | None) -> str:
    """The address of a client. One network of IPv6 (/64) counts as one address, because one machine
    has it. Clients of a Unix socket are one.
    """
    host = client[0] if client else ""
    return ip_address(host).exploded[:19] if ":" in host and "%" not in host else host


def holder_of(request: HTTPConnection) -> str:
    """Who asks, before the key is looked up: the text of the key, or else the address."""
    client = (request.client.host, 0) if request.client else None
    return request.headers.get("authorization") or address_of(client)


@dataclass(slots=True)
class Shares:
    """Places for `what`: `total` of them, and `each` for one holder."""

    what: str
    total: int
    each: int
    taken: int = 0
    held: Counter[str] = field(default_factory=Counter)

    def left(self, holder: str) -> bool:
        return self.held[holder] < self.each and self.taken < self.total

    def take(self, holder: str) -> "Share":
        """Raises ApiError: 429 if the holder has its share, 503 if the process has no place."""
        if self.held[holder] >= self.each:
            message = f"there are {self.each} {self.what} already, as many as one may have"
            raise ApiError(429, "rate_limit_exceeded", message, retry_after=1)
        if self.taken >= self.total:
            message = f"this process has {self.total} {self.what} already"
            raise ApiError(503, "overloaded", message, retry_after=1)
        self.taken += 1
        self.held[holder] += 1
        return Share(self, holder)

    def give_back(self, holder: str) -> None:
        self.taken -= 1
        self.held[holder] -= 1
        if not self.held[holder]:
            del self.held[holder]


@dataclass(frozen=True, slots=True)
class Share:
    """One place of a holder, until the end of the block."""

    shares: Shares
    holder: str

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self.shares.give_back(self.holder)


class HoldingResponse(StreamingResponse):
    """Holds a share until everything is sent, or the client has gone."""

    def __init__(self, share: Share, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._share = share

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._share:
            await super().__call__(scope, receive, send)


# --- bodies of requests ---


@dataclass(frozen=True, slots=True, eq=False)
class OpenBody:
    key: str
    address: str
    began: float
    timer: asyncio.Timeout


class BodyShares:
    """Bodies that are not complete. A new one beyond a share ends the oldest one of the key that
    has the most, if that is another key. Otherwise it ends the oldest one if that is slow.
    """

    def __init__(self) -> None:
        self._open: dict[OpenBody, None] = {}  # the oldest first

    def __len__(self) -> int:
        return len(self._open)

    @contextmanager
    def reading(self, key: str, address: str, timer: asyncio.Timeout) -> Iterator[None]:
        """Around the reading of a body, within its time limit `timer`, which also ends it for
        another. Raises ApiError 429 or 503 if there is no room.
        """
        body = OpenBody(key, address, asyncio.get_running_loop().time(), timer)
        self._make_room(body, [each for each in self._open if each.key == key], BODIES_OF_KEY)
        near = [each for each in self._open if each.address == address]
        self._make_room(body, near, BODIES_OF_ADDRESS)
        self._make_room(body, list(self._open), BODIES, status=503)
        self._open[body] = None
        try:
            yield
        finally:
            self._open.pop(body, None)

    def _make_room(
        self, new: OpenBody, oldest: list[OpenBody], most: int, status: int = 429
    ) -> None:
        if len(oldest) < most:
            return
        of_key = Counter(each.key for each in oldest)
        key, number = of_key.most_common(1)[0]
        victim = oldest[0]
        if number > of_key[new.key]:
            victim = next(each for each in oldest if each.key == key)
        elif new.began - victim.began < SLOW_S:
            code = "rate_limit_exceeded" if status == 429 else "overloaded"
            message = f"there are {most} bodies already that are not complete"
            raise ApiError(status, code, message, retry_after=1)
        del self._open[victim]
        if not victim.timer.expired():
            victim.timer.reschedule(new.began)
