"""Durable and private folders.

After a power cut, what was synced in a folder is found by its name. Only the user of the process
reads what the process stores.
"""

import os
import stat
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


def keep_private() -> None:
    """New files get the mode 0600 and new folders 0700, under any umask."""
    os.umask(0o077)


def make_private(*paths: Path) -> None:
    """Takes files and folders from other users, except what they own or all users share."""
    for path in paths:
        with suppress(FileNotFoundError, PermissionError):
            mode = path.stat().st_mode
            if not mode & stat.S_ISVTX:
                path.chmod(0o700 if stat.S_ISDIR(mode) else 0o600)


def sync(path: Path) -> None:
    """Syncs the content of a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
