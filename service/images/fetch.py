"""One result brought into a file. A body that breaks off is gone on with (RFC 9110, 14), bounded in
bytes, requests and time.

The type that an answer names is ignored. Bytes beyond a `Content-Length` are never seen, as HTTP
ends the body there; fewer are a break.
"""

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from service.blobs.base import CHUNK, Incoming
from service.errors import CallTimedOut, ConnectionLost
from service.net import Egress, Streamed
from service.queue.backoff import retry_after

CALL_S = 300.0  # for all requests of a try together
IDLE_S = 15.0
REQUESTS = 6  # of a try
STALE = (403, 404, 410)
CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a try brought no picture."""

    reason: str
    final: bool = False
    stale: bool = False
    wrong_sha256: str | None = None
    retry_after: float | None = None


@dataclass(frozen=True, slots=True)
class Version:
    """What all parts of one body have in common; `total` in bytes. The tag and the date are there
    when they prove it (RFC 9110, 8.8).
    """

    tag: str | None = None
    modified: str | None = None
    encoding: str = ""
    total: int | None = None

    @classmethod
    def of(cls, headers: Mapping[str, str], total: int | None) -> Self:
        tag, modified = headers.get("etag", ""), headers.get("last-modified")
        return cls(
            tag if tag.startswith('"') else None,
            None
            if modified == headers.get("date")
            else modified,  # it may have changed again within that second
            headers.get("content-encoding", "").strip().lower(),
            total,
        )

    @classmethod
    def whole(cls, headers: Mapping[str, str]) -> Self:
        length = headers.get("content-length", "")
        return cls.of(headers, int(length) if length.isascii() and length.isdigit() else None)

    def rest(self, held: int) -> dict[str, str] | None:
        """The headers that ask for what is behind the first `held` bytes; None when nothing proves
        that it is the same body: two
        pictures may have one length."""
        known = self.tag or self.modified
        return {"range": f"bytes={held}-", "if-range": known} if held and known else None

    def continued(self, headers: Mapping[str, str], held: int) -> "Version | None":
        """This version, with its length, if a 206 goes on with it where it broke off."""
        found = CONTENT_RANGE.fullmatch(headers.get("content-range", ""))
        if found is None or not held == int(found[1]) <= int(found[2]):
            return None
        part = Version.of(headers, None if found[3] == "*" else int(found[3]))
        if part.encoding != self.encoding or (
            self.tag and part.tag != self.tag
        ):  # a part has its tag (RFC 9110, 15.3.7)
            return None
        if any(
            None not in pair and pair[0] != pair[1]
            for pair in ((self.modified, part.modified), (self.total, part.total))
        ):
            return None
        return replace(self, total=self.total or part.total)


async def fetch(
    results: Egress, url: str, file: Incoming, max_bytes: int, now: float
) -> str | Failure:
    """Fills the file; the body's content encoding, "" for none. EgressError, BlobUnavailable.
    `now`: seconds since 1970.
    """
    clock = asyncio.get_running_loop().time
    end, version = clock() + CALL_S, Version()
    for left in reversed(range(REQUESTS)):
        held, rest = file.size, version.rest(file.size)
        try:
            async with results.stream(
                "GET", url, headers=rest or {}, timeout=end - clock(), idle=IDLE_S
            ) as answer:
                following = (
                    version.continued(answer.headers, held)
                    if rest and answer.status == 206
                    else None
                )
                if following is None and held:
                    await file.clear()
                if following is None and rest and answer.status in (206, 416):
                    version = Version()
                    continue
                if following is None and answer.status != 200:
                    wait = retry_after(answer.headers.get("retry-after"), now)
                    return Failure(
                        f"answered {answer.status}", stale=answer.status in STALE, retry_after=wait
                    )
                version = following or Version.whole(answer.headers)
                if not await received(answer, file, max_bytes):
                    return Failure(f"over {max_bytes} bytes", final=True)
        except (ConnectionLost, CallTimedOut):
            if (
                not left
                or file.size in (0, held)
                or version.rest(file.size) is None
                or clock() >= end
            ):
                raise
            continue
        if version.total is None or file.size == version.total:
            return version.encoding
        if file.size > version.total:  # a part was longer than it said
            version = Version()
    return Failure(f"not whole after {REQUESTS} requests")


async def received(answer: Streamed, file: Incoming, max_bytes: int) -> bool:
    """Appends a body; False when the file would be over the limit. What came before a break is in
    the file.
    """
    gathered = bytearray()  # each write is a hop to another thread: few and large ones
    try:
        async for chunk in answer.chunks():
            gathered += chunk
            if file.size + len(gathered) > max_bytes:
                return False
            if len(gathered) >= CHUNK:
                await file.write(bytes(gathered))
                gathered.clear()
    except (ConnectionLost, CallTimedOut):
        await file.write(bytes(gathered))
        raise
    await file.write(bytes(gathered))
    return True
