"""Measures how many webhooks a second `darkroom serve` delivers to 1, 10 and 100 endpoints:
`python -m tests.bench.deliveries`. Beside it runs a bare loop of aiohttp (`tests.bench.posts`).

The store has all events before the service starts. Each endpoint has an owner of its own, and one
receiver stands behind all of them. The time goes from the first arrival to the last.
"""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import Connection, select

from service.backends import DELIVERIES
from service.db.clock import wall_clock
from service.db.tables import endpoints, events
from service.db.transaction import Transaction
from service.events.documents import event_document
from service.events.endpoints import NewEndpointRow, insert_endpoints
from service.links import Links
from service.queue.limiter import MOST
from service.resources import new_id
from service.signing import Keyring, new_secret
from service.strict_json import compact_json
from service.tasks.accept import insert_tasks
from service.tasks.rows import ImageRow, TaskRow
from service.tasks.state import State
from service.tasks.transitions import end
from tests.bench.acknowledgement import SECRET_KEY, waiting
from tests.bench.processes import MEASURED, MEASURING, RUN_S, pinned, server
from tests.bench.program import run, spread
from tests.environment import ROOT, clean_environment
from tests.processes import ADMIN_KEY, service_settings
from tests.stores import open_sqlite
from tests.waiting import wait_until

TYPE, BASE_URL, ENDPOINTS = "image.task.completed", "http://127.0.0.1:8080", (1, 10, 100)
AT_ONCE = {count: min(int(MOST) * count, DELIVERIES) for count in ENDPOINTS}
Run = tuple[float, float]  # deliveries a second, and the receiver's share of its core meanwhile


def completed(tx: Transaction, items: Sequence[TaskRow]) -> list[None]:
    """Inserts tasks and ends them. Each event names one image."""
    insert_tasks(tx, items)
    for task in items:
        image = ImageRow(tx.id("image"), task.id, task.owner, 0, "stored", True, "", tx.now)
        image.media_type, image.sha256, image.bytes = "image/jpeg", "0" * 64, 100_000
        image.width, image.height = 1024, 1024
        end(tx, task, State.COMPLETED, images=[image])
    return [None] * len(items)


def requests_of(connection: Connection) -> list[dict[str, str]]:
    """The requests that the store's deliveries cause, without signatures."""
    found = select(events, endpoints.c.url).join(endpoints, endpoints.c.owner == events.c.owner)
    rows = connection.execute(found.where(events.c.type == TYPE)).mappings()
    bodies = ((row, compact_json(event_document(row, Links(BASE_URL)))) for row in rows)
    return [{"url": row["url"], "id": row["id"], "body": body} for row, body in bodies]


async def prepare(folder: Path, receiver: str, count: int, total: int) -> None:
    """Prepares `template`, a store with `total` deliveries to `count` endpoints, and `requests`
    with a line for each of them.
    """
    secret = Keyring([SECRET_KEY.encode()]).encrypt(new_secret(os.urandom(32)))
    path = folder / "template" / "darkroom.db"
    async with open_sqlite(path, process="bench", new_id=new_id) as store:
        for number in range(count):
            id, owner, url = new_id("endpoint", wall_clock()), f"owner-{number}", f"/{number}"
            row = NewEndpointRow(id, owner, receiver + url, (TYPE,), "", secret)
            await store.write(insert_endpoints, row)
        tasks = [
            replace(
                waiting(new_id("task", wall_clock())),
                owner=f"owner-{number % count}",
                state=State.STORING,
                upstream_id=f"upstream-{number}",
            )
            for number in range(total)
        ]
        await asyncio.gather(*(store.write(completed, task, urgent=True) for task in tasks))
        requests = await store.read(requests_of)
    (folder / "requests").write_text("".join(json.dumps(each) + "\n" for each in requests))


