"""The stages of the worker pool and their slots."""

from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import structlog

from service.db.transaction import Lease
from service.errors import BlobUnavailable, StoreUnavailable
from service.fair_slots import has_share
from service.queue.crashes import DeadLetter
from service.queue.leases import REST, Rows

log = structlog.get_logger()

# What the log names the key of a row.
KEYS = {
    **dict.fromkeys(("submit", "settle", "reconcile"), "task_id"),
    "download": "image_id",
    **dict.fromkeys(("deliver", "redeliver"), "delivery_id"),
    "replay": "replay_id",
}
# The operator's remedy for a row that left the queue of a stage for good.
QUERY = "mend the cause, then POST /v1/tasks/{task_id}/reconcile asks the upstream again"
RETRY = "mend the cause, then POST /v1/deliveries/{delivery_id}/retry sends it again"
ADVICE = {
    "submit": "look for the task at the upstream: if it is there, give its id to"
    " POST /v1/tasks/{task_id}/resolve; otherwise submit again",
    "settle": QUERY,
    "reconcile": QUERY,
    "download": "mend the cause, then POST /v1/tasks/{task_id}/reconcile downloads it again",
    "deliver": RETRY,
    "redeliver": RETRY,
    "replay": "mend the cause, then start the replay again",
}


@dataclass(slots=True)
class Stage:
    """One kind of work: `run` works under a lease and records the outcome. `shared`: owners take
    its slots in fair shares. `rows` reads what the leases of a claim need, where a job may work on
    a row of a quarter of a second ago.
    """

    name: str
    slots: int
    run: Callable[[Lease], Awaitable[None]]
    dead_letter: DeadLetter
    shared: bool = False
    rows: Rows | None = None
    free: int = field(init=False)
    used: Counter[str] = field(default_factory=Counter)  # slots, by owner

    def __post_init__(self) -> None:
        self.free = self.slots

    def release(self, owner: str) -> bool:
        """Frees a slot. True: the owner's share was used up, so claims passed over its rows."""
        full = self.shared and not has_share(self.used[owner], self.slots - self.used.total(), REST)
        self.free += 1
        self.used[owner] -= 1
        if not self.used[owner]:
            del self.used[owner]
        return full


def log_parked(stage: str, key: str, cause: str, error: Exception | None = None) -> None:
    last = {} if error is None else {"exception": f"{type(error).__name__}: {error}"}
    log.error("task.parked", stage=stage, key=key, cause=cause, advice=ADVICE[stage], **last)


def log_failure(
    stage: str, key: str | None, attempt: int | None, wait_s: float | None, error: Exception
) -> None:
    """Logs a failed run. An outage of a store needs no traceback."""
    outage = isinstance(error, BlobUnavailable | StoreUnavailable)
    log.error(
        "worker.failed",
        stage=stage,
        key=key,
        attempt=attempt,
        wait_s=wait_s,
        exception=f"{type(error).__name__}: {error}",
        exc_info=None if outage else error,
    )
