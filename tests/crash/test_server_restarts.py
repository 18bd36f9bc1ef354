"""The PostgreSQL server restarts under a web process and a worker. They live on."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api import got
from tests.crash.group import PATIENCE_S, WEB, WORKER, groups
from tests.crash.load import bound
from tests.servers import missing, postgres_binaries, postgres_running, running_server
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def own_server() -> Iterator[str]:
    """A server that tests may restart."""
    binaries = postgres_binaries()
    if binaries is None:
        missing("PostgreSQL")
    with postgres_running(binaries) as url:
        yield url


@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_a_restart_of_the_server_ends_no_process(
    tmp_path: Path, own_server: str, mode: str
) -> None:
    """During the restart the service answers callbacks with 503 and `Retry-After`. It accepts them
    afterwards and work continues. Each process logs a few lines about the restart.
    """
    async with groups(tmp_path, own_server) as group:
        web, _ = [await group.start(role) for role in (WEB, WORKER)]
        known = await group.order(web, 0, sandbox={"fail": "service_error", "drop_callback": True})
        task = await bound(web.client, got(await web.client.get(f"/v1/tasks/{known}")))
        orders = [asyncio.create_task(group.order(web, number)) for number in range(1, 20)]
        answers = []
        control = running_server(own_server).control
        stopping = asyncio.create_task(asyncio.to_thread(control, "-m", mode, "restart"))

        async def restarted() -> bool:
            answers.append(await group.callback(web, task))
            return stopping.done()

        await wait_until(restarted, PATIENCE_S)
        await stopping

        async def taken() -> bool:
            answers.append(await group.callback(web, task))
            return answers[-1] == "200"

        await wait_until(taken, PATIENCE_S)
        assert set(answers) <= {"200", "503"}, answers
        await asyncio.gather(*orders)
        states = await group.ended(web)
        assert states.pop(known) == "failed"
        assert set(states.values()) == {"completed"}
        for member in group.members:  # and a line for each request that failed
            said = [
                line
                for line in member.lines()
                if line["level"] != "info" and not {"request_id", "task_id"} & line.keys()
            ]
            assert len(said) <= 20, said
        group.alive()
