"""Files that are still being written, in a folder of this machine: what every blob store begins
with.

Every step opens and closes its own file, so a cancelled call leaves no open descriptor behind.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import ParamSpec, TypeVar

from service.blobs.base import Incoming
from service.errors import BlobUnavailable

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(slots=True)
class LocalIncoming:
    """A file in the folder."""

    path: Path
    size: int = 0

    async def write(self, data: bytes) -> None:
        await in_thread(append, self.path, data)
        self.size += len(data)

    async def clear(self) -> None:
        await in_thread(os.truncate, self.path, 0)
        self.size = 0


@asynccontextmanager
async def incoming_in(folder: Path) -> AsyncIterator[Incoming]:
    """A new file in the folder, gone at the exit unless it was moved away; BlobUnavailable."""
    path = folder / token_hex(16)
    try:
        await in_thread(create, path)
        yield LocalIncoming(path)
    finally:
        with suppress(BlobUnavailable):  # the next start removes it
            await in_thread(path.unlink, True)


async def in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run what blocks elsewhere; the system's errors come back as BlobUnavailable, without the
    path.
    """
    try:
        return await asyncio.to_thread(work, *args, **kwargs)
    except OSError as error:
        raise BlobUnavailable(error.strerror or type(error).__name__) from error


def remove_leftovers(folder: Path, before: float) -> None:
    """Removes what was last written until `before` (seconds since 1970), if there is such a folder
    at all.
    """
    for leftover in folder.iterdir() if folder.exists() else ():
        with suppress(FileNotFoundError):  # its owner lives and was quicker
            if leftover.stat().st_mtime <= before:
                leftover.unlink()


def create(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))


def append(path: Path, data: bytes) -> None:
    """Without O_CREAT: a write that outlives its cancelled caller must not bring the file back."""
    with opened(path, os.O_WRONLY | os.O_APPEND) as descriptor:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
