"""Lets a confirmation share the commit of its task's downloads.

A callback starts the query and the downloads at the same time, and the query is mostly the quicker
one. Its record then waits a moment for the downloads, because the task cannot end before them. One
commit less costs less, and ends the task no later.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

LONGEST_S = 0.1


@dataclass(slots=True)
class _Downloads:
    count: int = 0
    finished: asyncio.Event = field(default_factory=asyncio.Event)


class SharedCommits:
    def __init__(self) -> None:
        self._under_way: dict[str, _Downloads] = {}

    @contextmanager
    def download(self, task_id: str) -> Iterator[None]:
        """A download of the task. The caller records it directly after the end of the block."""
        downloads = self._under_way.setdefault(task_id, _Downloads())
        downloads.count += 1
        try:
            yield
        finally:
            downloads.count -= 1
            if not downloads.count:
                downloads.finished.set()
                del self._under_way[task_id]

    async def join(self, task_id: str) -> None:
        """Waits until the downloads of the task that this process runs are about to be recorded,
        but not for long.
        """
        if downloads := self._under_way.get(task_id):
            with suppress(TimeoutError):
                async with asyncio.timeout(LONGEST_S):
                    await downloads.finished.wait()
