"""Blobs as objects of an S3 bucket, by obstore (extra `s3`), durable when `put` returns.

A new file is written to a local folder first, because an image's hash is known only when the file
is whole. It is uploaded in parts, so an upload takes 18 MiB of memory (measured). S3 makes an
object of one part only if its name is free (`If-None-Match`). obstore cannot ask that for several
parts, so there the name is looked up first. A name contains the content's hash, so at worst the
same bytes are written twice.
"""

import re
from asyncio import timeout
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Self, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import S3Store

from service.blobs.blob_store import (
    CHUNK,
    NAME,
    PAGE,
    Blob,
    Incoming,
    check_name,
    in_thread,
    incoming_in,
    remove_leftovers,
)
from service.errors import BlobMissing, BlobUnavailable

T = TypeVar("T")
PART = 5 << 20  # bytes: S3 takes no smaller part, except the last
PARTS_AT_ONCE = 2
BEYOND = 1 << 50  # bytes: more than an object can have
ANSWER_S = 15.0
SLOWEST = 1 << 18  # bytes per second: a slower upload is cancelled
STATUS = re.compile(r"status code: (\d{3}(?: [A-Za-z]+)*)")


class S3Blobs:
    """Blobs below a prefix of a bucket. Temporary files are in `folder`, which is made when it is
    first needed.
    """

    def __init__(self, store: S3Store, folder: Path) -> None:
        self._store = store
        self._folder = folder

    @classmethod
    async def open(
        cls, url: str, folder: Path, *, plain_http: bool = False, spare: float = 0
    ) -> Self:
        """For `s3://BUCKET/PREFIX`. obstore's variables `AWS_…` configure the rest. This sends no
        request, because S3 may be away for now.

        Removes what a dead process left in `folder`, except files younger than `spare` seconds.
        BlobUnavailable: the folder or a variable is unfit.
        """
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        try:
            store = S3Store(
                bucket,
                prefix=prefix or None,
                config={"disable_bulk_delete": True},  # not every S3 knows it
                client_options={
                    "allow_http": plain_http,
                    "connect_timeout": timedelta(seconds=5),
                    "timeout": timedelta(days=1),  # `answered` limits the time of a call
                },
                retry_config={
                    "max_retries": 2,
                    "retry_timeout": timedelta(seconds=10),
                    "backoff": {
                        "init_backoff": timedelta(milliseconds=100),
                        "max_backoff": timedelta(seconds=2),
                        "base": 2,
                    },
                },
            )
        except (BaseError, ValueError) as error:
            raise BlobUnavailable(str(error).partition("\n")[0]) from error
        await in_thread(remove_leftovers, folder, spare)
        return cls(store, folder)

    @asynccontextmanager
    async def incoming(self) -> AsyncIterator[Incoming]:
        await in_thread(self._folder.mkdir, parents=True, exist_ok=True)
        async with incoming_in(self._folder) as incoming:
            yield incoming

    async def put(self, incoming: Incoming, name: str, media_type: str) -> None:
        check_name(name)
        size = (await in_thread(incoming.path.stat)).st_size
        with suppress(AlreadyExistsError):
            if size <= PART:
                await self._put(incoming.path, size, name, media_type, create=True)
                return
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
                result = await obstore.get_async(
                    self._store, name, options={"range": (start, BEYOND if end is None else end)}
                )
        except BlobMissing:
            raise
        except BlobUnavailable:  # S3 refuses a range that begins at the end or later
            size = await self.size(name)
            if size is None or size > start:
                raise
            return
        pieces = result.stream(min_chunk_size=CHUNK)
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
    """The next piece, or None after the last."""
    async with answered(ANSWER_S):
        return await anext(stream, None)


@asynccontextmanager
async def answered(seconds: float, *expected: type[Exception]) -> AsyncIterator[None]:
    """One call of obstore. Its errors and a timeout become BlobMissing and BlobUnavailable, except
    the `expected` ones.
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
    """Without addresses and names."""
    if status := STATUS.search(str(error)):
        return f"the object store answered {status[1]}"
    in_time = " in time" if isinstance(error, TimeoutError) else ""
    return f"the object store did not answer{in_time}"
