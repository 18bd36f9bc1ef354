"""Callback to delivery: the time from the upstream's callback until a subscriber has the event, at
a steady rate of tasks. Tasks of three kinds take turns.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tests.bench.load import percentile
from tests.bench.processes import MEASURED, MEASURING, pinned, server
from tests.bench.program import markdown, spread
from tests.processes import ADMIN_KEY, service_settings
from tests.world import answering

END_S = 60.0
Interval = tuple[float, float]
# The rows, and the prompt and the faults of their tasks. `tests.bench.servers` has the pictures.
KINDS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "no picture: the task has failed": ("none", {"fail": "service_error"}),
    "a JPEG of 1024 × 1024 pixels and 100 KB": ("100 KB", {"format": "jpeg"}),
    "a JPEG of 1440 × 1440 pixels and 1 MB": ("1 MB", {"format": "jpeg"}),
}


class Subscriber:
    """Records the arrival of each task's terminal event in Unix seconds, and the task's kind, by
    the upstream's id. `all_there` is set once there are `count`.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.arrived: dict[str, tuple[float, str]] = {}
        self.all_there = asyncio.Event()

    async def take(self, request: Request) -> Response:
        now = time.time()
        data = (await request.json())["data"]
        self.arrived.setdefault(data["upstream_id"], (now, data["metadata"]["kind"]))
        if len(self.arrived) == self.count:
            self.all_there.set()
        return Response(status_code=204)


async def submit(service: httpx.AsyncClient, rate: float, count: int) -> None:
    """Submits `count` tasks at even intervals, without waiting for earlier answers."""
    kinds = list(KINDS.items())
    loop = asyncio.get_running_loop()
    started = loop.time()

    async def one(number: int) -> None:
        kind, (prompt, faults) = kinds[number % len(kinds)]
        body = {
            "model": "wan2.5-text-to-image",
            "prompt": prompt,
            "size": "1024x1024",
            "metadata": {"kind": kind},
            "sandbox": faults,
        }
        await asyncio.sleep(started + number / rate - loop.time())
        answer = await service.post(
            "/v1/images/generations", json=body, headers={"prefer": "respond-async"}
        )
        answer.raise_for_status()

    await asyncio.gather(*(one(number) for number in range(count)))


def covered(intervals: Sequence[Interval], start: float, end: float) -> float:
    """The time from `start` to `end` that at least one interval covers."""
    total = 0.0
    for first, last in sorted(intervals):
        until = min(last, end)
        total += max(0.0, until - max(first, start))
        start = max(start, until)
    return total


async def run(
    upstream: str, service: str, rate: float, first: int, count: int
) -> dict[str, list[tuple[float, float]]]:
    """For each task of a kind: the seconds from callback to delivery, and the part of them that the
    upstream spent on its query or its result. The `first` tasks warm up, then `count` are measured.
    """
    takes = Subscriber(first + count)
    async with AsyncExitStack() as stack:
        app = Starlette(routes=[Route("/", takes.take, methods=["POST"])])
        url = await stack.enter_async_context(answering(app))
        key = {"authorization": f"Bearer {ADMIN_KEY}"}
        client = await stack.enter_async_context(
            httpx.AsyncClient(base_url=service, headers=key, timeout=END_S)
        )
        endpoint = {"url": url, "types": ["image.task.completed", "image.task.failed"]}
        (await client.post("/v1/endpoints", json=endpoint)).raise_for_status()
        await submit(client, rate, first + count)
        async with asyncio.timeout(END_S):
            await takes.all_there.wait()
        sandbox = await stack.enter_async_context(
            httpx.AsyncClient(base_url=upstream, headers=key, timeout=END_S)
        )
        tasks = (await sandbox.get("/sandbox/tasks")).json()["data"]
        times: dict[str, Any] = (await sandbox.get("/bench/times")).json()
    figures: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for task in tasks[first:]:  # they are in the order of their submission
        called, (arrived, kind) = task["callbacks"][0]["at"], takes.arrived[task["id"]]
        theirs = covered([(a, b) for a, b in times.get(task["id"], ())], called, arrived)
        figures[kind].append((arrived - called, theirs))
    return figures


def delivery(folder: Path, rate: float, warm_up: float, seconds: float, rounds: int) -> str:
    """The table, in Markdown. Times are in seconds. Each round has a service of its own."""
    folder.mkdir()
    counts = round(rate * warm_up), round(rate * seconds)
    made = [once(folder / str(number), rate, *counts) for number in range(rounds)]
    head = [
        f"{rate:g} tasks a second for {seconds:g} s, in turns",
        "from the callback to the event's arrival, p50 ms",
        "p99 ms",
        "of it the upstream's own, p50 ms",
        "p99 ms",
        "beyond it, p50 ms",
        "p99 ms",
    ]
    rows = []
    for kind in KINDS:
        columns = zip(*(percentiles(figures[kind]) for figures in made), strict=True)
        rows.append([kind, *(spread([value * 1000 for value in each], ".1f") for each in columns)])
    return markdown(head, rows)


def percentiles(tasks: Sequence[tuple[float, float]]) -> list[float]:
    """p50 and p99 of the whole time, of the upstream's part, and of the rest."""
    columns = (
        [whole for whole, _ in tasks],
        [theirs for _, theirs in tasks],
        [whole - theirs for whole, theirs in tasks],
    )
    return [percentile(values, share) for values in columns for share in (0.5, 0.99)]


def once(folder: Path, rate: float, first: int, count: int) -> dict[str, list[tuple[float, float]]]:
    """One round: what `run` returns, of a new upstream and a new service."""
    folder.mkdir()
    with server("tests.bench.servers", "sandbox", folder=folder, cores=MEASURING) as upstream:
        settings = service_settings(upstream, folder)
        with (
            server("service", "serve", folder=folder, cores=MEASURED, **settings) as service,
            pinned(MEASURING),
        ):
            return asyncio.run(run(upstream, service, rate, first, count))
