"""FastAPI + arq + Redis.

    uvicorn arq_peer:api
    arq arq_peer.WorkerSettings

arq runs a job of the same id once while it keeps the job's result, which is the deduplication. A
killed worker's jobs run again after `job_timeout` and 10 s. A submission that was interrupted
between request and record is sent again.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import work
from arq import Retry, create_pool
from arq.connections import RedisSettings
from fastapi import FastAPI, HTTPException

SETTINGS = RedisSettings(unix_socket_path=work.REDIS, conn_retries=1000, conn_retry_delay=0.1)
Context = dict[str, Any]


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.queue = await create_pool(SETTINGS)
    yield


api = FastAPI(lifespan=lifespan)


@api.get("/health")
async def health() -> dict[str, str]:
    return work.ACCEPTED


@api.post("/tasks")
async def create(order: work.Order) -> dict[str, str]:
    job = f"submit:{order.id}"
    await api.state.queue.enqueue_job("submit", order.id, order.prompt, _job_id=job)
    return work.ACCEPTED


@api.post("/callbacks/{task_id}/{token}")
async def callback(task_id: str, token: str, body: work.Callback) -> dict[str, str]:
    if not work.token_valid(task_id, token):
        raise HTTPException(404)
    await api.state.queue.enqueue_job("finish", task_id, body.id, _job_id=f"finish:{task_id}")
    return work.ACCEPTED


async def submit(context: Context, task_id: str, prompt: str) -> None:
    if await context["redis"].exists(f"upstream:{task_id}"):
        return
    try:
        url, body = f"{work.UPSTREAM}/v1/images/generations", work.submission(task_id, prompt)
        async with context["http"].post(url, json=body) as answer:
            upstream_id = (await answer.json())["id"]
    except (aiohttp.ClientError, TimeoutError) as problem:
        raise Retry(defer=min(context["job_try"], 5)) from problem
    await context["redis"].set(f"upstream:{task_id}", upstream_id)


async def finish(context: Context, task_id: str, upstream_id: str) -> None:
    http: aiohttp.ClientSession = context["http"]
    try:
        async with http.get(f"{work.UPSTREAM}/v1/tasks/{upstream_id}") as answer:
            task = await answer.json()
        if task["status"] not in work.ENDED:
            raise Retry(defer=1)
        checksums = []
        for link in task["results"]:
            async with http.get(link) as answer:
                content = await answer.read()
            checksums.append(await asyncio.to_thread(work.save, task_id, content))
        headers, sent = work.event(task_id, upstream_id, task["status"], checksums)
        async with http.post(work.RECEIVER, data=sent, headers=headers):
            pass
    except (aiohttp.ClientError, TimeoutError) as problem:
        raise Retry(defer=min(context["job_try"], 5)) from problem


async def start(context: Context) -> None:
    limit = aiohttp.ClientTimeout(total=work.TIMEOUT_S)
    context["http"] = aiohttp.ClientSession(
        raise_for_status=True, timeout=limit, headers=work.KEY, connector_owner=True
    )


class WorkerSettings:
    functions = (submit, finish)
    on_startup = start
    redis_settings = SETTINGS
    max_jobs = 16
    max_tries = 1000
    job_timeout = 10
    poll_delay = 0.01
    log_results = False
