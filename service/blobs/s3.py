"""Blobs as objects of an S3 bucket, by obstore (extra `s3`); durable when `put` returns, as S3
promises for its answer.

A new file is written to a folder of this machine first: an image is known by its hash only when it
is whole. It leaves that folder in parts, so memory holds few of them (18 MiB an upload, measured).
S3 makes an object of one part only if its name is free (`If-None-Match`); obstore cannot ask that
of several parts, so there the name is looked up before. A name says its content's hash, so at the
worst the same bytes are written twice.
"""

import math
import re
import time
from asyncio import timeout
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Self, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import S3Store

from service.blobs.base import CHUNK, NAME, PAGE, Blob, Incoming, check_name
from service.blobs.incoming import in_thread, incoming_in, remove_leftovers
from service.errors import BlobMissing, BlobUnavailable

T = TypeVar("T")
PART = 5 << 20  # bytes: S3 takes no smaller ones, but for the last
PARTS_AT_ONCE = 2
BEYOND = 1 << 50  # bytes: more than an object can have
ANSWER_S = 15.0
SLOWEST = 1 << 18  # bytes a second: an upload at half of that speed is given up
CONNECT = timedelta(seconds=5)
RETRIES, RETRY_FOR, FIRST_WAIT, LONGEST_WAIT = (
    2,
    timedelta(seconds=10),
    timedelta(milliseconds=100),
    timedelta(seconds=2),
)
STATUS = re.compile(r"status code: (\d{3}(?: [A-Za-z]+)*)")


class S3Blobs:
    """Blobs below a prefix of a bucket; use `open`. Temporary files lie in `folder`, which is made
    when one is needed.
    """

    def __init__(self, store: S3Store, folder: Path) -> None:
        self._store = store
        self._folder = folder

    @classmethod
    async def open(
        cls, url: str, folder: Path, *, plain_http: bool = False, spare: float = 0
    ) -> Self:
        """For `s3://BUCKET/PREFIX`; all else is in obstore's variables `AWS_…`. Nothing is asked of
        S3 yet: it may be away for now.

        Removes what a dead process left in `folder`, but for what is younger than `spare` seconds.
        BlobUnavailable: the folder or a variable is unfit.
        """
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        try:
            store = S3Store(
                bucket,
                prefix=prefix or None,
                config={
                    "disable_bulk_delete": True
                },  # not every S3 knows it, and one at a time needs none
                client_options={
                    "allow_http": plain_http,
                    "connect_timeout": CONNECT,
                    "timeout": timedelta(days=1),
                },  # the limits are ours
                retry_config={
                    "max_retries": RETRIES,
                    "retry_timeout": RETRY_FOR,
                    "backoff": {"init_backoff": FIRST_WAIT, "max_backoff": LONGEST_WAIT, "base": 2},
                },
            )
        except (BaseError, ValueError) as error:
            raise BlobUnavailable(str(error).partition("\n")[0]) from error
        await in_thread(remove_leftovers, folder, time.time() - spare if spare else math.inf)
        return cls(store, folder)

    @asynccontextmanager
    async def incoming(self) -> AsyncIterator[Incoming]:
        await in_thread(self._folder.mkdir, parents=True, exist_ok=True)
        async with incoming_in(self._folder) as incoming:
            yield incoming

    async def put(self, incoming: Incoming, name: str, media_type: str) -> None:
        check_name(name)
        size = (await in_thread(incoming.path.stat)).st_size
        try:
            if size > PART:
                if await self.size(name) != size:
                    await self._put(incoming.path, size, name, media_type)
            else:
                await self._put(incoming.path, size, name, media_type, create=True)
        except AlreadyExistsError:
            if await self.size(name) != size:
                await self._put(incoming.path, size, name, media_type)

    async def _put(
        self, path: Path, size: int, name: str, media_type: str, *, create: bool = False
    ) -> None:
        async with answered(ANSWER_S + size / SLOWEST, AlreadyExistsError):
            await obstore.put_async(
                self._store,
                name,
                path,
                attributes={"Content-Type": media_type},
                mode="create" if create else "overwrite",
                chunk_size=PART,
                max_concurrency=PARTS_AT_ONCE,
            )

    async def read(self, name: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        check_name(name)
        if end is not None and end <= start:
            return
        try:
            async with answered(ANSWER_S):
                found = await obstore.get_async(
                    self._store, name, options={"range": (start, BEYOND if end is None else end)}
                )
        except BlobMissing:
            raise
        except BlobUnavailable:  # S3 refuses a range that begins at the end or behind it
            size = await self.size(name)
            if size is None or size > start:
                raise
            return
        pieces = found.stream(min_chunk_size=CHUNK)
        while piece := await next_of(pieces):
            for at in range(0, len(piece), CHUNK):
                yield bytes(memoryview(piece)[at : at + CHUNK])

    async def size(self, name: str) -> int | None:
        check_name(name)
        try:
            async with answered(ANSWER_S):
                return (await obstore.head_async(self._store, name))["size"]
        except BlobMissing:
            return None

    async def delete(self, name: str) -> None:
        check_name(name)
        async with answered(ANSWER_S):
            await obstore.delete_async(self._store, name)

    async def listed(self) -> AsyncIterator[Sequence[Blob]]:
        pages = obstore.list(self._store, chunk_size=PAGE)
        while page := await next_of(pages):
            yield [
                Blob(each["path"], int(each["last_modified"].timestamp() * 1000))
                for each in page
                if NAME.fullmatch(each["path"])
            ]

    async def check(self) -> None:
        async with answered(ANSWER_S):
            await obstore.list(self._store, "nothing").collect_async()

    async def free_bytes(self) -> int | None:
        return None


async def next_of(stream: AsyncIterator[T]) -> T | None:
    """The next piece; None after the last."""
    async with answered(ANSWER_S):
        return await anext(stream, None)


@asynccontextmanager
async def answered(seconds: float, *expected: type[Exception]) -> AsyncIterator[None]:
    """One call of obstore: its errors and too long a silence come back as BlobMissing and
    BlobUnavailable, `expected` ones as they are.
    """
    try:
        async with timeout(seconds):
            yield
    except expected:
        raise
    except FileNotFoundError as error:
        raise BlobMissing(reason(error)) from error
    except (BaseError, OSError) as error:  # TimeoutError is an OSError
        raise BlobUnavailable(reason(error)) from error


def reason(error: Exception) -> str:
    """What went wrong, without addresses and names."""
    status = STATUS.search(str(error))
    if status:
        return f"the object store answered {status[1]}"
    return "the object store did not answer" + (
        " in time" if isinstance(error, TimeoutError) else ""
    )
