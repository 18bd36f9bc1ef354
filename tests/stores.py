"""Stores as the service opens them, with the outbox, and the dead letters of each stage."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from urllib.parse import urlsplit

from service.db import postgres, sqlite
from service.db.transaction import Lease
from service.events.deliveries import dead_letter_delivery
from service.events.outbox import flush
from service.events.replays import dead_letter_replay
from service.images.downloads import dead_letter_image
from service.queue.crashes import DeadLetter, Fault
from service.resources import new_id
from service.tasks.transitions import dead_letter_task
from tests.servers import postgres_database

open_sqlite = partial(sqlite.open_sqlite, flush=flush)
open_postgres = partial(postgres.open_postgres, flush=flush)


@contextmanager
def migrated_database(server: str) -> Iterator[str]:
    """The name of a database with the schema. A copy of it costs less than a migration."""

    async def migrate() -> None:
        async with open_postgres(url, process="template", new_id=new_id):
            pass

    with postgres_database(server) as url:
        asyncio.run(migrate())
        yield urlsplit(url).path[1:]


DEAD_LETTERS: dict[str, DeadLetter] = {
    **dict.fromkeys(("submit", "settle", "reconcile"), dead_letter_task),
    "download": dead_letter_image,
    **dict.fromkeys(("deliver", "redeliver"), dead_letter_delivery),
    "replay": dead_letter_replay,
}


def fault(lease: Lease, wait_ms: int) -> Fault:
    return Fault(lease, wait_ms, DEAD_LETTERS[lease.stage])


def candidate_of(stage: str) -> tuple[str, DeadLetter]:
    return stage, DEAD_LETTERS[stage]
