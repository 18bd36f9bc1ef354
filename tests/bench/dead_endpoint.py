"""Measures what one dead endpoint among a hundred costs the other ninety-nine: `python -m
tests.bench.dead_endpoint`.

A hundred owners submit tasks that fail at once. The last owner submits as many as ten other owners.
Each owner has an endpoint. With `dead`, the last owner's endpoint accepts connections and never
answers. Without it, that owner has no endpoint. The rounds alternate, each with processes and a
store of its own.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.web.server import Server, bind, listening
from tests.bench.acknowledgement import spread
from tests.bench.load import percentile
from tests.bench.processes import MEASURED, MEASURING, pinned, server
from tests.environment import ROOT
from tests.processes import ADMIN_KEY, service_settings

# the number of other endpoints, and how many times more events the last one has
OTHERS, SHARE = 99, 10
END_S = 60.0
BODY = {
    "model": "wan2.5-text-to-image",
    "prompt": "a lighthouse",
    "size": "768x768",
    "sandbox": {"fail": "service_error", "delay": 0},
}


@dataclass(frozen=True, slots=True)
class Scale:
    rounds: int
    rate: float  # tasks a second
    seconds: float


FULL, QUICK = Scale(5, 20, 20), Scale(1, 20, 1)


class Subscribers:
    """Measures the time from each event of the ninety-nine owners to its arrival. `over` is set
    when all expected events have come. Until then the dead endpoint hangs.
    """

    def __init__(self, expected: int) -> None:
        self.expected = expected
        self.took: list[float] = []
        self.over = asyncio.Event()

    async def take(self, request: Request) -> Response:
        now = time.time()
        event = await request.json()
        if request.path_params["number"] < OTHERS:
            self.took.append(now - datetime.fromisoformat(event["time"]).timestamp())
            if len(self.took) == self.expected:
                self.over.set()
        else:
            await self.over.wait()
        return Response(status_code=204)


async def owners(service: httpx.AsyncClient, url: str, *, dead: bool) -> list[dict[str, str]]:
    """A hundred owners, each with an endpoint. The last one has an endpoint only if it is to be
    `dead`. Returns the headers with their keys.
    """
    keys = []
    for number in range(OTHERS + 1):
        made = await service.post(
            "/v1/keys", json={"owner": f"owner-{number}", "scopes": ["submit", "subscribe"]}
        )
        made.raise_for_status()
        keys.append({"authorization": f"Bearer {made.json()['key']}"})
        endpoint = {"url": f"{url}/{number}", "types": ["image.task.failed"]}
        if number < OTHERS or dead:
            (
                await service.post("/v1/endpoints", json=endpoint, headers=keys[-1])
            ).raise_for_status()
    return keys


def turns(count: int) -> list[int]:
    """The owner of each of `count` tasks. The last owner gets as many as `SHARE` others."""
    return [min(OTHERS, number % (OTHERS + SHARE)) for number in range(0, count * SHARE, SHARE)]


async def run(service_url: str, scale: Scale, *, dead: bool) -> list[float]:
    """Seconds from each event of the ninety-nine owners to its arrival."""
    whose = turns(round(scale.rate * scale.seconds))
    subscribers = Subscribers(sum(owner < OTHERS for owner in whose))
    async with AsyncExitStack() as stack:
        bound = bind("127.0.0.1", 0)
        app = Starlette(routes=[Route("/{number:int}", subscribers.take, methods=["POST"])])
        await stack.enter_async_context(listening(Server(app, bound, 0), asyncio.Event()))
        admin = {"authorization": f"Bearer {ADMIN_KEY}"}
        client = await stack.enter_async_context(
            httpx.AsyncClient(base_url=service_url, headers=admin, timeout=END_S)
        )
        keys = await owners(client, f"http://127.0.0.1:{bound.getsockname()[1]}", dead=dead)
        loop = asyncio.get_running_loop()
        started = loop.time()

        async def submit(number: int) -> None:
            await asyncio.sleep(started + number / scale.rate - loop.time())
            headers = {"prefer": "respond-async", **keys[whose[number]]}
            (
                await client.post("/v1/images/generations", json=BODY, headers=headers)
            ).raise_for_status()

        await asyncio.gather(*(submit(number) for number in range(len(whose))))
        async with asyncio.timeout(END_S):
            await subscribers.over.wait()
    return subscribers.took


def round_of(folder: Path, scale: Scale, *, dead: bool) -> list[float]:
    folder.mkdir()
    with server("tests.bench.servers", "sandbox", folder=folder, cores=MEASURING) as upstream:
        settings = service_settings(upstream, folder, EVOLINK_CONCURRENCY="64")
        with (
            server("service", "serve", folder=folder, cores=MEASURED, **settings) as service,
            pinned(MEASURING),
        ):
            return asyncio.run(run(service, scale, dead=dead))


def row(about: str, rounds: Sequence[Sequence[float]]) -> str:
    p50, p99 = ([percentile(list(took), share) * 1000 for took in rounds] for share in (0.5, 0.99))
    return f"| {about} | {spread(p50, '.0f')} | {spread(p99, '.0f')} |"


def dead_endpoint(folder: Path, scale: Scale) -> str:
    """The table, in Markdown."""
    folder.mkdir()
    rounds: dict[bool, list[list[float]]] = {False: [], True: []}
    for number in range(scale.rounds):
        for dead in (False, True) if number % 2 == 0 else (True, False):
            rounds[dead].append(round_of(folder / f"{number}-{dead}", scale, dead=dead))
    p99 = {
        dead: statistics.median(percentile(took, 0.99) for took in rounds[dead]) for dead in rounds
    }
    head = (
        f"from an event to its arrival at {OTHERS} endpoints, {scale.rate:g} tasks a second for"
        f" {scale.seconds:g} s"
    )
    lines = [
        f"| {head} | p50 ms | p99 ms |",
        "|---|---|---|",
        row("without a dead one", rounds[False]),
        row("beside one that never answers", rounds[True]),
    ]
    return (
        "\n".join(lines)
        + f"\n\np99 with the dead one: {(p99[True] / p99[False] - 1) * 100:+.0f} %."
    )


def main() -> None:
    options = argparse.ArgumentParser(
        prog="python -m tests.bench.dead_endpoint", description="Measure, and print a table."
    )
    options.add_argument(
        "--quick", action="store_true", help="only to see that it runs: its figures mean nothing"
    )
    options.add_argument(
        "--folder", type=Path, default=ROOT, help="on which disk (default: the checkout's)"
    )
    asked = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="data-bench-", dir=asked.folder) as name:
        print(dead_endpoint(Path(name) / "dead", QUICK if asked.quick else FULL))


if __name__ == "__main__":
    main()
