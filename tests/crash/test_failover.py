"""The primary server dies under load and its synchronous standby takes over. No promise of the
service is lost.
"""

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from service.db import failover
from tests import standby
from tests.api import got
from tests.contract.subject import Clock, Subject, new_id
from tests.crash.group import PATIENCE_S, WEB, WORKER, ask, groups
from tests.crash.load import loaded, sending
from tests.servers import PostgresServer, missing, postgres_binaries
from tests.stores import open_postgres
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(180)

Pair = tuple[PostgresServer, PostgresServer]


@pytest.fixture(scope="module")
def binaries() -> Path:
    return postgres_binaries() or missing("PostgreSQL")


@pytest.fixture
def pair(binaries: Path) -> Iterator[Pair]:
    with standby.replicated(binaries) as servers:
        yield servers


async def test_a_failover_loses_nothing(tmp_path: Path, pair: Pair) -> None:
    """Every accepted task ends in one event, every callback that was answered with 200 is stored,
    and no process ends.
    """
    primary, second = pair
    url = standby.url(primary, second)

    async def synchronous() -> bool:
        return bool(
            await ask(
                standby.url(primary), "SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'"
            )
        )

    await wait_until(synchronous, PATIENCE_S)
    async with groups(tmp_path, "", database=url) as group:
        web, _ = [await group.start(role) for role in (WEB, WORKER)]
        load = await loaded(web.client, 30)
        group.accepted |= {task["id"] for task in load.tasks}
        callbacks = str(web.client.base_url).rstrip("/")
        async with sending(load, callbacks):
            await wait_until(lambda: load.answers["200"] >= 30, PATIENCE_S)
            before = [asyncio.create_task(group.order(web, number)) for number in range(10)]
            await wait_until(lambda: len(group.accepted) >= 32, PATIENCE_S)
            primary.kill()
            during = [asyncio.create_task(group.order(web, number)) for number in range(10, 20)]
            await asyncio.to_thread(second.control, "promote")
            taken = load.answers["200"]
            await wait_until(lambda: load.answers["200"] > taken + 30, PATIENCE_S)
            await asyncio.gather(*before, *during)
        assert set(load.answers) <= {"200", "503"}, load.answers
        load_ids = {task["id"] for task in load.tasks}
        for task_id, times in load.said.items():

            async def judged(task_id: str = task_id, times: int = times) -> bool:
                steps = got(await web.client.get(f"/v1/tasks/{task_id}/timeline"))["data"]
                found = [step for step in steps if step["step"] == "callback.received"]
                return bool(sum(step["count"] for step in found) >= times)

            await wait_until(judged, PATIENCE_S)
        states = await group.ended(web)
        assert {states[task_id] for task_id in load_ids} == {"failed"}
        others = [
            got(await web.client.get(f"/v1/tasks/{task_id}"))
            for task_id in states
            if task_id not in load_ids
        ]
        assert {task["state"] for task in others} == {"completed"}
        group.alive()


async def test_the_host_that_takes_writes_is_found_among_several(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection skips a silent host and a read-only host, each within its timeout. An open
    connection detects a peer that falls silent.
    """
    primary, second = pair
    connect, waits = asyncpg.connect, list[float]()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        name = f"127.0.0.1:{silent.getsockname()[1]}"
        url = standby.url(second, primary).replace("@", f"@{name},")

        async def soon_or_late(host: str, *, timeout: float, **given: Any) -> Any:
            """Waits half a second for the silent host, and patiently for the others."""
            waits.append(timeout)
            return await connect(host, timeout=0.5 if name in host else PATIENCE_S, **given)

        monkeypatch.setattr(asyncpg, "connect", soon_or_late)
        async with open_postgres(url, process="one", new_id=new_id) as store:
            task_id = await Subject(store, Clock()).queued()
            assert await Subject(store, Clock()).state(task_id) == "queued"
    assert set(waits) == {failover.CONNECT_S}
    connection: Any = await failover.connecting(standby.url(second, primary), {})()
    try:
        held = connection._transport.get_extra_info("socket")
        assert held.getpeername()[1] == primary.port
        assert (
            held.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == failover.SILENT_S * 1000
        )
        assert held.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    finally:
        await connection.close()
    with pytest.raises(ConnectionError, match="no host is a primary"):
        await failover.connecting(standby.url(second), {})()
