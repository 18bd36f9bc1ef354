"""Durable folders: after a power cut, what was synced in them is found by its name."""

import os
from contextlib import suppress
from pathlib import Path


def make_folder(folder: Path) -> None:
    """Makes the folder and syncs its name and the names of all folders above it on its file
    system. OSError.

    Existing folders are synced too: the process that made one may have died before it synced it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for each in (folder.absolute(), *folder.absolute().parents):
        with suppress(PermissionError):  # another user's folder, and older than this process
            sync(each)
        if each.is_mount():
            break


def sync(path: Path) -> None:
    """Syncs the content of a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
