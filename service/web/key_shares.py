"""Shares of what a process gives out at once. The figures are in docs/overload.md."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import IPv6Address
from typing import Any, Protocol

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from service.errors import ApiError
from service.fair_slots import has_share

BODIES, BODIES_OF_ADDRESS, BODIES_OF_KEY = 500, 400, 200  # that are not complete yet
MIB = 1 << 20
BYTES, BYTES_OF_ADDRESS = 128 * MIB, 96 * MIB  # of bodies in memory. A key has a fair share.
SLOW_S = 1.0  # after which a body or a connection may be ended for another


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

    def left(self, holder: str, key: str = "") -> bool:
        of_key = self.each is None or self.held[holder, key] < self.each
        return of_key and has_share(self.held[holder,], self.total - self.taken)

    def take(self, holder: str, key: str = "") -> "Share":
        """Raises ApiError: 429 if the holder or the key has its share, 503 if no slot is left."""
        if not self.left(holder, key):
            had = self.held[holder,]
            if self.taken < self.total or self.held[holder, key] == self.each:
                most = self.each if self.held[holder, key] == self.each else f"{had} for now"
                message = f"there are {had} {self.what} already: you may have {most}"
                raise ApiError(429, "rate_limit_exceeded", message, retry_after=1)
            message = f"this process has {self.taken} {self.what} already"
            raise ApiError(503, "overloaded", message, retry_after=1)
        self.count(holder, key, 1)
        return Share(self, holder, key)

    def count(self, holder: str, key: str, change: int) -> None:
        self.taken += change
        for group in ((holder,), (holder, key)):
            self.held[group] += change
            if not self.held[group]:
                del self.held[group]


@dataclass(frozen=True, slots=True)
class Share:
    """One slot of a holder, until the end of the block."""

    shares: Shares
    holder: str
    key: str

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self.shares.count(self.holder, self.key, -1)


class HoldingResponse(StreamingResponse):
    """Holds a share until everything is sent, or the client has gone."""

    def __init__(self, share: Share, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._share = share

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._share:
            await super().__call__(scope, receive, send)


# --- bodies of requests ---


@dataclass(slots=True, eq=False)
class HeldBody:
    """The body of one request, from its first byte until nothing of it is in memory."""

    key: str = ""
    address: str = ""
    began: float = 0.0
    size: int = 0
    timer: asyncio.Timeout | None = None

    @property
    def limits(self) -> tuple[tuple[str, int, int | None, int], ...]:
        """For each share: whose it is, its most bodies and bytes, and the status of a refusal. No
        bytes: those that are free.
        """
        return (
            (self.key, BODIES_OF_KEY, None, 429),
            (f"from {self.address}", BODIES_OF_ADDRESS, BYTES_OF_ADDRESS, 429),
            ("", BODIES, BYTES, 503),
        )


class BodyShares:
    """Bodies that are not complete, and the bytes of all bodies in memory.

    A new body, or more bytes of one, may end a body that is not complete: the oldest one of the key
    that has the most. A key that has the most itself loses its own oldest one if that is slow.
    """

    def __init__(self) -> None:
        self._open: dict[HeldBody, None] = {}  # the oldest first
        self._bytes = Counter[str]()

    def __len__(self) -> int:
        return len(self._open)

    @property
    def size(self) -> int:
        return self._bytes[""]

    @contextmanager
    def request(self) -> Iterator[HeldBody]:
        """Around a request that may have a body."""
        body = HeldBody()
        try:
            yield body
        finally:
            self.forget(body)

    def forget(self, body: HeldBody) -> None:
        """The body's bytes are free for other requests."""
        for group, *_ in body.limits:
            self._bytes[group] -= body.size
            if not self._bytes[group]:
                del self._bytes[group]
        body.size = 0

    @contextmanager
    def arriving(
        self, body: HeldBody, key: str, address: str, timer: asyncio.Timeout
    ) -> Iterator[None]:
        """Around the reading of a body. Its `timer` also ends it for another. Raises ApiError."""
        body.key, body.address, body.timer = key, address, timer
        body.began = asyncio.get_running_loop().time()
        for group, most, _, status in body.limits:
            while len(near := self._near(group)) >= most:
                message = f"there are {most} bodies already that are not complete"
                self._make_room(body, near, lambda _: 1, status, message)
        self._open[body] = None
        try:
            yield
        finally:
            self._open.pop(body, None)

    def grow(self, body: HeldBody, size: int) -> None:
        """More bytes of a body are in memory. Raises ApiError 429 or 503 if there is no room."""
        for group, _, most, status in body.limits:
            while self._bytes[group] + size > (BYTES - self.size if most is None else most):
                all_of = self._near("" if most is None else group)
                near = [each for each in all_of if each.size and each is not body]
                message = f"the bodies under way have {self._bytes[group] >> 20} MiB already"
                self._make_room(body, near, lambda each: each.size, status, message)
        for group, *_ in body.limits:
            self._bytes[group] += size
        body.size += size

    def _near(self, group: str) -> list[HeldBody]:
        return [each for each in self._open if group in (near for near, *_ in each.limits)]

    def _make_room(
        self,
        body: HeldBody,
        near: list[HeldBody],
        weigh: Callable[[HeldBody], int],
        status: int,
        message: str,
    ) -> None:
        weights = Counter({body.key: weigh(body) if body in self._open else 0})
        for each in near:
            weights[each.key] += weigh(each)
        key, most = weights.most_common(1)[0]
        key = key if most > weights[body.key] else body.key
        victim = next((each for each in near if each.key == key), None)
        now = asyncio.get_running_loop().time()
        if victim is None or (key == body.key and now - victim.began < SLOW_S):
            code = "rate_limit_exceeded" if status == 429 else "overloaded"
            raise ApiError(status, code, message, retry_after=1)
        del self._open[victim]
        self.forget(victim)
        if victim.timer is not None and not victim.timer.expired():
            victim.timer.reschedule(now)


# --- what readers of answers have not taken ---

MAX_UNSENT = 64 << 20  # bytes in this process, without what the kernel has of each connection


class SlowReader(Protocol):
    """A connection that holds a part of an answer."""

    address: str

    def abort(self) -> None: ...


class UnsentBytes:
    """The bytes that connections hold. Over the budget, connections end: those of the address that
    holds the most, and of these first the ones that have taken nothing for the longest time.
    """

    def __init__(self) -> None:
        self._sizes: dict[SlowReader, int] = {}  # the longest first
        self.total = 0

    def hold(self, reader: SlowReader, size: int) -> None:
        self.release(reader)
        self._sizes[reader] = size
        self.total += size
        if self.total > MAX_UNSENT:
            self._end_slowest()

    def release(self, reader: SlowReader) -> None:
        self.total -= self._sizes.pop(reader, 0)

    def _end_slowest(self) -> None:
        """Down to three quarters, as each look at all connections takes time."""
        by_address = Counter[str]()
        for reader, size in self._sizes.items():
            by_address[reader.address] += size
        for address, _ in by_address.most_common():
            for reader in [each for each in self._sizes if each.address == address]:
                if self.total <= MAX_UNSENT * 3 // 4:
                    return
                self.release(reader)
                reader.abort()
