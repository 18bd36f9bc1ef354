"""Several web and worker processes share one PostgreSQL store. Another process takes over a dead
process's work, and a lost notification only costs time. Locks and connection pools are bounded.
"""

import asyncio
import signal
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from service.db.postgres import COMMITTERS, READERS
from tests.crash.group import LEASE_MS, PATIENCE_S, WEB, WORKER, ask, groups, terminating
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(180)

# The listening session also looks for stalled sessions. Its last statement may be either.
LISTENS = "(query ILIKE 'LISTEN%' OR query LIKE 'SELECT pid FROM (%')"
CONNECTIONS = COMMITTERS + READERS + 1


async def test_work_moves_when_its_process_is_killed(
    tmp_path: Path, postgres_server: str, postgres_template: str
) -> None:
    """One of two web processes and one of two workers die in the middle of their work. Another
    worker claims that work after the lease has expired, and submits nothing twice.
    """
    async with groups(tmp_path, postgres_server, postgres_template) as group:
        web, other = [await group.start(WEB) for _ in range(2)]
        doomed = await group.start(WORKER, TEST_KILL="settle.answered:3")
        await asyncio.gather(
            *(group.order(web if number % 2 else other, number) for number in range(12))
        )
        await wait_until(lambda: doomed.process.code is not None, PATIENCE_S)
        assert doomed.process.code == -signal.SIGKILL
        group.members.remove(doomed)
        held = await ask(
            group.database,
            "SELECT id FROM tasks WHERE settle_lease_owner IS NOT NULL OR submit_lease_owner IS"
            " NOT NULL",
        )
        assert held
        for _ in range(2):
            await group.start(WORKER)
        began = asyncio.get_running_loop().time()
        other.process.signal(signal.SIGKILL)
        group.members.remove(other)
        states = await group.ended(web)
        sent = {key for keys in group.bench.upstream.posts.values() for key in keys}
        assert len(sent) >= 3
        # A submission that the kill cut off before the upstream had it stays unproved.
        assert states == {id: "completed" if id in sent else "failed" for id in states}
        assert asyncio.get_running_loop().time() - began < LEASE_MS / 1000 + 30
        group.alive()


async def test_hints_that_are_lost_only_cost_time(
    tmp_path: Path, postgres_server: str, postgres_template: str
) -> None:
    """The test cuts the listening connections off again and again. The workers find due work by
    polling, and then listen again.
    """
    async with groups(tmp_path, postgres_server, postgres_template) as group:
        web, *_ = [await group.start(role) for role in (WEB, WORKER)]
        async with terminating(group.database, LISTENS):
            await asyncio.gather(*(group.order(web, number) for number in range(5)))
            assert set((await group.ended(web)).values()) == {"completed"}

        async def listening() -> bool:
            return (
                len(
                    await ask(
                        group.database,
                        "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND"
                        f" {LISTENS}",
                    )
                )
                == 2
            )

        await wait_until(listening, PATIENCE_S)
        group.alive()


async def test_a_lock_that_a_stranger_holds_is_waited_for_so_long_and_no_longer(
    tmp_path: Path, postgres_server: str, postgres_template: str
) -> None:
    """While the lock is held, the service answers a callback with 503 before the sender's timeout,
    and `/readyz` with 503. Both recover when the lock ends.
    """
    async with groups(tmp_path, postgres_server, postgres_template) as group:
        web = await group.start(WEB)
        task = {"id": await group.order(web, 0), "upstream_id": "task-unified-1"}
        stranger = await asyncpg.connect(group.database)
        try:
            async with stranger.transaction():
                await stranger.execute("LOCK TABLE inbox, counters IN ACCESS EXCLUSIVE MODE")
                status, ready = await asyncio.gather(
                    group.callback(web, task), web.client.get("/readyz")
                )
                assert (status, ready.status_code, ready.json()["status"]) == (
                    "503",
                    503,
                    "unavailable",
                )
                assert ready.headers["retry-after"] == "1"

                def refused() -> list[Any]:
                    return [each for each in web.lines() if each["event"] == "callback.refused"]

                (line,) = await wait_until(refused)
                assert line["duration_ms"] < 9500, "the upstream waits for 10 s"
        finally:
            await stranger.close()

        async def recovered() -> bool:
            return (
                await group.callback(web, task) == "200"
                and (await web.client.get("/readyz")).status_code == 200
            )

        await wait_until(recovered, PATIENCE_S)
        group.alive()


async def test_more_load_than_connections_waits_its_turn(
    tmp_path: Path, postgres_server: str, postgres_template: str
) -> None:
    """A process opens a bounded number of connections. Further requests queue for one, and each
    gets an answer.
    """
    async with groups(tmp_path, postgres_server, postgres_template) as group:
        web, _ = [await group.start(role) for role in (WEB, WORKER)]
        counts: list[int] = []

        async def count() -> bool:
            statement = (
                "SELECT 1 FROM pg_stat_activity WHERE datname = current_database()"
                " AND application_name = 'darkroom'"
            )
            counts.append(len(await ask(group.database, statement)))
            return False

        counting = asyncio.create_task(wait_until(count, PATIENCE_S))
        try:
            reading = [web.client.get("/v1/tasks") for _ in range(100)]
            answers, _ = await asyncio.gather(
                asyncio.gather(*reading),
                asyncio.gather(
                    *(group.order(web, number) for number in range(2 * CONNECTIONS + 2))
                ),
            )
        finally:
            counting.cancel()
            await asyncio.gather(counting, return_exceptions=True)
        assert {answer.status_code for answer in answers} == {200}
        assert set((await group.ended(web)).values()) == {"completed"}
        assert READERS < max(counts) <= 2 * CONNECTIONS
        group.alive()
