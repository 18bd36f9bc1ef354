"""Kills every process of a contender, its Redis too, while orders are under way, and counts what is
lost, doubled and paid twice.

The kills come at random moments, as in `make chaos`, and each victim starts again within half a
second. The upstream takes 0.1 s to answer a submission, and the task exists from the moment of its
request. A client submits its order again until it is accepted.
"""

import asyncio
import contextlib
import json
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import httpx
import standardwebhooks

from tests.bench.load import percentile
from tests.bench.peers.contenders import Contender, Running, running
from tests.bench.processes import MEASURING, server
from tests.waiting import wait_until

ANSWER_S, AGAIN_S, DOWN_S, PATIENCE_S = 0.1, 0.3, 0.5, 120.0
FAILED = "image.task.failed"
# Longer than the visibility timeout and the locks of the peers.
SILENCE_S = 35.0
SETTINGS = {
    "SUBMIT_TIMEOUT_S": "3",
    "UNCERTAIN_AFTER_S": "20",
    "RECONCILE_AFTER_S": "5",
    "DELIVERY_SCHEDULE": ",".join(["0.5", "1"] + ["3"] * 98),
}


@dataclass(frozen=True, slots=True)
class Storm:
    """Orders and kills are spread over `seconds` of a clock that stands still while a contender
    starts.
    """

    tasks: int
    kills: int
    seconds: float
    seed: int


@dataclass(slots=True)
class Verdict:
    """What became of the accepted orders.

    `lost`: no event came, or one that says that the task failed although its callback was answered.
    `uncalled`: those of them whose callback was never answered, so that the upstream gave up.
    `uncertain`: the event says that nobody knows whether the task exists, and no callback was
    answered. `again`: further arrivals of an event under its own id. `waits`: seconds from the
    first submission to the upstream until the event.
    """

    accepted: int = 0
    lost: int = 0
    uncalled: int = 0
    uncertain: int = 0
    doubled: int = 0
    twice: int = 0
    again: int = 0
    waits: list[float] = field(default_factory=list)


async def kill(here: Running, chance: Random) -> None:
    victim = chance.choice(here.processes)
    victim.kill()
    await asyncio.sleep(chance.uniform(0, DOWN_S))
    victim.start()


async def keep(here: Running) -> None:
    """Starts a process again that ended by itself, as an init system does."""
    while True:
        await asyncio.sleep(AGAIN_S)
        for process in here.processes:
            if process.ended():
                process.start()


async def submit(here: Running, client: httpx.AsyncClient, name: str) -> tuple[str, str]:
    """Submits an order until it is accepted. Returns its name and its task."""

    async def accepted() -> str | None:
        with contextlib.suppress(httpx.TransportError):
            if (task := await here.order(client, name)) is not None:
                return task
        await asyncio.sleep(AGAIN_S)
        return None

    return name, await wait_until(accepted, PATIENCE_S)


async def rage(here: Running, storm: Storm) -> dict[str, str]:
    """Submits all orders and kills processes, each at its moment. Returns the tasks by the names of
    their orders.

    A kill waits until all processes work, and then for a random time. The clock stands still
    meanwhile. Otherwise a contender whose one process meets all kills would be away for longer than
    the upstream sends its callbacks.
    """
    chance = Random(storm.seed)
    plan: list[tuple[float, str | None]] = [
        (chance.uniform(0, storm.seconds), None) for _ in range(storm.kills)
    ]
    plan += [(chance.uniform(0, storm.seconds), f"{each:05}") for each in range(storm.tasks)]
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    orders, start = [], time.monotonic()
    async with httpx.AsyncClient(timeout=15, trust_env=False, limits=limits) as client:
        for moment, name in sorted(plan, key=lambda each: each[0]):
            await asyncio.sleep(start + moment - time.monotonic())
            if name is not None:
                orders.append(asyncio.create_task(submit(here, client, name)))
                continue
            began = time.monotonic()
            await wait_until(lambda: here.awake(client), PATIENCE_S)
            await asyncio.sleep(chance.uniform(0, 2 * storm.seconds / storm.kills))
            start += time.monotonic() - began
            await kill(here, chance)
        return dict(await asyncio.gather(*orders))


async def quiet(client: httpx.AsyncClient, accepted: dict[str, str]) -> None:
    """Waits until every task has an event, or until no event has come for a while."""
    told, last = 0, time.monotonic()

    async def over() -> bool:
        nonlocal told, last
        events = (await client.get("/bench/counts")).json()["events"]
        if events != told:
            told, last = events, time.monotonic()
        if time.monotonic() - last > SILENCE_S:
            return True
        seen = (await client.get("/bench/seen")).json()["events"] if events >= len(accepted) else []
        subjects = {json.loads(body)["subject"] for _, _, body in seen}
        return subjects >= set(accepted.values())

    await wait_until(over, 20 * SILENCE_S)


def judged(secret: str, accepted: dict[str, str], seen: dict[str, Any]) -> Verdict:
    """`accepted`: tasks by the names of their orders. `seen`: what the upstream noted."""
    verdict, receiver = Verdict(accepted=len(accepted)), standardwebhooks.Webhook(secret)
    arrivals: defaultdict[str, list[tuple[float, str, str]]] = defaultdict(list)
    for at, headers, body in seen["events"]:
        receiver.verify(body, headers)
        event = json.loads(body)
        arrivals[event["subject"]].append((at, headers["webhook-id"], event["type"]))
    for name, task in accepted.items():
        came, made = sorted(arrivals[task]), seen["orders"].get(name, [])
        ids, failed = {id for _, id, _ in came}, bool(came) and came[0][2] == FAILED
        called = any(id in seen["taken"] for id, _, _ in made)
        lost = not came or (failed and called)
        verdict.lost += lost
        verdict.uncalled += lost and not called
        verdict.uncertain += failed and not called
        verdict.doubled += len(ids) > 1
        verdict.twice += len(made) > 1
        verdict.again += len(came) - len(ids)
        if came and made:
            verdict.waits.append(came[0][0] - made[0][2])
    return verdict


async def one_run(here: Running, upstream: str, storm: Storm) -> Verdict:
    keeper = asyncio.create_task(keep(here))
    try:
        accepted = await rage(here, storm)
        async with httpx.AsyncClient(base_url=upstream, timeout=60, trust_env=False) as client:
            await quiet(client, accepted)
            seen = (await client.get("/bench/seen")).json()
    finally:
        keeper.cancel()
    return judged(here.secret, accepted, seen)


def killed(contender: Contender, folder: Path, storm: Storm) -> Verdict:
    folder.mkdir()
    upstream = ("tests.bench.peers.upstream", "called", str(ANSWER_S))
    with (
        server(*upstream, folder=folder, cores=MEASURING) as address,
        running(contender, folder, address, workers=0, **SETTINGS) as here,
    ):
        return asyncio.run(one_run(here, address, storm))


def table(verdicts: dict[Contender, Verdict], storm: Storm) -> str:
    head = (
        f"| {storm.tasks} orders and {storm.kills} kills | lost | of them never called back"
        " | doubled | paid twice | uncertain, and told so | sent again under one id | order to"
        " event, p50 and p99 |"
    )
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for contender, found in verdicts.items():
        waits = [percentile(found.waits or [0.0], share) for share in (0.5, 0.99)]
        counts = [found.lost, found.uncalled, found.doubled, found.twice, found.uncertain]
        figures = " | ".join(map(str, [*counts, found.again]))
        lines.append(f"| {contender.name} | {figures} | {waits[0]:.1f} and {waits[1]:.1f} s |")
    return "\n".join(lines)
