"""Blobs as files in one folder, durable when `put` returns.

A new file is written in `.incoming` and its data is synced. Then it is renamed, and the folders
that lead to it are synced. After a power cut a name leads to the whole image or to nothing.
"""

import os
import shutil
import stat
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from itertools import islice
from pathlib import Path
from typing import Self

from service.blobs.blob_store import (
    CHUNK,
    NAME,
    PAGE,
    Blob,
    Incoming,
    check_name,
    in_thread,
    incoming_in,
    opened,
    remove_leftovers,
)
from service.errors import BlobMissing
from service.folders import make_folder, sync

INCOMING = ".incoming"


class LocalBlobs:
    """Blobs below `root`. Several tasks and processes may use one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    @classmethod
    async def open(cls, root: Path, spare: float = 0) -> Self:
        """Makes the folder and removes what a dead process left in `.incoming`, except files
        younger than `spare` seconds.

        If the file of a live process is removed, that process gets BlobUnavailable and tries again.
        `spare` avoids that.
        """
        blobs = cls(root)
        await in_thread(prepare, blobs.root, spare)
        return blobs

    def incoming(self) -> AbstractAsyncContextManager[Incoming]:
        return incoming_in(self.root / INCOMING, local=True)

    async def put(self, incoming: Incoming, name: str, media_type: str) -> None:
        target = self._path(name)
        if not incoming.synced:
            await incoming.sync()
        await in_thread(keep, incoming.path, target, self.root)
        incoming.moved = True

    async def read(self, name: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        path = self._path(name)
        while end is None or start < end:
            count = CHUNK if end is None else min(CHUNK, end - start)
            chunk = await in_thread(read_at, path, start, count)
            if not chunk:
                return
            start += len(chunk)
            yield chunk

    async def size(self, name: str) -> int | None:
        return await in_thread(file_size, self._path(name))

    async def delete(self, name: str) -> None:
        await in_thread(remove, self._path(name), self.root)

    async def listed(self) -> AsyncIterator[Sequence[Blob]]:
        blobs = walk(self.root)
        while page := await in_thread(lambda: list(islice(blobs, PAGE))):
            yield page

    async def check(self) -> None:
        await self.free_bytes()

    async def free_bytes(self) -> int | None:
        return (await in_thread(shutil.disk_usage, self.root)).free

    def _path(self, name: str) -> Path:
        return self.root / check_name(name)


def prepare(root: Path, spare: float) -> None:
    make_folder(root)
    (root / INCOMING).mkdir(exist_ok=True)
    remove_leftovers(root / INCOMING, spare)


def keep(source: Path, target: Path, root: Path) -> None:
    rename(source, target)
    # Every folder up to the root is synced, also an old one: another `put` may have made it and not
    # synced it yet.
    for folder in (target.parent, *target.parent.parents):
        sync(folder)
        if folder == root:
            break


def rename(source: Path, target: Path, tries: int = 3) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)
    except (FileNotFoundError, FileExistsError):
        # A `remove` found the folder empty and took it away in between.
        if tries == 1:
            raise
        rename(source, target, tries - 1)


def read_at(path: Path, start: int, count: int) -> bytes:
    try:
        with opened(path, os.O_RDONLY) as descriptor:
            return os.pread(descriptor, count, start)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise BlobMissing("there is no such image") from error


def file_size(path: Path) -> int | None:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def remove(path: Path, root: Path) -> None:
    with suppress(NotADirectoryError):
        path.unlink(missing_ok=True)
    with suppress(OSError):  # the first folder that is not empty ends it
        for folder in path.relative_to(root).parents[:-1]:
            (root / folder).rmdir()


def walk(root: Path, folder: str = "") -> Iterator[Blob]:
    """Every blob below `folder`, which is empty or ends with a slash. Skips what vanishes
    meanwhile.
    """
    with suppress(FileNotFoundError), os.scandir(root / folder) as entries:
        for entry in entries:
            name = folder + entry.name
            if NAME.fullmatch(name) is None:
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from walk(root, f"{name}/")
            elif entry.is_file(follow_symlinks=False):
                with suppress(FileNotFoundError):
                    yield Blob(name, entry.stat(follow_symlinks=False).st_mtime_ns // 1_000_000)
