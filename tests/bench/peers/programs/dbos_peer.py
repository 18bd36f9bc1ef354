"""FastAPI + DBOS in one process: `python dbos_peer.py`.

A workflow of the same id runs once, and a workflow that was interrupted goes on at its last
recorded step when the process starts again. A step that was interrupted runs again, so a submission
between request and record is sent again.

Orders pass a queue, so that a kill meets few of them. Callbacks start their workflows at once: a
queue was slower here. So was PostgreSQL with one process. SQLite writes ahead and syncs each
commit.
"""

import contextlib
import os
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import calls
import uvicorn
import work
from dbos import DBOS, SetWorkflowID
from fastapi import FastAPI, HTTPException

AGAIN: dict[str, Any] = {
    "retries_allowed": True,
    "max_attempts": 1000,
    "interval_seconds": 1,
    "backoff_rate": 1,
}

DATABASE = os.environ["PEER_DATABASE"]
with contextlib.closing(sqlite3.connect(DATABASE.removeprefix("sqlite:///"))) as file:
    file.execute("PRAGMA journal_mode=WAL")  # the file keeps it
DBOS(
    config={
        "name": "peer",
        "system_database_url": DATABASE,
        "application_version": "1",
        "executor_id": "peer",
        "log_level": "WARNING",
    }
)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    DBOS.launch()
    await DBOS.register_queue_async("orders", worker_concurrency=16, polling_interval_sec=0.05)
    yield


api = FastAPI(lifespan=lifespan)


@api.get("/health")
async def health() -> dict[str, str]:
    return work.ACCEPTED


@api.post("/tasks")
def create(order: work.Order) -> dict[str, str]:
    with SetWorkflowID(f"submit:{order.id}"):
        DBOS.enqueue_workflow("orders", submit, order.id, order.prompt)
    return work.ACCEPTED


@api.post("/callbacks/{task_id}/{token}")
def callback(task_id: str, token: str, body: work.Callback) -> dict[str, str]:
    if not work.token_valid(task_id, token):
        raise HTTPException(404)
    with SetWorkflowID(f"finish:{task_id}"):
        DBOS.start_workflow(finish, task_id, body.id)
    return work.ACCEPTED


@DBOS.workflow()
def submit(task_id: str, prompt: str) -> None:
    pay(task_id, prompt)


@DBOS.workflow()
def finish(task_id: str, upstream_id: str) -> None:
    deliver(task_id, upstream_id, fetch(task_id, upstream_id))


pay = DBOS.step(**AGAIN)(calls.submit)
fetch = DBOS.step(**AGAIN)(calls.fetch)
deliver = DBOS.step(**AGAIN)(calls.deliver)

if __name__ == "__main__":
    uvicorn.run(api, port=int(os.environ["PEER_PORT"]), log_level="warning", access_log=False)
