"""Folders that last: after a power cut what was made durable in them is found by its name."""

import os
from contextlib import suppress
from pathlib import Path


def make_folder(folder: Path) -> None:
    """Makes it where it is missing, and its name last, and the names of all that lead to it on its
    file system. OSError.

    Those that are there already as well: whoever made them may have died before they were made to
    last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for each in (folder.absolute(), *folder.absolute().parents):
        with suppress(PermissionError):  # it isn't ours, and older than we are
            sync(each)
        if each.is_mount():
            break


def sync(path: Path) -> None:
    """Makes what is in a file last, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
