"""Jobs that run every hour."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from service.errors import BlobUnavailable, StoreUnavailable
from service.resources import Resources

log = structlog.get_logger()

EVERY_S = 3600.0


async def hourly(
    resources: Resources, stage: str, job: Callable[[], Awaitable[object]], *, at_once: bool = False
) -> None:
    """Does a job until cancelled: within the first hour or `at_once`, then about every hour, so
    that processes don't all do it together.
    """
    wait = 0.0 if at_once else EVERY_S * resources.random()
    while True:
        await asyncio.sleep(wait)
        wait = EVERY_S * (0.9 + 0.2 * resources.random())
        try:
            await job()
        except Exception as error:  # the next one must come whatever became of this one
            known = {
                "stage": stage,
                "key": None,
                "attempt": 1,
                "wait_s": round(wait),
                "exception": repr(error),
            }
            unforeseen = None if isinstance(error, BlobUnavailable | StoreUnavailable) else error
            # a store that is away needs no traceback
            log.error("worker.failed", **known, exc_info=unforeseen)  # noqa: TRY400
            resources.metrics.worker_faults.labels(stage).inc()
