"""Measures what silent endpoints cost the deliveries of another owner: `python -m
tests.bench.silent_endpoints`.

Two services emit one event after the other to one subscriber, in turns. One of them also has a
thousand endpoints of other owners that accept a connection and never answer.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.responses import Response

from service.backends import DELIVERIES
from service.db.batching import BatchingStore
from service.events.endpoints import NewEndpointRow, insert_endpoints
from service.ops import logging
from tests.bench.load import percentile
from tests.bench.program import compared, markdown, run
from tests.outbox import emitted
from tests.silence import silence
from tests.waiting import wait_until
from tests.world import Received, World, subscriber, world

SILENT, EVENTS, MEASURED, QUICK = 1000, 3, 50, 5


async def subscribe(here: World, owner: str, url: str, count: int) -> None:
    resources = here.context.resources
    secret = resources.keyring.encrypt("whsec_" + "QUJD" * 8)
    rows = [
        NewEndpointRow(resources.id("endpoint"), owner, url, ("*",), "", secret, most=SILENT)
        for _ in range(count)
    ]
    assert all(
        await asyncio.gather(*(resources.store.write(insert_endpoints, row) for row in rows))
    )


class Arrivals:
    """When the subscriber got each event."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}
        self.seen = asyncio.Event()

    def answer(self, _: int, request: Received) -> Response:
        self.times[request.headers["webhook-id"]] = time.perf_counter()
        self.seen.set()
        return Response(status_code=204)


class Timed:
    """Times from an event of one owner to its arrival."""

    def __init__(self, here: World, owner: str, arrivals: Arrivals) -> None:
        self._store: BatchingStore = here.context.resources.store
        self._owner = owner
        self._arrivals = arrivals

    async def p99(self, count: int = MEASURED) -> float:
        times = []
        for _ in range(count):
            began = time.perf_counter()
            (event,) = await emitted(self._store, 1, owner=self._owner)
            async with asyncio.timeout(30):
                while event not in self._arrivals.times:
                    self._arrivals.seen.clear()
                    await self._arrivals.seen.wait()
            times.append(self._arrivals.times[event] - began)
        return percentile(times, 0.99)


@asynccontextmanager
async def silenced(
    folder: Path, attackers: int, count: int = MEASURED
) -> AsyncIterator[tuple[Timed, Timed, set[Any]]]:
    """A calm owner's events in a service without silent endpoints and in one whose `attackers`
    share a thousand, and the connections of these that are open. `count` events warm up each.
    """
    async with AsyncExitStack() as stack:
        shop = await stack.enter_async_context(subscriber())
        silent, held = await stack.enter_async_context(silence())
        calm, here = [
            await stack.enter_async_context(world(folder / name, delivery_timeout_s=60))
            for name in ("calm", "attacked")
        ]
        arrivals = Arrivals()
        shop.answer = arrivals.answer
        for each in (calm, here):
            await subscribe(each, "victim", f"{shop.url}/", 1)
        for number in range(attackers):
            await subscribe(here, f"attacker-{number}", silent, SILENT // attackers)
            await emitted(here.context.resources.store, EVENTS, owner=f"attacker-{number}")
        await wait_until(lambda: len(held) >= DELIVERIES // 5)
        timed = [Timed(each, "victim", arrivals) for each in (calm, here)]
        for one in timed:
            await one.p99(count)  # the first requests open connections
        yield timed[0], timed[1], held


async def measured(folder: Path, attackers: int, rounds: int, count: int) -> list[str]:
    """A row of the table, in milliseconds, from so many events of each side in each round."""
    async with silenced(folder, attackers, count) as (calm, attacked, _):
        times = [
            (await attacked.p99(count) * 1000, await calm.p99(count) * 1000) for _ in range(rounds)
        ]
    return [f"{SILENT} silent endpoints of {attackers} owners", *compared(times)]


def silent_endpoints(folder: Path, rounds: int, quick: bool) -> str:
    logging.configure("json", "error")
    counts = (10,) if quick else (1, 10)
    rows = [
        asyncio.run(measured(folder / str(count), count, rounds, QUICK if quick else MEASURED))
        for count in counts
    ]
    head = ("p99 from event to arrival, ms", "beside them", "without them", "factor")
    return markdown(head, rows)


if __name__ == "__main__":
    run("python -m tests.bench.silent_endpoints", "silent-endpoints", silent_endpoints)
