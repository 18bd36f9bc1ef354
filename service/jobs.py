"""The jobs of a process: its workers, and what runs beside them."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from functools import partial
from typing import Any

from service.events.broker_worker import BrokerWorker
from service.images.downloads import retry_refused
from service.images.sweep import sweep
from service.ops.metrics import Metrics
from service.queue.stage import log_failure
from service.queue.worker import WorkerPool
from service.resources import Resources
from service.settings import Settings
from service.tasks.upstream_check import UpstreamCheck
from service.upkeep.heartbeats import beat, forget_processes
from service.upkeep.rekey import rekey
from service.upkeep.retention import Retention
from service.upstreams.catalogue import DEFAULT_UPSTREAM
from service.web.context import Context

Job = Coroutine[Any, Any, None]

EVERY_S = 3600.0


async def repeated(
    stage: str,
    job: Callable[[], Awaitable[object]],
    random: Callable[[], float],
    metrics: Metrics,
    *,
    every_s: float,
    at_once: bool = False,
) -> None:
    """Runs a job until cancelled: first within `every_s` or `at_once`, then about every `every_s`.

    The random waits keep several processes from running it at the same moment. A run that fails
    is logged and counted, and the next one comes all the same.
    """
    wait = 0.0 if at_once else every_s * random()
    while True:
        await asyncio.sleep(wait)
        wait = every_s * (0.9 + 0.2 * random())
        try:
            await job()
        except Exception as error:  # noqa: BLE001 - logged, and tried again at the next run
            log_failure(stage, None, 1, round(wait), error)
            metrics.worker_faults.labels(stage).inc()


def repeated_jobs(settings: Settings, resources: Resources) -> dict[str, Job]:
    days = settings.retention_days, settings.image_retention_days, settings.audit_retention_days
    retention = Retention(resources, *days, resources.store.clock)
    jobs: dict[str, Callable[[], Awaitable[object]]] = {
        "sweep": partial(sweep, resources),
        "retention": retention.apply,
        "rekey": partial(rekey, resources),
        "refused": partial(resources.store.write, retry_refused, None),
        "processes": partial(resources.store.write, forget_processes, None),
    }
    at_once = ("rekey", "refused")  # the settings may have changed
    # Retention runs 24 times within a setting of less than a day.
    shortest = min(1.0, settings.file_retention_days, *(each for each in days if each is not None))
    every_s = {"retention": max(1.0, EVERY_S * shortest)}
    return {
        name: repeated(
            name,
            job,
            resources.random,
            resources.metrics,
            every_s=every_s.get(name, EVERY_S),
            at_once=name in at_once,
        )
        for name, job in jobs.items()
    }


def process_jobs(
    settings: Settings,
    context: Context,
    pool: WorkerPool,
    broker_workers: Mapping[str, BrokerWorker],
    role: str,
) -> dict[str, Job]:
    resources, breaker = context.resources, context.breaker
    workers = context.workers_alive is not None
    jobs: dict[str, Job] = {"workers": pool.run(), "account": breaker.run()}
    jobs |= {"tail": context.tail.run(), "pause": context.pause.run()}
    if settings.evolink_api_key:
        upstream = resources.upstreams[DEFAULT_UPSTREAM]
        upstream.on_refused = breaker.refused
        check = UpstreamCheck(resources, upstream, breaker)
        jobs |= {"upstream": check.run(), "announce": check.announce()}
    if workers:
        jobs["inbox"] = context.inbox.run()
        jobs |= repeated_jobs(settings, resources)
    jobs |= {f"publish {name}": each.run() for name, each in broker_workers.items()}
    if not settings.sqlite_path:  # on SQLite there is no other process
        jobs["beat"] = beat(resources.store, role, lambda: workers and pool.alive)
    return jobs
