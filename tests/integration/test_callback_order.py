"""Callbacks in any order and number, concurrent and after each kind of end. The service judges each
callback, raises each event once, and settles each task once.
"""

import asyncio
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest

from tests.callbacks import heard, quick_world, said, types, verdict
from tests.upstream import After, Upstream, document, failed
from tests.world import World

WORLD = quick_world

pytestmark = pytest.mark.slow

JSON = dict[str, Any]
NOWHERE = ("http://127.0.0.1:9/a.png", "http://127.0.0.1:9/b.png")


@dataclass
class Table:
    """The table of docs/callbacks.md for one task: the answer to each callback, given all earlier
    ones.
    """

    settled: str | None = None
    first: str | None = None

    def says(self, name: str) -> str:
        if name in ("unreadable", "foreign"):
            return {"foreign": "conflict"}.get(name, name)
        if name in ("processing", "unheard of"):
            return "accepted"
        known = self.settled or self.first
        self.first = self.first or name
        return "accepted" if known is None else "duplicate" if known == name else "conflict"


def sent(task: JSON) -> dict[str, bytes]:
    """One callback body of each kind, by name."""
    return {
        "processing": said(task, "processing", progress=30),
        "unheard of": said(task, "teleporting"),
        "unreadable": b"garbage",
        "foreign": said({"upstream_id": "task-unified-foreign"}, "completed"),
        "failed": said(task, "failed"),
        "cancelled": said(task, "cancelled"),
        "completed": said(task, "completed", results=[NOWHERE[0]]),
        "completed otherwise": said(task, "completed", results=[NOWHERE[1]]),
    }


@pytest.mark.parametrize("seed", range(8))
async def test_any_order_and_number_is_judged_by_the_table(
    seed: int, here: World, upstream: Upstream
) -> None:
    """Before the end the first terminal callback is the reference, afterwards the settled outcome.
    Only the upstream's query answer settles a task.
    """
    task, answer, table = await here.submit(), asyncio.Event(), Table()
    upstream.queries[task["upstream_id"]] = [After(answer.wait, failed("service_error"))]
    bodies, order = sent(task), random.Random(seed)
    names = order.choices(list(bodies), k=16)
    for name in names:
        assert await verdict(here, task, bodies[name]) == table.says(name), names
    answer.set()
    await verdict(here, task, bodies["failed"])
    assert (await here.ended(task["id"]))["error"]["code"] == "service_error"
    table.settled = "failed"
    for name in order.choices(list(bodies), k=16):
        assert await verdict(here, task, bodies[name]) == table.says(name), name
    ends = Counter(await types(here, task))
    assert (
        ends["image.task.submitted"],
        ends["image.task.failed"],
        ends.total() - ends["callback.conflict"],
    ) == (1, 1, 2)
    assert sum(count for _, _, count in await heard(here, task)) == 33


async def test_everything_at_once_for_many_tasks_is_judged_as_if_in_a_row(
    here: World, upstream: Upstream
) -> None:
    """Six tasks get five of each kind of callback over as many connections. One is accepted, equal
    ones are counted, and each different one raises one event.
    """
    tasks, answer = [await here.submit() for _ in range(6)], asyncio.Event()
    for task in tasks:
        upstream.queries[task["upstream_id"]] = [After(answer.wait, failed("service_error"))]
    calls = [(task, name) for task in tasks for name in sent(task) for _ in range(5)]
    random.Random(1).shuffle(calls)
    verdicts = await asyncio.gather(
        *(verdict(here, task, sent(task)[name]) for task, name in calls)
    )
    answer.set()
    for task in tasks:
        said_to: dict[str, list[str]] = {name: [] for name in sent(task)}
        for (other, name), word in zip(calls, verdicts, strict=True):
            if other is task:
                said_to[name].append(word)
        assert {
            name: set(said_to.pop(name))
            for name in ("processing", "unheard of", "unreadable", "foreign")
        } == {
            "processing": {"accepted"},
            "unheard of": {"accepted"},
            "unreadable": {"unreadable"},
            "foreign": {"conflict"},
        }
        words = Counter(word for words in said_to.values() for word in words)
        assert words == {"accepted": 1, "duplicate": 4, "conflict": 15}, said_to
        assert (await here.ended(task["id"]))["error"]["code"] == "service_error"
        ends = Counter(await types(here, task))
        assert (
            ends["image.task.submitted"],
            ends["image.task.failed"],
            ends.total() - ends["callback.conflict"],
        ) == (1, 1, 2)


async def test_callbacks_race_the_submit_answer(here: World, upstream: Upstream) -> None:
    """Ten equal callbacks arrive at the moment of the submit answer. One is accepted, and the task
    is submitted once and settled once.
    """
    for number in range(5):
        prompt, arrived = f"race {number}", asyncio.Event()
        mine = f"task-unified-race-{number}"
        upstream.submits[prompt] = [After(arrived.wait, document("pending", id=mine))]
        upstream.queries[mine] = [failed("service_error")]
        task = await here.submit(prompt=prompt, headers={"prefer": "respond-async"})
        body = said({"upstream_id": mine}, "failed")
        verdicts = asyncio.gather(*(verdict(here, task, body) for _ in range(10)))
        arrived.set()
        assert sorted(await verdicts) == ["accepted"] + ["duplicate"] * 9
        ended = await here.ended(task["id"])
        assert (ended["upstream_id"], ended["error"]["code"]) == (mine, "service_error")
        assert await types(here, task) == ["image.task.submitted", "image.task.failed"]
