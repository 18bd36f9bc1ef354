"""The interface of a blob store, and the temporary files that every store begins with.

A blob's name is `{task_id}/{index}-{sha256}.{ext}`, or that of an input image with the file's id in
place of the task's. So its bytes never change.
"""

import asyncio
import math
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import ParamSpec, Protocol, TypeVar

from service.errors import BlobMissing, BlobUnavailable

P = ParamSpec("P")
T = TypeVar("T")
NAME = re.compile(
    r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}(?:/[A-Za-z0-9_][A-Za-z0-9._-]{0,199}){0,3}", re.ASCII
)
CHUNK = 1 << 18  # bytes
PAGE = 200  # blobs


@dataclass(frozen=True, slots=True)
class Blob:
    """`modified_at` is in milliseconds since 1970 UTC, by the store's clock."""

    name: str
    modified_at: int


@dataclass(slots=True)
class Incoming:
    """A temporary file that is being written. Each write opens and closes it, so a cancelled call
    leaves no descriptor open.
    """

    path: Path
    local: bool = False  # it becomes the blob itself
    size: int = 0
    begun: bool = False  # the first write makes the file
    synced: bool = False  # with all that was written
    moved: bool = False  # it has become the blob

    async def write(self, data: bytes) -> None:
        """Appends. Each call goes to a thread and back, so pieces should be large.
        BlobUnavailable.
        """
        write, self.begun, self.synced = append if self.begun else create, True, False
        await in_thread(write, self.path, data)
        self.size += len(data)

    async def sync(self) -> None:
        """Syncs what is written so far, while the image is decoded. `put` then has less to wait
        for, and promises the same without it. No write may run meanwhile. BlobUnavailable.
        """
        if self.local:
            await in_thread(sync_data, self.path)
            self.synced = True


class Blobs(Protocol):
    """A blob store. Every method raises BlobUnavailable when the store fails, and ValueError for a
    name that no blob can have.
    """

    def incoming(self) -> AbstractAsyncContextManager[Incoming]:
        """A temporary local file. It is removed at the exit, unless it was put."""

    async def put(self, incoming: Incoming, name: str, media_type: str) -> None:
        """Keeps the file under the name. Once this returns, the blob survives a power cut. Putting
        the same name again is harmless.
        """

    def read(self, name: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """The bytes from `start` to before `end`, in chunks of at most CHUNK. BlobMissing."""

    async def size(self, name: str) -> int | None:
        """In bytes, or None if there is no such blob."""

    async def delete(self, name: str) -> None:
        """A missing blob is no error."""

    def listed(self) -> AsyncIterator[Sequence[Blob]]:
        """Every blob, in pages of at most PAGE, in no order. A blob that is put or deleted
        meanwhile may be missing.
        """

    async def check(self) -> None:
        """Returns if the store answers now."""

    async def free_bytes(self) -> int | None:
        """The room that is left, or None if the store does not know."""


async def check_size(blobs: Blobs, name: str, size: int | None, what: str) -> None:
    """Raises BlobMissing, which names `what`, if the blob does not have this many bytes."""
    if await blobs.size(name) != size:
        raise BlobMissing(f"{what} is not as it was stored")


def check_name(name: str) -> str:
    """The name itself. ValueError: it could lead out of the store or to the store's own files
    (`..`, `/x`, `.incoming/x`).
    """
    if NAME.fullmatch(name) is None:
        raise ValueError(f"no blob has a name like {name!r}")
    return name


@asynccontextmanager
async def incoming_in(folder: Path, *, local: bool = False) -> AsyncIterator[Incoming]:
    """A new file in the folder. It is removed at the exit, unless it was moved. BlobUnavailable.

    A cancellation during the first write may leave the file. The next start removes it.
    """
    incoming = Incoming(folder / token_hex(16), local)
    try:
        yield incoming
    finally:
        if incoming.begun and not incoming.moved:
            with suppress(BlobUnavailable):  # the next start removes it
                await in_thread(incoming.path.unlink, True)


async def in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs a blocking function. An OSError becomes BlobUnavailable, without the path."""
    try:
        return await asyncio.to_thread(work, *args, **kwargs)
    except OSError as error:
        raise BlobUnavailable(error.strerror or type(error).__name__) from error


def remove_leftovers(folder: Path, spare: float) -> None:
    """Removes files that a dead process left in the folder, except files younger than `spare`
    seconds. Without `spare`, every file goes.
    """
    before = time.time() - spare if spare else math.inf
    for leftover in folder.iterdir() if folder.exists() else ():
        with suppress(FileNotFoundError):  # a live process removed its own
            if leftover.stat().st_mtime <= before:
                leftover.unlink()


def create(path: Path, data: bytes) -> None:
    append(path, data, os.O_CREAT | os.O_EXCL)


def append(path: Path, data: bytes, flags: int = 0) -> None:
    """Without O_CREAT: a write that outlives its cancelled caller must not create the file."""
    with opened(path, os.O_WRONLY | os.O_APPEND | flags) as descriptor:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]


def sync_data(path: Path) -> None:
    with opened(path, os.O_RDONLY) as descriptor:
        (os.fdatasync if hasattr(os, "fdatasync") else os.fsync)(descriptor)


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
