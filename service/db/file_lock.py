"""The lock on an embedded store."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.errors import ConfigurationError
from service.folders import make_folder


@contextmanager
def store_lock(store: Path) -> Iterator[bool]:
    """True: this process alone uses the store, until the end of the block or of the process. False:
    another process uses it.
    """
    path, alone = store.with_name(store.name + ".lock"), True
    try:
        make_folder(path.parent)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be written: {error.strerror}; DARKROOM_DATA_DIR must be a folder that"
            " can"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        alone = False
    try:
        yield alone
    finally:
        os.close(file)
