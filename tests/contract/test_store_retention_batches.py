"""A pass of retention takes several transactions, and a later pass makes up for the ones that never
came.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
from sqlalchemy import Connection, func, insert, select

from service.db.store import Item, Result, Store
from service.db.tables import attempts, callbacks, deliveries, events, steps
from service.db.transaction import Transaction
from service.errors import StoreUnavailable
from service.resources import Resources
from service.upkeep import expiry, retention
from service.upkeep.retention import Retention, erase
from tests.contract.subject import DAY, OWNER, Opener, Subject, failed, new_id

GATHERED = (callbacks, steps, attempts, deliveries, events)


def gathered(connection: Connection) -> dict[str, int]:
    """How many rows each table has that grows with a task."""
    return {
        table.name: connection.execute(select(func.count()).select_from(table)).scalar_one()
        for table in GATHERED
    }


class Mortal:
    """A store that counts its transactions, and fails after as many as a test says."""

    def __init__(self, store: Store, last: int = 1000) -> None:
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
        return Retention(self.resources, 30, None, lambda: now)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that a few rows reach."""
    monkeypatch.setattr(expiry, "EVENTS", 2)
    monkeypatch.setattr(expiry, "DELIVERIES", 3)
    monkeypatch.setattr(expiry, "TASKS", 1)
    monkeypatch.setattr(retention, "PAUSE_S", 0)


def deliver(tx: Transaction, items: Sequence[tuple[str, str, int]]) -> list[None]:
    """Finished deliveries of a task's event with what subscribers answered, and lines of the
    timeline: so many of each.
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


async def laden(subject: Subject, count: int = 10) -> str:
    """A task with as many callbacks as there may be, events with all that was asked for, and
    tenfold attempts at each delivery.
    """
    task_id = await subject.submitted(
        request={"note": "x" * 900}, body=b"b" * 900, prompt="a private lighthouse"
    )
    for number in range(20):
        await subject.callback(task_id, None, b"?" * (150 + number))
    await subject.settle(task_id, failed(task_id))
    for event in await subject.events(task_id):
        await subject.write(deliver, (task_id, event["id"], count))
    return task_id


async def test_all_that_a_task_has_gathered_goes(subject: Subject) -> None:
    """In several transactions; nothing is left but the line."""
    task_id = await laden(subject)
    subject.clock.shift(31 * DAY)
    store = Mortal(subject.store)
    assert await store.job(subject.clock.now).apply() == {
        "events": 2,
        "deliveries": 20,
        "tasks": 1,
        "images": 0,
    }
    assert store.count >= 20 // expiry.DELIVERIES
    assert set((await subject.store.read(gathered)).values()) == {0}
    task = await subject.task(task_id)
    assert (task["request"], task["body"], task["prompt"]) == ({}, b"", None)
    assert task["erased_at"] == subject.clock.now


@pytest.mark.parametrize("survived", range(1, 12, 3))
async def test_a_pass_that_dies_between_two_transactions_is_made_up_for(
    opener: Opener, clock: Any, survived: int
) -> None:
    """Whatever is left of a task then is found by the next one, also by another process."""
    async with opener() as store:
        subject = Subject(store, clock)
        first, second = await laden(subject, 6), await laden(subject, 6)
        clock.shift(31 * DAY)
        with pytest.raises(StoreUnavailable):
            await Mortal(store, last=survived).job(clock.now).apply()
        assert (await subject.task(first))["erased_at"] is None
    async with opener("two") as store:
        subject = Subject(store, clock)
        await Mortal(store).job(clock.now).apply()
        assert set((await store.read(gathered)).values()) == {0}
        for task_id in (first, second):
            assert (await subject.task(task_id))["erased_at"] == clock.now


async def test_all_that_a_task_has_gathered_is_erased_at_once(subject: Subject) -> None:
    """The answer comes after the commit: nothing of the content is left then."""
    task_id = await laden(subject)
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
    assert len(await subject.rows(callbacks)) == 20, "as counted"
    assert {row["answer"] for row in await subject.rows(attempts)} == {None}
    assert await subject.rows(steps) == []
    assert {str(event["data"]["request"]) for event in await subject.events(task_id)} == {"{}"}


async def test_an_erasure_that_dies_before_its_commit_changes_nothing(
    opener: Opener, clock: Any
) -> None:
    """Its client had no answer. It may ask again, and if it never does, the task goes when its days
    are over.
    """
    async with opener() as store:
        subject = Subject(store, clock)
        first, second = await laden(subject, 3), await laden(subject, 3)
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
