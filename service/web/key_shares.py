"""Shares of what a process gives out at once. The figures are in docs/overload.md."""

from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import IPv6Address
from typing import Any, Self

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from service.errors import ApiError
from service.fair_places import has_share


@lru_cache(1000)
def address_of(client: tuple[str, int] | None) -> str:
    """The address of a client. A network of IPv6 (/64), which one machine has, is one address."""
    host = client[0] if client else ""
    try:
        address = IPv6Address("" if "%" in host else host)
    except ValueError:  # IPv4, or what a proxy names
        return host
    return str(address.ipv4_mapped or address.exploded[:19])


@dataclass(slots=True)
class Shares:
    """Places for `what`. A holder has a fair share of the `total`, and one key at most `each`."""

    what: str
    total: int
    each: int | None = None
    taken: int = 0
    held: Counter[tuple[str, ...]] = field(default_factory=Counter)  # by holder, and by key of it

    def left(self, holder: str, key: str = "", count: int = 1) -> bool:
        of_key = self.each is None or self.held[holder, key] + count <= self.each
        before = count - 1  # the last of them is a place like any other
        free = self.total - self.taken - before
        return of_key and has_share(self.held[holder,] + before, free)

    def take(self, holder: str, key: str = "") -> "Share":
        """One place. Raises ApiError as `Share.grow`."""
        share = Share(self, holder, key)
        share.grow(1)
        return share

    def count(self, holder: str, key: str, change: int) -> None:
        self.taken += change
        for place in ((holder,), (holder, key)):
            self.held[place] += change
            if not self.held[place]:
                del self.held[place]


@dataclass(slots=True)
class Share:
    """Places of a holder, until the end of the block."""

    shares: Shares
    holder: str
    key: str = ""
    size: int = 0

    def grow(self, count: int) -> None:
        """Raises ApiError: 429 if the holder or the key has its share, 503 if no place is left."""
        shares = self.shares
        if not shares.left(self.holder, self.key, count):
            had = shares.held[self.holder,]
            of_key = shares.each is not None and shares.held[self.holder, self.key] == shares.each
            if of_key or shares.taken + count <= shares.total:
                most = shares.each if of_key else f"{had} for now"
                message = f"there are {had} {shares.what} already: you may have {most}"
                raise ApiError(429, "rate_limit_exceeded", message, retry_after=1)
            message = f"this process has {shares.taken} {shares.what} already"
            raise ApiError(503, "overloaded", message, retry_after=1)
        shares.count(self.holder, self.key, count)
        self.size += count

    def release(self) -> None:
        self.shares.count(self.holder, self.key, -self.size)
        self.size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class HoldingResponse(StreamingResponse):
    """Holds a share until everything is sent, or the client has gone."""

    def __init__(self, share: Share, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._share = share

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._share:
            await super().__call__(scope, receive, send)
