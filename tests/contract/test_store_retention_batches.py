"""A retention pass takes several transactions. A later pass completes one that died in between."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
from sqlalchemy import Connection, func, insert, select

from service.db.batching import BatchingStore, Item, Result
from service.db.tables import attempts, callbacks, deliveries, events, steps
from service.db.transaction import Transaction
from service.errors import StoreUnavailable
from service.resources import Resources
from service.upkeep import retention, retention_sql
from service.upkeep.retention import Retention, erase
from tests.contract.subject import DAY, OWNER, Opener, Subject, failed, new_id

pytestmark = pytest.mark.slow

GROWING = (callbacks, steps, attempts, deliveries, events)


def row_counts(connection: Connection) -> dict[str, int]:
    """The number of rows in each table that grows with a task."""
    return {
        table.name: connection.execute(select(func.count()).select_from(table)).scalar_one()
        for table in GROWING
    }


class Mortal:
    """A store that counts its transactions and fails after a set number of them."""

    def __init__(self, store: BatchingStore, last: int = 1000) -> None:
        self.store, self.left, self.count = store, last, 0

    async def write(
        self, operation: Callable[[Transaction, Sequence[Item]], Sequence[Result]], item: Item
    ) -> Result:
        if self.count == self.left:
            raise StoreUnavailable("the process is dead")
        self.count += 1
        return await self.store.write(operation, item)

    async def read(self, query: Callable[..., Any], *arguments: Any) -> Any:
        return await self.store.read(query, *arguments)

    @property
    def resources(self) -> Resources:
        return cast("Resources", SimpleNamespace(store=self, blobs=None))

    def job(self, now: int) -> Retention:
        return Retention(self.resources, 30, None, 365, lambda: now)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that a few rows reach."""
    monkeypatch.setattr(retention_sql, "EVENTS", 2)
    monkeypatch.setattr(retention_sql, "DELIVERIES", 3)
    monkeypatch.setattr(retention_sql, "TASKS", 1)
    monkeypatch.setattr(retention, "PAUSE_S", 0)


def deliver(tx: Transaction, items: Sequence[tuple[str, str, int]]) -> list[None]:
    """Inserts finished deliveries of a task's event with the subscribers' responses, and steps of
    its timeline.
    """
    for task_id, event_id, count in items:
        for _ in range(count):
            delivery = {
                "id": new_id("delivery"),
                "owner": OWNER,
                "event_id": event_id,
                "task_id": task_id,
                "endpoint_id": "ep_gone",
            }
            done = {"state": "delivered", "created_at": tx.now, "finished_at": tx.now}
            tx.connection.execute(insert(deliveries), [{**delivery, **done}])
            tried = {
                "delivery_id": delivery["id"],
                "time": tx.now,
                "duration_ms": 3,
                "answer": b"a" * 90,
            }
            tx.connection.execute(
                insert(attempts), [{"id": new_id("attempt"), **tried} for _ in range(count)]
            )
            tx.step(task_id, "image.stored", note="x" * 50)
    return [None] * len(items)


async def large_task(subject: Subject, count: int = 10) -> str:
    """A task with 20 callbacks, large events, and several attempts at each delivery."""
    task_id = await subject.submitted(
        request={"note": "x" * 900}, body=b"b" * 900, prompt="a private lighthouse"
    )
    for number in range(20):
        await subject.callback(task_id, None, b"?" * (150 + number))
    await subject.settle(task_id, failed(task_id))
    for event in await subject.events(task_id):
        await subject.write(deliver, (task_id, event["id"], count))
    return task_id


async def test_a_pass_removes_all_rows_of_an_old_task(subject: Subject) -> None:
    """It takes several transactions. Only the task's row stays."""
    task_id = await large_task(subject)
    subject.clock.shift(31 * DAY)
    store = Mortal(subject.store)
    assert await store.job(subject.clock.now).apply() == {
        "events": 2,
        "deliveries": 20,
        "tasks": 1,
        "images": 0,
        "files": 0,
    }
    assert store.count >= 20 // retention_sql.DELIVERIES
    assert set((await subject.store.read(row_counts)).values()) == {0}
    task = await subject.task(task_id)
    assert (task["request"], task["body"], task["prompt"]) == ({}, b"", None)
    assert task["erased_at"] == subject.clock.now


@pytest.mark.parametrize("survived", range(1, 12, 3))
async def test_the_next_pass_completes_a_pass_that_died(
    opener: Opener, clock: Any, survived: int
) -> None:
    """The next pass may run in another process."""
    async with opener() as store:
        subject = Subject(store, clock)
        first, second = await large_task(subject, 6), await large_task(subject, 6)
        clock.shift(31 * DAY)
        with pytest.raises(StoreUnavailable):
            await Mortal(store, last=survived).job(clock.now).apply()
        assert (await subject.task(first))["erased_at"] is None
    async with opener("two") as store:
        subject = Subject(store, clock)
        await Mortal(store).job(clock.now).apply()
        assert set((await store.read(row_counts)).values()) == {0}
        for task_id in (first, second):
            assert (await subject.task(task_id))["erased_at"] == clock.now


async def test_an_erasure_removes_all_content_in_one_transaction(subject: Subject) -> None:
    """The response comes after the commit, when no content is left."""
    task_id = await large_task(subject)
    store = Mortal(subject.store)
    assert await erase(store.resources, task_id, OWNER) is None
    assert store.count == 1
    task = await subject.task(task_id)
    assert (task["prompt"], task["request"], task["body"], task["erased_at"]) == (
        None,
        {},
        b"",
        subject.clock.now,
    )
    assert {row["body"] for row in await subject.rows(callbacks)} == {b""}
    assert len(await subject.rows(callbacks)) == 20, "the rows stay for their counts"
    assert {row["answer"] for row in await subject.rows(attempts)} == {None}
    assert await subject.rows(steps) == []
    assert {str(event["data"]["request"]) for event in await subject.events(task_id)} == {"{}"}


async def test_an_erasure_that_dies_before_its_commit_changes_nothing(
    opener: Opener, clock: Any
) -> None:
    """The client got no response and may ask again. If it does not, retention removes the content
    at the end of its time.
    """
    async with opener() as store:
        subject = Subject(store, clock)
        first, second = await large_task(subject, 3), await large_task(subject, 3)
        for task_id in (first, second):
            with pytest.raises(StoreUnavailable):
                await erase(Mortal(store, last=0).resources, task_id, OWNER)
            assert (await subject.task(task_id))["erased_at"] is None
    async with opener("two") as store:
        subject = Subject(store, clock)
        assert await erase(Mortal(store).resources, first, None) is None
        assert (await subject.task(first))["erased_at"] == clock.now
        clock.shift(31 * DAY)
        assert (await Mortal(store).job(clock.now).apply())["tasks"] == 1
        assert (await subject.task(second))["erased_at"] == clock.now
