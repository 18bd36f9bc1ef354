"""Blobs as files under one folder, durable when `put` returns.

A new file is written in `.incoming`, its data synced, then it is renamed, then the folders that lead to it are synced: after a power cut a
name leads to the whole image or to nothing. Every step opens and closes its own file, so a cancelled call leaves no open descriptor behind.
"""

import asyncio
import math
import os
import shutil
import stat
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import ParamSpec, Self, TypeVar

from service.blobs import CHUNK, Incoming, check_name
from service.errors import BlobMissing, BlobUnavailable

P = ParamSpec("P")
T = TypeVar("T")
INCOMING = ".incoming"


@dataclass(slots=True)
class LocalIncoming:
    """A file in `.incoming`."""

    path: Path
    size: int = 0

    async def write(self, data: bytes) -> None:
        await in_thread(append, self.path, data)
        self.size += len(data)

    async def read(self) -> bytes:
        return await in_thread(self.path.read_bytes)

    async def clear(self) -> None:
        await in_thread(os.truncate, self.path, 0)
        self.size = 0


class LocalBlobs:
    """Blobs below `root`; use `open`. Safe for many tasks and processes on one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    @classmethod
    async def open(cls, root: Path, spare: float = 0) -> Self:
        """Make the folder and remove what a dead process left in `.incoming`, but for what is younger than `spare` seconds.

        A live process whose file is removed gets BlobUnavailable and tries again; `spare` saves it the trouble.
        """
        blobs = cls(root)
        await in_thread(prepare, blobs.root, time.time() - spare if spare else math.inf)
        return blobs

    @asynccontextmanager
    async def incoming(self) -> AsyncIterator[Incoming]:
        path = self.root / INCOMING / token_hex(16)
        try:
            await in_thread(create, path)
            yield LocalIncoming(path)
        finally:
            with suppress(BlobUnavailable):  # the next `open` removes it
                await in_thread(path.unlink, True)

    async def put(self, incoming: Incoming, name: str, media_type: str) -> None:
        await in_thread(keep, incoming.path, self._path(name), self.root)

    async def read(self, name: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        path = self._path(name)
        while end is None or start < end:
            chunk = await in_thread(read_at, path, start, CHUNK if end is None else min(CHUNK, end - start))
            if not chunk:
                return
            start += len(chunk)
            yield chunk

    async def size(self, name: str) -> int | None:
        return await in_thread(file_size, self._path(name))

    async def delete(self, name: str) -> None:
        await in_thread(remove, self._path(name), self.root)

    async def free_bytes(self) -> int | None:
        return (await in_thread(shutil.disk_usage, self.root)).free

    def _path(self, name: str) -> Path:
        return self.root / check_name(name)


async def in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run what blocks elsewhere; the system's errors come back as BlobUnavailable, without the path."""
    try:
        return await asyncio.to_thread(work, *args, **kwargs)
    except OSError as error:
        raise BlobUnavailable(error.strerror or type(error).__name__) from error


def prepare(root: Path, before: float) -> None:
    """Make the folders, so that they last, and remove leftovers last written until `before` (seconds since 1970)."""
    known = next(folder for folder in (root, *root.parents) if folder.exists())
    (root / INCOMING).mkdir(parents=True, exist_ok=True)
    sync_folders(root, known)
    for leftover in (root / INCOMING).iterdir():
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


def keep(source: Path, target: Path, root: Path) -> None:
    with opened(source, os.O_RDONLY) as descriptor:
        sync_data(descriptor)
    rename(source, target)
    # All of them, not only those just made: another `put` may have made one and not synced it yet.
    sync_folders(target.parent, root)


def rename(source: Path, target: Path, tries: int = 3) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)
    except (FileNotFoundError, FileExistsError):  # a `remove` found the folder empty and took it away in between
        if tries == 1:
            raise
        rename(source, target, tries - 1)


def sync_data(descriptor: int) -> None:
    (os.fdatasync if hasattr(os, "fdatasync") else os.fsync)(descriptor)


def sync_folders(folder: Path, top: Path) -> None:
    """Make the entries of a folder and of all that lead to it from `top` last."""
    folders = [folder, *folder.parents]
    for each in folders[: folders.index(top) + 1]:
        with opened(each, os.O_RDONLY) as descriptor:
            os.fsync(descriptor)


def read_at(path: Path, start: int, count: int) -> bytes:
    try:
        with opened(path, os.O_RDONLY) as descriptor:
            return os.pread(descriptor, count, start)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise BlobMissing("there is no such image") from error


def file_size(path: Path) -> int | None:
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def remove(path: Path, root: Path) -> None:
    with suppress(NotADirectoryError):
        path.unlink(missing_ok=True)
    with suppress(OSError):  # the first folder that holds something else ends it
        for folder in path.relative_to(root).parents[:-1]:
            (root / folder).rmdir()


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
