"""The lock on an embedded store."""

import fcntl
import os
from pathlib import Path

from service.errors import ConfigurationError
from service.folders import make_folder


class FileLock:
    """Proves that this process alone uses the store. The kernel frees it when the process ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = -1

    def acquire(self) -> bool:
        try:
            make_folder(self.path.parent)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigurationError(
                f"{self.path} cannot be written: {error.strerror}; DARKROOM_DATA_DIR must be a"
                " folder that can"
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            return False
        return True

    def release(self) -> None:
        os.close(self._file)
