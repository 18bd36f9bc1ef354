"""FastAPI + Celery + Redis.

    uvicorn celery_peer:api
    celery --app celery_peer worker --pool prefork --concurrency 2

In full mode Redis syncs each command, a message is acknowledged after its task, and every task
looks in Redis whether it was done before. Jobs of a killed worker return after the visibility
timeout. A submission that was interrupted between request and record is sent again: nothing in
Celery can tell whether it was paid.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import calls
import redis
import work
from celery import Celery
from fastapi import FastAPI, HTTPException

VISIBILITY_S, LOCK_S, RUNNING = 10, 10, "running"

app = Celery("peer", broker=f"redis+socket://{work.REDIS}")
app.conf.update(
    task_ignore_result=True,
    worker_enable_remote_control=False,
    worker_prefetch_multiplier=1,
    broker_connection_retry_on_startup=True,
)
if work.FULL:
    app.conf.update(
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        broker_transport_options={"visibility_timeout": VISIBILITY_S},
    )
store = redis.Redis(unix_socket_path=work.REDIS)
api = FastAPI()
AGAIN: dict[str, Any] = {
    "autoretry_for": (Exception,),
    "max_retries": None,
    "retry_backoff": 1,
    "retry_backoff_max": 5,
}


@api.get("/health")
async def health() -> dict[str, str]:
    return work.ACCEPTED


@api.post("/tasks")
def create(order: work.Order) -> dict[str, str]:
    submit.delay(order.id, order.prompt)
    return work.ACCEPTED


@api.post("/callbacks/{task_id}/{token}")
def callback(task_id: str, token: str, body: work.Callback) -> dict[str, str]:
    if not work.token_valid(task_id, token):
        raise HTTPException(404)
    finish.delay(task_id, body.id)
    return work.ACCEPTED


class Busy(Exception):
    """Another process runs the same job."""


@contextmanager
def once(name: str) -> Iterator[dict[str, str]]:
    """Claims a job for as long as a lock lives. The block fills in its result. `done`: it is
    there already.
    """
    job: dict[str, str] = {}
    if not store.set(name, RUNNING, nx=True, ex=LOCK_S):
        job["done"] = (store.get(name) or b"").decode()
        if job["done"] in ("", RUNNING):
            raise Busy(name)
        yield job
        return
    try:
        yield job
    except Exception:
        store.delete(name)
        raise
    store.set(name, job["result"])


@app.task(**AGAIN)
def submit(task_id: str, prompt: str) -> None:
    with once(f"submit:{task_id}") as job:
        if "done" not in job:
            job["result"] = calls.submit(task_id, prompt)


@app.task(**AGAIN)
def finish(task_id: str, upstream_id: str) -> None:
    with once(f"finish:{task_id}") as job:
        if "done" not in job:
            calls.deliver(task_id, upstream_id, calls.fetch(task_id, upstream_id))
            job["result"] = upstream_id
