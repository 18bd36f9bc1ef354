"""Attacks of one owner or of a stranger, each as a block during which it goes on, and the service
under attack, which gets callbacks. For a comparison a calm service gets callbacks in turns with it.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tests.api import SUBMIT, got, refused, submitted
from tests.attack.target import (
    BAD_HOSTS,
    PAGES,
    POLL,
    READERS,
    STALLED,
    Pulse,
    Target,
    pulse,
    stored_image,
    target,
)
from tests.silence import silence
from tests.waiting import wait_until

ENDPOINTS = 100


@asynccontextmanager
async def attacked(folder: Path) -> AsyncIterator[Target]:
    """The service under attack, with tasks whose list is long and a large image."""
    async with target(folder) as under:
        notes = [f"{number}" + "x" * 900_000 for number in range(10)]
        await asyncio.gather(*(submitted(under.attacker, note=note) for note in notes))
        under.image = await stored_image(under)
        yield under


@asynccontextmanager
async def attacked_and_calm(folder: Path) -> AsyncIterator[tuple[Target, Pulse]]:
    """The service under attack, and callbacks to it and to a calm service."""
    folders = folder / "attacked", folder / "calm"
    for each in folders:
        each.mkdir()
    async with (
        attacked(folders[0]) as under,
        target(folders[1]) as calm,
        pulse(under, calm) as measured,
    ):
        yield under, measured


@asynccontextmanager
async def silent_endpoints(under: Target) -> AsyncIterator[None]:
    """As many as an owner may have, and one event for all of them."""
    async with silence() as (url, held):
        create = partial(under.attacker.post, "/v1/endpoints", json={"url": url})
        made = [got(await create(), 201) for _ in range(ENDPOINTS)]
        error = refused(await create(), 422)
        assert str(ENDPOINTS) in error["message"]
        task = await submitted(under.attacker)
        got(await under.attacker.post(f"/v1/tasks/{task['id']}/cancel"))
        await wait_until(lambda: len(held) >= 10)
        try:
            yield
        finally:
            for each in made:
                await under.attacker.delete(f"/v1/endpoints/{each['id']}")


def documents(under: Target) -> AbstractAsyncContextManager[None]:
    paths = ("/openapi.json", "/asyncapi.json")
    return under.flood(150, *(under.head(under.stranger, f"GET {path}") for path in paths))


def large_pages(under: Target) -> AbstractAsyncContextManager[None]:
    return under.flood(READERS, *(under.head(under.attacker, f"GET {path}") for path in PAGES))


def bad_hosts(under: Target) -> AbstractAsyncContextManager[None]:
    requests = []
    for host in BAD_HOSTS:
        body = json.dumps({"url": f"https://{host}/"}).encode()
        length = f"content-length: {len(body)}"
        requests.append(under.head(under.attacker, "POST /v1/endpoints", length) + body)
    return under.flood(READERS, *requests)


def slow_bodies(under: Target) -> AbstractAsyncContextManager[Any]:
    head = under.head(under.attacker, f"POST {SUBMIT}", "content-length: 9000")
    return under.connections(500, head + b"{")


@asynccontextmanager
async def abandoned_polls(under: Target) -> AsyncIterator[None]:
    """Sent and left, over and over."""
    begun = asyncio.Event()

    async def again() -> None:
        while True:
            async with under.connections(400, under.head(under.attacker, POLL)):
                begun.set()

    leaving = asyncio.create_task(again())
    try:
        await begun.wait()
        yield
    finally:
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)


def made_up_keys(under: Target) -> AbstractAsyncContextManager[None]:
    keys = (f"authorization: Bearer dk_{number}" for number in range(150))
    return under.flood(150, *(under.head(under.stranger, "GET /v1/tasks", key) for key in keys))


def polls(under: Target) -> AbstractAsyncContextManager[Any]:
    return under.connections(500, under.head(under.attacker, POLL))


def streams(under: Target) -> AbstractAsyncContextManager[Any]:
    lines = "GET /v1/events?after=99999", "accept: text/event-stream"
    return under.connections(500, under.head(under.attacker, *lines))


def stalled_readers(under: Target) -> AbstractAsyncContextManager[Any]:
    return under.connections(STALLED, under.head(under.stranger, f"GET {under.image}"))


def pipelines(under: Target) -> AbstractAsyncContextManager[Any]:
    """Thousands of requests on each of a few connections, of which no answer is waited for."""
    return under.connections(20, under.head(under.stranger, "GET /healthz") * 5000)


ATTACKS: dict[str, Callable[[Target], AbstractAsyncContextManager[Any]]] = {
    "silent endpoints": silent_endpoints,
    "documents": documents,
    "large pages": large_pages,
    "bad hosts": bad_hosts,
    "made-up keys": made_up_keys,
    "slow bodies": slow_bodies,
    "abandoned polls": abandoned_polls,
    "polls": polls,
    "streams": streams,
    "stalled readers": stalled_readers,
    "pipelines": pipelines,
}
