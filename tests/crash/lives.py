"""Runs a crash case from the first start until no work is left. Its processes die one after the
other, or one process pauses for a while.
"""

import asyncio
import signal
from contextlib import AsyncExitStack

from tests.api import SUBMIT, got
from tests.crash.bench import Bench
from tests.crash.life import LEASE_MS, PATIENCE_S, SETTINGS, Case, Ended, Life, listed
from tests.launcher import LOG
from tests.processes import service_settings
from tests.servers import kept_port
from tests.waiting import wait_until


async def live(case: Case, bench: Bench) -> Ended:
    """Runs the case and returns what is left at its end."""
    folder = bench.folder / str(case)
    folder.mkdir()
    more = dict(SETTINGS)
    if any(point.startswith("account.") for point in case.points):
        more |= {
            "SUBMIT_SCHEDULE": "3"
        }  # the service must hold the next submission before it probes the account
    if case.paused:
        more |= {"RECONCILE_AFTER_S": "1"} | ({"UNCERTAIN_AFTER_S": "600"} if case.doubted else {})
    bench.upstream.refusals[str(case)] = sum(point.startswith("account.") for point in case.points)
    async with AsyncExitStack() as stack:
        if case.store == "postgres":
            more["DATABASE_URL"] = await stack.enter_async_context(bench.database())
        port = kept_port(stack)
        environment = service_settings(bench.upstream_url, folder, **more) | {
            "DARKROOM_TEST_LEASE_MS": str(LEASE_MS)
        }
        one = Life(case, bench, environment, stack)
        return await (paused(one, port, kept_port(stack)) if case.paused else dying(one, port))


async def lease_over() -> None:
    """Waits until the leases of a dead process have expired. Starting a new process earlier would
    only take processor time from the other cases.
    """
    clock = asyncio.get_running_loop().time
    end = clock() + LEASE_MS / 1000
    await wait_until(lambda: clock() >= end, PATIENCE_S)


async def dying(one: Life, port: int) -> Ended:
    exits: list[int | None] = []
    for point in one.case.points:
        process, client = await one.start(port, DARKROOM_TEST_KILL=point)
        if not exits:
            await one.subscribe(client)
        exits.append(await one.killed(process, client))
        if one.case.store == "postgres":
            await lease_over()
    process, client = await one.start(port)
    await one.submit(client)
    ended = await one.seen(client, exits)
    process.signal(signal.SIGKILL)
    return ended


async def paused(one: Life, port: int, other: int) -> Ended:
    """Pauses the first process in the middle of its work. The second process does that work after
    the lease has expired. The first process then continues, takes one more task alone and stops.
    """
    first, client = await one.start(port, DARKROOM_TEST_PAUSE=one.case.points[0])
    await one.subscribe(client)
    asked = asyncio.create_task(one.ask(client))  # this request may be the one that pauses
    await wait_until(lambda: first.stopped, PATIENCE_S)
    second, witness = (None, client) if one.case.store == "sqlite" else await one.start(other)
    if second is None:
        await lease_over()
    elif one.case.doubted:

        async def doubted() -> object:
            return (await one.submit(witness, "wait=1"))["state"] == "uncertain"

        await wait_until(doubted, PATIENCE_S)
    else:
        await one.quiet(witness)
    first.signal(signal.SIGCONT)
    if one.case.late:

        async def late() -> bool:
            return "task.late_result" in {
                event["type"] for event in await listed(witness, "events")
            }

        await wait_until(late, PATIENCE_S)
    task = await one.quiet(witness)
    answer = await asked
    if (
        answer.status_code != 503
    ):  # the server ended a transaction that was idle too long, so the client has to retry
        assert got(answer)["id"] == task["id"]
    ended = await one.seen(witness, [])
    if second is not None:
        second.signal(signal.SIGKILL)
    one.body["prompt"] += ", and another"
    ended.after = got(await client.post(SUBMIT, json=one.body, headers={"prefer": "wait=90"}))[
        "state"
    ]
    first.signal(signal.SIGTERM)
    await wait_until(lambda: first.code is not None, PATIENCE_S)
    ended.exits = [first.code]
    ended.log = (one.folder / LOG).read_text()
    return ended
