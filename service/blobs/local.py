"""Blobs as files under one folder, durable when `put` returns.

A new file is written in `.incoming`, its data synced, then it is renamed, then the folders that
lead to it are synced: after a power cut a name leads to the whole image or to nothing.
"""

import math
import os
import shutil
import stat
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from itertools import islice
from pathlib import Path
from typing import Self

from service.blobs.base import CHUNK, NAME, PAGE, Blob, Incoming, check_name
from service.blobs.incoming import in_thread, incoming_in, opened, remove_leftovers
from service.errors import BlobMissing
from service.folders import make_folder, sync

INCOMING = ".incoming"


class LocalBlobs:
    """Blobs below `root`; use `open`. Safe for many tasks and processes on one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    @classmethod
    async def open(cls, root: Path, spare: float = 0) -> Self:
        """Make the folder and remove what a dead process left in `.incoming`, but for what is
        younger than `spare` seconds.

        A live process whose file is removed gets BlobUnavailable and tries again; `spare` saves it
        the trouble.
        """
        blobs = cls(root)
        await in_thread(prepare, blobs.root, time.time() - spare if spare else math.inf)
        return blobs

    def incoming(self) -> AbstractAsyncContextManager[Incoming]:
        return incoming_in(self.root / INCOMING)

    async def put(self, incoming: Incoming, name: str, media_type: str) -> None:
        await in_thread(keep, incoming.path, self._path(name), self.root)

    async def read(self, name: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        path = self._path(name)
        while end is None or start < end:
            chunk = await in_thread(
                read_at, path, start, CHUNK if end is None else min(CHUNK, end - start)
            )
            if not chunk:
                return
            start += len(chunk)
            yield chunk

    async def size(self, name: str) -> int | None:
        return await in_thread(file_size, self._path(name))

    async def delete(self, name: str) -> None:
        await in_thread(remove, self._path(name), self.root)

    async def listed(self) -> AsyncIterator[Sequence[Blob]]:
        found = walk(self.root)
        while page := await in_thread(lambda: list(islice(found, PAGE))):
            yield page

    async def check(self) -> None:
        await self.free_bytes()

    async def free_bytes(self) -> int | None:
        return (await in_thread(shutil.disk_usage, self.root)).free

    def _path(self, name: str) -> Path:
        return self.root / check_name(name)


def prepare(root: Path, before: float) -> None:
    """Make the folders, so that they last, and remove leftovers last written until `before`
    (seconds since 1970).
    """
    make_folder(root)
    (root / INCOMING).mkdir(exist_ok=True)
    remove_leftovers(root / INCOMING, before)


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
    except (
        FileNotFoundError,
        FileExistsError,
    ):  # a `remove` found the folder empty and took it away in between
        if tries == 1:
            raise
        rename(source, target, tries - 1)


def sync_data(descriptor: int) -> None:
    (os.fdatasync if hasattr(os, "fdatasync") else os.fsync)(descriptor)


def sync_folders(folder: Path, top: Path) -> None:
    """Make the entries of a folder and of all that lead to it from `top` last."""
    folders = [folder, *folder.parents]
    for each in folders[: folders.index(top) + 1]:
        sync(each)


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


def walk(root: Path, folder: str = "") -> Iterator[Blob]:
    """Every blob below `folder` (empty, or with a slash at its end); what vanishes meanwhile is
    passed over.
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