async def arrivals(receiver: str, count: int, service: str | None) -> list[Any]:
    """What the receiver got (see `tests.bench.servers`), after the service has recorded all."""
    key = {"authorization": f"Bearer {ADMIN_KEY}"}
    async with httpx.AsyncClient(headers=key, timeout=RUN_S, trust_env=False) as client:

        async def there() -> bool:
            return bool((await client.get(f"{receiver}/bench/count")).json() >= count)

        async def recorded() -> bool:
            page = await client.get(f"{service}/v1/deliveries?state=pending&limit=1")
            return not page.raise_for_status().json()["data"]

        await wait_until(there, RUN_S)
        if service is not None:
            await wait_until(recorded, RUN_S)
        return list((await client.delete(f"{receiver}/bench/seen")).json())


def measured(folder: Path, receiver: str, at_once: int, *, bare: bool) -> Run:
    """One run. It exits unless each body has come once to its endpoint."""
    lines = [json.loads(line) for line in (folder / "requests").read_text().splitlines()]
    if bare:
        command = [sys.executable, "-m", "tests.bench.posts", str(folder / "requests")]
        command, environment = [*command, str(at_once)], clean_environment({})
        with pinned(MEASURED):
            subprocess.run(command, cwd=ROOT, env=environment, timeout=RUN_S, check=True)
        came = asyncio.run(arrivals(receiver, len(lines), None))
    else:
        shutil.rmtree(folder / "data", ignore_errors=True)
        shutil.copytree(folder / "template", folder / "data")
        settings = service_settings(receiver, folder, SECRET_KEY=SECRET_KEY, BASE_URL=BASE_URL)
        with server("service", "serve", folder=folder, cores=MEASURED, **settings) as service:
            came = asyncio.run(arrivals(receiver, len(lines), service))
    wanted = [
        [each["url"].removeprefix(receiver), each["id"], zlib.crc32(each["body"].encode())]
        for each in lines
    ]
    if sorted(each[2:] for each in came) != sorted(wanted):
        raise SystemExit(f"{len(came)} deliveries came, not the {len(wanted)} wanted ones")
    (first, before, *_), (last, after, *_) = min(came), max(came)
    return (len(came) - 1) / (last - first), (after - before) / (last - first)


def deliveries(folder: Path, rounds: int, quick: bool) -> str:
    """The table, in Markdown. Both sides take turns."""
    total = 100 if quick else 6000
    runs: dict[tuple[int, bool], list[Run]] = {}
    upstream = ("tests.bench.servers", "receiver")
    with server(*upstream, folder=folder, cores=MEASURING) as receiver, pinned(MEASURING):
        for count in ENDPOINTS:
            (folder / str(count)).mkdir()
            asyncio.run(prepare(folder / str(count), receiver, count, total))
        for number in range(rounds):
            for count in ENDPOINTS:
                for bare in (True, False) if number % 2 == 0 else (False, True):
                    run = measured(folder / str(count), receiver, AT_ONCE[count], bare=bare)
                    runs.setdefault((count, bare), []).append(run)
    lines = (folder / "1" / "requests").read_text().splitlines()
    size = round(sum(len(json.loads(line)["body"].encode()) for line in lines) / total)
    head = (
        f"| {total:,} events of {size:,} bytes, to so many endpoints | requests at once"
        " | Darkroom, deliveries a second | bare loop | of bare, goal 0.5 |"
    )
    table = [head, "|---|---|---|---|---|"]
    for count in ENDPOINTS:
        ours, theirs = ([rate for rate, _ in runs[count, bare]] for bare in (False, True))
        ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
        figures = [spread(ours, ".0f"), spread(theirs, ".0f"), spread(ratios, ".2f")]
        table.append(f"| {count} | {AT_ONCE[count]} | {' | '.join(figures)} |")
    busy = max(share for (_, bare), each in runs.items() for _, share in each if bare)
    control = f"The receiver used at most {busy:.0%} of its core while the bare loop posted."
    return "\n".join([*table, "", control])


if __name__ == "__main__":
    run("python -m tests.bench.deliveries", "deliveries", deliveries)
