"""The sweep removes blobs that no row names. A crash, a cancel or an erasure leaves them behind.

Several processes may sweep at once. A blob goes only if it is over 24 hours old by its store's
clock and belongs to a terminal task that waits for no download and does not name it. An input
image goes if its file does not name it. Blobs of tasks and files that this store does not know
stay: they belong to another installation, or they are newer than the backup that this store was
restored from (decision 17).
"""

import asyncio
import time
from collections.abc import Sequence

import structlog
from sqlalchemy import Connection, select

from service.db.file_tables import files
from service.db.tables import images, tasks
from service.ids import BLOB, task_of_blob
from service.resources import Resources
from service.tasks.state import TERMINAL

log = structlog.get_logger()

AGE_MS = 86_400_000
PAUSE_S = 0.05  # between pages, so that a large store is read slowly


async def sweep(resources: Resources) -> int:
    """Looks at every blob once and returns how many it removed.

    BlobUnavailable, StoreUnavailable: the rest waits for the next sweep.
    """
    blobs = resources.blobs
    started, before, seen, removed = time.perf_counter(), resources.clock() - AGE_MS, 0, 0
    try:
        async for page in blobs.listed():
            seen += len(page)
            old = [
                blob.name
                for blob in page
                if blob.modified_at < before and BLOB.fullmatch(blob.name)
            ]
            for name in await resources.store.read(orphans, old) if old else ():
                # A late result may have named the blob since the page was looked at.
                if await resources.store.read(orphans, [name]):
                    await blobs.delete(name)
                    removed += 1
            await asyncio.sleep(PAUSE_S)
    finally:
        duration_ms = round((time.perf_counter() - started) * 1000)
        log.info("blobs.swept", seen=seen, removed=removed, duration_ms=duration_ms)
    return removed


def orphans(connection: Connection, blobs: Sequence[str]) -> list[str]:
    """The blobs that no row names, of terminal tasks that wait for no download, and of files."""
    task_ids = {task_of_blob(name) for name in blobs}
    terminal = [state.value for state in TERMINAL]
    ended = select(tasks.c.id).where(tasks.c.id.in_(task_ids), tasks.c.state.in_(terminal))
    finished = set(connection.execute(ended).scalars())
    named = set[str]()
    mine = select(images.c.task_id, images.c.state, images.c.blob)
    for row in connection.execute(mine.where(images.c.task_id.in_(task_ids))):
        named.add(row.blob)
        if row.state == "pending":
            finished.discard(row.task_id)
    for file in connection.execute(
        select(files.c.id, files.c.blob).where(files.c.id.in_(task_ids))
    ):
        finished.add(file.id)
        named.add(file.blob)
    return [name for name in blobs if task_of_blob(name) in finished and name not in named]
