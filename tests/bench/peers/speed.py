"""How many tasks a second each contender takes from their callbacks to the delivery of their
events, at which cost, and how long one takes at a steady rate.
"""

import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import standardwebhooks

from tests.bench.load import percentile
from tests.bench.peers.contenders import Contender, Running, running
from tests.bench.peers.upstream import document
from tests.bench.processes import MEASURING, measure, server
from tests.bench.program import spread
from tests.waiting import wait_until

CONNECTIONS, ORDERS_AT_ONCE, PATIENCE_S = 32, 16, 120.0
JSON = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Scale:
    """`steady` callbacks come at `rate` a second, then `tasks` as fast as they are acknowledged.
    Each task has a picture, or has failed.
    """

    tasks: int
    steady: int
    rate: float = 10
    pictured: bool = True


@dataclass(frozen=True, slots=True)
class Result:
    """Tasks a second, seconds of CPU for a task, and the seconds of each steady task. `server_cpu`
    is that of a database server that the contender does not start.
    """

    rate: float
    cpu: float
    server_cpu: float
    waits: Sequence[float]


async def ordered(here: Running, client: httpx.AsyncClient, count: int) -> None:
    places = asyncio.Semaphore(ORDERS_AT_ONCE)

    async def one(number: int) -> None:
        async with places:
            await wait_until(lambda: here.order(client, f"{number:05}"), PATIENCE_S)

    await asyncio.gather(*(one(number) for number in range(count)))


async def arrived(client: httpx.AsyncClient, kind: str, count: int) -> None:
    async def there() -> bool:
        return bool((await client.get("/bench/counts")).json()[kind] >= count)

    await wait_until(there, PATIENCE_S)


async def submitted(here: Running, client: httpx.AsyncClient, count: int) -> dict[str, str]:
    """Submits `count` orders. Returns the upstream's id of each task by its callback's URL."""
    await ordered(here, client, count)
    await arrived(client, "orders", count)
    orders = (await client.get("/bench/seen")).json()["orders"]
    return {url: id for made in orders.values() for id, url, _ in made}


def burst(here: Running, folder: Path, calls: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Sends these callbacks as fast as they are acknowledged. Returns what the load says."""
    requests = folder / "requests"
    lines = [json.dumps({"path": url.removeprefix(here.url), "body": body}) for url, body in calls]
    requests.write_text("\n".join(lines))
    return measure(here.url, requests, "once", CONNECTIONS, 0, PATIENCE_S)


async def steadily(
    client: httpx.AsyncClient, calls: Sequence[tuple[str, str]], rate: float
) -> dict[str, float]:
    """Sends these callbacks at even intervals. Returns when each was sent, by its URL."""
    sent, start = {}, time.monotonic()

    async def one(number: int, url: str, body: str) -> None:
        await asyncio.sleep(start + number / rate - time.monotonic())
        sent[url] = time.monotonic()
        answer = await client.post(url, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 200, answer.text

    await asyncio.gather(*(one(number, *call) for number, call in enumerate(calls)))
    return sent


async def one_run(
    here: Running, upstream: str, folder: Path, scale: Scale, server_cpu: Callable[[], float]
) -> Result:
    count = scale.steady + scale.tasks
    async with httpx.AsyncClient(base_url=upstream, timeout=60, trust_env=False) as client:
        ids = await submitted(here, client, count)
        calls = [(url, called(id, upstream, scale.pictured)) for url, id in ids.items()]
        sent = await steadily(client, calls[: scale.steady], scale.rate)
        await arrived(client, "events", scale.steady)
        cpu, theirs = here.cpu(), server_cpu()
        load = await asyncio.to_thread(burst, here, folder, calls[scale.steady :])
        await arrived(client, "events", count)
        cpu, theirs = here.cpu() - cpu, server_cpu() - theirs
        expected = []
        if scale.pictured:
            picture = (await client.get("/bench/picture")).content
            expected = [hashlib.sha256(picture).hexdigest()]
        events = (await client.get("/bench/seen")).json()["events"]
    times = checked(here, events, expected)
    assert times.keys() == set(ids.values()), "an event is missing"
    return Result(
        scale.tasks / (max(times.values()) - load["started"]),
        cpu / scale.tasks,
        theirs / scale.tasks,
        [times[ids[url]] - at for url, at in sent.items()],
    )


def called(id: str, upstream: str, pictured: bool = True) -> str:
    return json.dumps(document(id, f"{upstream}/", pictured))


def checked(here: Running, events: Sequence[Any], checksums: Sequence[str]) -> dict[str, float]:
    """When the first event of each task arrived, by the upstream's id. Every event has to have a
    right signature, the right type, and the right checksums where the contender computes them.
    """
    receiver, times = standardwebhooks.Webhook(here.secret), dict[str, float]()
    for at, headers, body in events:
        receiver.verify(body, headers)
        made = json.loads(body)
        data = made["data"]
        assert made["type"] == f"image.task.{'completed' if checksums else 'failed'}"
        if here.contender.full:
            assert [image["sha256"] for image in data["images"]] == checksums
        times.setdefault(data["upstream_id"], at)
    return times


def round_of(
    contender: Contender,
    folder: Path,
    scale: Scale,
    workers: int = 0,
    server_cpu: Callable[[], float] = float,
    **settings: str,
) -> Result:
    """`server_cpu` tells the seconds of CPU of a database server so far."""
    folder.mkdir()
    upstream = ("tests.bench.peers.upstream", "held", "0", *([] if scale.pictured else ["none"]))
    with (
        server(*upstream, folder=folder, cores=MEASURING) as address,
        running(contender, folder, address, workers, **settings) as here,
    ):
        return asyncio.run(one_run(here, address, folder, scale, server_cpu))


def table(results: dict[Contender, list[Result]], scale: Scale) -> str:
    calls = f"{scale.tasks} callbacks{'' if scale.pictured else ' of failed tasks'}"
    head = (
        f"| {calls} over {CONNECTIONS} connections, and {scale.steady} at {scale.rate:g} a second"
        " for p50 and p99 | tasks a second | CPU a task, ms | p50 ms | p99 ms | does not promise |"
    )
    lines = [head, "|---|---|---|---|---|---|"]
    for contender, rounds in results.items():
        figures = [
            spread([run.rate for run in rounds], ".0f"),
            spread([run.cpu * 1000 for run in rounds], ".1f"),
            spread([percentile(run.waits, 0.5) * 1000 for run in rounds], ".0f"),
            spread([percentile(run.waits, 0.99) * 1000 for run in rounds], ".0f"),
        ]
        lines.append(f"| {contender.name} | {' | '.join(figures)} | {contender.lacks} |")
    return "\n".join(lines)
