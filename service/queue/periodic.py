"""Jobs that each process with workers runs about every hour."""

import asyncio
from collections.abc import Awaitable, Callable

from service.ops.metrics import Metrics
from service.queue.stage import log_failure

EVERY_S = 3600.0


async def hourly(
    stage: str,
    job: Callable[[], Awaitable[object]],
    random: Callable[[], float],
    metrics: Metrics,
    *,
    at_once: bool = False,
) -> None:
    """Runs a job until cancelled: first within an hour or `at_once`, then about every hour.

    The random waits keep several processes from running it at the same moment. A run that fails
    is logged and counted, and the next one comes all the same.
    """
    wait = 0.0 if at_once else EVERY_S * random()
    while True:
        await asyncio.sleep(wait)
        wait = EVERY_S * (0.9 + 0.2 * random())
        try:
            await job()
        except Exception as error:  # noqa: BLE001 - logged, and tried again in an hour
            log_failure(stage, None, 1, round(wait), error)
            metrics.worker_faults.labels(stage).inc()
