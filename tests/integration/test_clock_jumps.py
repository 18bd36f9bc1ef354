"""The machine's clock jumps by an hour while the service runs and between two runs. No task ends
early, and no client waits for the hour.
"""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from starlette.responses import Response

from service.ids import rfc3339
from tests.api import ASYNC, UNTIL_DONE
from tests.callbacks import quick_world, said, verdict
from tests.upstream import Upstream
from tests.waiting import wait_until
from tests.world import subscriber, world

pytestmark = pytest.mark.slow


@dataclass(slots=True)
class Machine:
    """The clock's offset in seconds. Timers do not follow it, as on a real machine."""

    off: float = 0.0


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Every reading of the wall clock in this process has the machine's offset."""
    made, wall, wall_ns = Machine(), time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: wall() + made.off)
    monkeypatch.setattr(time, "time_ns", lambda: wall_ns() + round(made.off * 1e9))
    yield made
    monkeypatch.undo()


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
async def test_an_hours_jump_stops_nothing(jump: float, tmp_path: Path, machine: Machine) -> None:
    """Retries run on time, tokens stay valid, and tasks reach their end. Event times are within
    minutes of the old clock.
    """
    async with world(tmp_path, download_schedule="1", delivery_schedule="1,1") as here:
        waiting = [await here.submit(headers=ASYNC, sandbox={"delay": 1}) for _ in range(3)]
        before = time.time()
        machine.off = jump
        more = await here.submit(headers=UNTIL_DONE)
        ended = [await here.ended(task["id"]) for task in (*waiting, more)]
        assert {task["state"] for task in ended} == {"completed"}
        events = await here.events()
        assert max(event["time"] for event in events) < rfc3339(round((before + 120) * 1000))
        assert min(event["time"] for event in events) > rfc3339(round((before - 120) * 1000))
        machine.off = 0
        assert (await here.ended((await here.submit())["id"]))["state"] == "completed"


async def test_a_jump_that_is_undone_fails_no_uncertain_task(
    tmp_path: Path, machine: Machine
) -> None:
    """An uncertain task that waits for a callback keeps waiting, because the hour did not pass."""
    upstream = Upstream()
    async with quick_world(tmp_path, upstream) as here:
        task = await here.submit()
        machine.off = 24 * 3600.0
        assert await verdict(here, task, said(task, "processing")) == "accepted"
        assert (await here.task(task["id"]))["state"] == "submitted"
        machine.off = 0
        assert (await here.task(task["id"]))["state"] == "submitted"


async def test_who_waits_for_a_task_does_not_wait_for_the_clock(
    tmp_path: Path, machine: Machine
) -> None:
    """`Prefer: wait` counts elapsed seconds, not clock time."""
    async with quick_world(tmp_path, Upstream()) as here:
        waiting = asyncio.create_task(here.submit(headers={"prefer": "wait=2"}))
        await wait_until(lambda: here.context.shedder.waiting)
        machine.off = -3600
        assert (await asyncio.wait_for(waiting, 20))["state"] == "submitted"


async def test_an_endpoint_that_asks_for_a_second_is_not_left_alone_for_an_hour(
    tmp_path: Path, machine: Machine
) -> None:
    """The pause counts on the clock that recorded it."""
    peace = Response(status_code=503, headers={"retry-after": "1"})
    async with subscriber() as taker, world(tmp_path, delivery_schedule="1,1") as here:
        taker.answer = lambda number, _: Response(status_code=204) if number else peace
        endpoint = await here.client.post(
            "/v1/endpoints", json={"url": taker.url, "types": ["image.task.completed"]}
        )
        assert endpoint.status_code == 201
        machine.off = -3600
        await here.submit(headers=UNTIL_DONE)
        await wait_until(lambda: len(taker.received) == 2)
