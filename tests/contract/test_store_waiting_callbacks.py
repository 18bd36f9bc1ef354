"""The inbox: callbacks that are committed and wait for their verdict."""

import asyncio
import json
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import pytest

from service.db.tables import callbacks, inbox
from service.db.transaction import Transaction
from service.tasks.inbox_worker import Judged, Waiting, insert_callbacks, judge_callbacks
from service.tasks.inbox_worker import waiting_tasks as waiting
from service.tasks.state import State
from service.upstreams.base import Report, Status
from tests.contract.subject import DAY, SECOND, UNDECIDED, Subject, new_id, upstream_id

URL = "https://files.evolink.ai/0.png"


class Reader:
    """Reads a callback as `status` and `results` name them."""

    def read_callback(self, body: bytes) -> Report | None:
        said = json.loads(body)
        return Report(said["id"], Status(said["status"]), tuple(said["results"]))


def row(task_id: str, status: str = "completed", *results: str) -> dict[str, Any]:
    said = {"id": upstream_id(task_id), "status": status, "results": results}
    body = json.dumps(said).encode()
    digest = sha256(body).hexdigest()
    shared = {"task_id": task_id, "upstream": "evolink", "size": len(body), "digest": digest}
    return {"id": new_id("callback"), **shared, "body": body}


def item(task_id: str) -> Waiting:
    readers: Any = {"evolink": Reader()}
    return Waiting(task_id, readers, DAY)


async def judged(subject: Subject, *task_ids: str) -> list[list[str]]:
    found = await subject.batch(judge_callbacks, [item(task_id) for task_id in task_ids])
    return [[verdict.verdict for _, verdict in each] for each in found]


async def test_rows_are_judged_in_the_order_of_arrival_and_deleted(subject: Subject) -> None:
    """The row keeps the time of the arrival, and the links that it names live from then on."""
    first, other = [await subject.submitted() for _ in range(2)]
    arrived = subject.clock.now
    rows = [row(first, "processing"), row(first, "completed", URL), row(other, "failed")]
    for each in (*rows, row(first, "failed"), row(first, "completed", URL)):
        await subject.write(insert_callbacks, each)
    subject.clock.shift(90 * SECOND)
    assert await subject.rows(callbacks) == []
    assert await judged(subject, other, first, "task_gone") == [
        ["accepted"],
        ["accepted", "accepted", "conflict", "duplicate"],
        [],
    ]
    assert await subject.rows(inbox) == []
    assert (await subject.task(first))["called_back_at"] == arrived
    assert {each["received_at"] for each in await subject.rows(callbacks)} == {arrived}
    (image,) = await subject.images(first)
    assert image["link_dies_at"] == arrived + DAY
    assert await judged(subject, other, first) == [[], []]


async def test_a_verdict_and_the_end_of_its_row_are_one_transaction(subject: Subject) -> None:
    """A transaction that fails after the verdicts leaves every row to the next one."""
    task_id = await subject.submitted()
    await subject.write(insert_callbacks, row(task_id))

    def fails(tx: Transaction, items: Sequence[Waiting]) -> list[list[Judged]]:
        assert [len(of_task) for of_task in judge_callbacks(tx, items)] == [1]
        tx.write()
        raise ValueError("the process ends here")

    with pytest.raises(ValueError, match="ends here"):
        await subject.write(fails, item(task_id))
    assert await subject.rows(callbacks) == []
    assert len(await subject.rows(inbox)) == 1
    assert await judged(subject, task_id) == [["accepted"]]


async def test_an_insert_that_runs_again_is_judged_once(subject: Subject) -> None:
    """The response to a commit is lost, and the store runs the insert again: before or after the
    verdict.
    """
    task_id = await subject.submitted()
    again = row(task_id)
    for _ in range(2):
        await subject.write(insert_callbacks, again)
    assert await judged(subject, task_id) == [["accepted"]]
    await subject.write(insert_callbacks, again)
    assert await judged(subject, task_id) == [["accepted"]]
    (kept,) = await subject.rows(callbacks)
    assert kept["count"] == 1


async def test_the_oldest_rows_come_first_and_those_held_back_not_at_all(subject: Subject) -> None:
    one, two = [await subject.submitted() for _ in range(2)]
    for task_id in (two, one, two):
        await subject.write(insert_callbacks, row(task_id))
    assert await subject.store.read(waiting, []) == [two, one, two]
    assert await subject.store.read(waiting, [two]) == [one]


async def test_a_task_that_is_judged_twice_in_a_batch_gets_each_verdict_once(
    subject: Subject,
) -> None:
    """The worker and the process that serves may judge it at the same time."""
    task_id = await subject.submitted()
    await subject.write(insert_callbacks, row(task_id))
    assert await judged(subject, task_id, task_id) == [["accepted"], []]


async def test_nothing_is_decided_by_time_while_a_callback_waits(subject: Subject) -> None:
    """It may prove that an uncertain submission created its task, or how a silent task ended."""
    failing, again = [await subject.uncertain() for _ in range(2)]
    silent = await subject.submitted()
    for task_id in (failing, again, silent):
        await subject.write(insert_callbacks, row(task_id, "processing"))
    subject.clock.shift(2 * DAY)
    lease = await subject.claimed("submit", failing)
    assert await subject.submission(lease, UNDECIDED) is State.UNCERTAIN
    assert await subject.start(await subject.claimed("submit", again), resubmit=True) is None
    assert await subject.settle(silent, None, expires_ms=DAY) is State.SUBMITTED
    subject.clock.shift(SECOND)
    assert await subject.start(await subject.claimed("submit", again), resubmit=True) is None
    assert await judged(subject, failing, again, silent) == [["accepted"]] * 3
    assert [await subject.state(each) for each in (failing, again)] == [State.SUBMITTED] * 2
    assert await subject.settle(silent, None, expires_ms=DAY) is State.EXPIRED


async def test_a_callback_of_an_unknown_upstream_fails_alone(subject: Subject) -> None:
    """A worker of another version may lack the upstream. The row waits for a worker that has it."""
    known, foreign = [await subject.submitted() for _ in range(2)]
    await subject.write(insert_callbacks, row(known))
    await subject.write(insert_callbacks, row(foreign) | {"upstream": "another"})
    results = await asyncio.gather(
        *(subject.write(judge_callbacks, item(task_id)) for task_id in (known, foreign)),
        return_exceptions=True,
    )
    assert [isinstance(result, KeyError) for result in results] == [False, True]
    assert await subject.store.read(waiting, []) == [foreign]


async def test_two_processes_judge_each_callback_once_and_in_order(
    two: tuple[Subject, Subject],
) -> None:
    """Both judge while callbacks arrive at both. A callback that follows the acknowledgement of
    another one is judged after it.
    """
    for _ in range(5):
        task_id = await two[0].submitted()

        async def arriving(task_id: str = task_id) -> None:
            for number in range(10):
                status = "failed" if number else "completed"
                await two[number % 2].write(insert_callbacks, row(task_id, status))

        calls = asyncio.create_task(arriving())
        verdicts: list[str] = []
        while len(verdicts) < 10:
            for (found,) in await asyncio.gather(*(judged(each, task_id) for each in two)):
                verdicts += found
        await calls
        assert sorted(verdicts) == ["accepted"] + ["conflict"] * 9
        kept = await two[0].rows(callbacks, task_id=task_id)
        assert sorted((each["status"], each["verdict"]) for each in kept) == [
            ("completed", "accepted"),
            ("failed", "conflict"),
        ]
