"""Where images are kept: what a blob store can do. A name is `{task_id}/{index}-{sha256}.{ext}`, so
its bytes never change.
"""

import re
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

NAME = re.compile(
    r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}(?:/[A-Za-z0-9_][A-Za-z0-9._-]{0,199}){0,3}", re.ASCII
)
CHUNK = 1 << 18  # bytes
PAGE = 200  # blobs


@dataclass(frozen=True, slots=True)
class Blob:
    """One that is kept; `modified_at`: milliseconds since 1970 UTC by the clock of its store."""

    name: str
    modified_at: int


class Incoming(Protocol):
    """A file that is still being written: `path` may be read at any time, `size` is how many bytes
    it has.
    """

    @property
    def path(self) -> Path: ...

    @property
    def size(self) -> int: ...

    async def write(self, data: bytes) -> None:
        """Append; each call goes to a thread and back, so pieces should be large.
        BlobUnavailable.
        """

    async def clear(self) -> None:
        """Begin again with nothing. BlobUnavailable."""


class Blobs(Protocol):
    """A blob store. Every method raises BlobUnavailable when the store fails, and ValueError for
    what is no blob's name.
    """

    def incoming(self) -> AbstractAsyncContextManager[Incoming]:
        """A temporary local file, gone at the exit unless it was put."""

    async def put(self, incoming: Incoming, name: str, media_type: str) -> None:
        """Keep the file under the name; it survives a power cut once this returns. The same name
        again is harmless.
        """

    def read(self, name: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """The bytes from `start` up to but without `end`, in chunks of at most CHUNK;
        BlobMissing.
        """

    async def size(self, name: str) -> int | None:
        """How many bytes the blob has; None if there is none."""

    async def delete(self, name: str) -> None:
        """Forget the blob; a missing one is fine."""

    def listed(self) -> AsyncIterator[Sequence[Blob]]:
        """Every blob, in pages of at most PAGE, in no order; what comes or goes meanwhile may be
        missing.
        """

    async def check(self) -> None:
        """Returns if the store answers now."""

    async def free_bytes(self) -> int | None:
        """How much more fits; None where nobody knows."""


def check_name(name: str) -> str:
    """The name itself; ValueError for one that could lead out of the store or to its own files
    (`..`, `/x`, `.incoming/x`).
    """
    if NAME.fullmatch(name) is None:
        raise ValueError(f"no blob has a name like {name!r}")
    return name
