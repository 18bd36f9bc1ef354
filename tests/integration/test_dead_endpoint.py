"""One dead endpoint does not delay a hundred healthy ones. The test checks the mechanism without
timing.
"""

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.queue.limiter import FIRST, EndpointLimiter
from tests.api import got
from tests.outbox import emitted
from tests.waiting import wait_until
from tests.world import answering, world

pytestmark = pytest.mark.slow

PENDING, OTHERS, EVENTS = 200, 99, 3


async def test_a_dead_endpoint_takes_no_place_from_ninety_nine_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dead endpoint never answers and has 200 pending events. It holds its first few slots and
    is looked at rarely, and every other endpoint gets its events.
    """
    hanging, most, arrived, released = 0, 0, Counter[str](), asyncio.Event()
    looks, acquire = Counter[str](), EndpointLimiter.acquire

    def counted(limiter: EndpointLimiter, subscriber: str, *, first: bool) -> float | None:
        looks[subscriber] += 1
        return acquire(limiter, subscriber, first=first)

    async def take(request: Request) -> Response:
        nonlocal hanging, most
        if request.path_params["name"] != "dead":
            arrived[request.path_params["name"]] += 1
            return Response(status_code=204)
        hanging += 1
        most = max(most, hanging)
        await released.wait()
        return Response(status_code=204)

    monkeypatch.setattr(EndpointLimiter, "acquire", counted)
    app = Starlette(routes=[Route("/{name}", take, methods=["POST"])])
    async with answering(app) as url, world(tmp_path, delivery_timeout_s=60) as here:
        store = here.context.resources.store

        async def subscribe(name: str, type: str) -> str:
            endpoint: str = got(
                await here.client.post(
                    "/v1/endpoints", json={"url": f"{url}/{name}", "types": [type]}
                ),
                201,
            )["id"]
            return endpoint

        dead = await subscribe("dead", "image.at_risk")
        for number in range(OTHERS):
            await subscribe(f"s{number}", "task.parked")
        await emitted(store, PENDING, "image.at_risk")
        await wait_until(lambda: looks[dead] >= PENDING)
        for _ in range(EVENTS):
            await emitted(store, 1, "task.parked")
        await wait_until(lambda: arrived.total() == OTHERS * EVENTS, 60)
        assert set(arrived.values()) == {EVENTS}
        await wait_until(lambda: hanging >= FIRST)
        assert hanging == most == FIRST
        assert looks[dead] <= PENDING * 10

        async def waiting() -> list[Any]:
            return [
                got(
                    await here.client.get(
                        "/v1/deliveries", params={"endpoint": dead, "state": "pending"}
                    )
                )["data"]
            ]

        assert len((await waiting())[0]) == 100  # one page
        released.set()
