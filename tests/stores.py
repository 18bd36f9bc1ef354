"""Stores as the service opens them, with the outbox, and the dead letters of each stage."""

from functools import partial

from service.db import postgres, sqlite
from service.db.transaction import Lease
from service.events.deliveries import dead_letter_delivery
from service.events.outbox import flush
from service.events.replays import dead_letter_replay
from service.images.downloads import dead_letter_image
from service.queue.crashes import DeadLetter, Fault
from service.tasks.transitions import dead_letter_task

open_sqlite = partial(sqlite.open_sqlite, flush=flush)
open_postgres = partial(postgres.open_postgres, flush=flush)

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
