"""No transaction takes more than its share of what goes, and one that never came is made up for
(contract, limits of the writer).
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
from sqlalchemy import ColumnElement, Connection, Text, func, insert, select, update
from sqlalchemy import cast as sql_cast

from service.db.store import Item, Result, Store
from service.db.tables import attempts, callbacks, deliveries, events, images, replays, steps, tasks
from service.db.transaction import Transaction
from service.errors import StoreUnavailable
from service.resources import Resources
from service.upkeep import batches, retention
from service.upkeep.batches import BARE, LIMIT, Limit, Part, Weight, erased_part, stripped_part
from service.upkeep.expiry import (
    Erased,
    Erasure,
    erase_tasks,
    forget_replays,
    old_deliveries,
    old_tasks,
    strip_tasks,
    thin_deliveries,
    thin_tasks,
)
from service.upkeep.retention import Retention, erase
from tests.contract.subject import DAY, OWNER, Opener, Subject, failed, new_id

SMALL = Limit(7, 2000)
BODIES: dict[str, list[ColumnElement[Any]]] = {
    "tasks": [tasks.c.body, tasks.c.prompt, sql_cast(tasks.c.request, Text)],
    "callbacks": [callbacks.c.body],
    "attempts": [attempts.c.answer],
    "events": [sql_cast(events.c.data, Text)],
}
COUNTED = (callbacks, steps, attempts, deliveries, events, images)


def held(connection: Connection) -> dict[str, int]:
    """How many rows each table has, how many of them have something in them, and how many bytes."""
    found = {}
    for table in COUNTED:
        found[table.name] = connection.execute(select(func.count()).select_from(table)).scalar_one()
    for name, columns in BODIES.items():
        for column in columns:
            found[f"{name}: bytes"] = found.get(f"{name}: bytes", 0) + int(
                connection.execute(select(func.sum(func.length(column)))).scalar() or 0
            )
    for column in (callbacks.c.body, attempts.c.answer):
        filled = select(func.count()).select_from(column.table).where(func.length(column) > 0)
        found[f"{column.table.name} filled"] = connection.execute(filled).scalar_one()
    return found


@dataclass(slots=True)
class Weighed:
    """A store that keeps what each transaction took, and fails after as many as a test says."""

    store: Store
    last: int = 1000
    taken: list[Weight] = field(default_factory=list)
    between: Callable[[], Awaitable[object]] | None = None

    async def write(
        self, operation: Callable[[Transaction, Sequence[Item]], Sequence[Result]], item: Item
    ) -> Result:
        if len(self.taken) == self.last:
            raise StoreUnavailable("the process is dead")
        before = await self.store.read(held)
        result = await self.store.write(operation, item)
        after = await self.store.read(held)
        gone = {name: count - after[name] for name, count in before.items()}
        emptied = sum(
            max(gone[table.name], gone.get(f"{table.name} filled", 0)) for table in COUNTED
        )
        self.taken.append(
            Weight(emptied, sum(count for name, count in gone.items() if name.endswith("bytes")))
        )
        if self.between:
            await self.between()
        return result

    async def read(self, query: Callable[..., Any], *arguments: Any) -> Any:
        return await self.store.read(query, *arguments)

    @property
    def resources(self) -> Resources:
        return cast("Resources", SimpleNamespace(store=self, blobs=Blobs()))

    def job(self, now: int) -> Retention:
        return Retention(self.resources, 30, None, lambda: now)

    def most(self) -> Weight:
        return Weight(
            max(weight.rows for weight in self.taken), max(weight.bytes for weight in self.taken)
        )


class Blobs:
    async def delete(self, name: str) -> None:
        raise AssertionError(f"{name}: no picture was stored")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that a few rows reach."""
    monkeypatch.setattr(batches, "LIMIT", SMALL)
    monkeypatch.setattr(batches, "BARE", 300)
    monkeypatch.setattr(retention, "PAUSE_S", 0)


def gather(tx: Transaction, items: Sequence[tuple[str, str, int]]) -> list[None]:
    """Attempts, with what subscribers answered, and lines of the timeline: so many for a task's
    event.
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


async def laden(subject: Subject, count: int = 10, **different: Any) -> str:
    """A task with as many callbacks as there may be, events with all that was asked for, and
    tenfold attempts at each delivery.
    """
    asked = {"note": "x" * 900}
    task_id = await subject.submitted(request=asked, body=b"b" * 900, **different)
    for number in range(20):
        await subject.callback(task_id, None, b"?" * (150 + number))
    await subject.settle(task_id, failed(task_id))
    for event in await subject.events(task_id):
        await subject.write(gather, (task_id, event["id"], count))
    return task_id


async def left(subject: Subject) -> dict[str, int]:
    return await subject.store.read(held)


def check(weighed: Weighed, at_least: int) -> None:
    """So many transactions, none of them over the limit; a row with more than that alone is a
    task's or an event's.
    """
    most, alone = weighed.most(), 3000
    assert len([weight for weight in weighed.taken if weight.rows]) >= at_least
    assert most.rows <= SMALL.rows
    assert most.bytes <= max(SMALL.bytes, alone)
    for weight in weighed.taken:
        assert weight.bytes <= SMALL.bytes or weight.rows <= 1, weight


# --- limits ---


def test_weights_fit_until_either_is_too_much() -> None:
    """The first that does not fit ends it, whatever comes after."""
    limit = Limit(3, 100)
    assert limit.fits([]) == 0
    assert limit.fits([Weight(1, 50), Weight(1, 50), Weight(1, 0)]) == 3
    assert limit.fits([Weight(1, 0)] * 4) == 3
    assert limit.fits([Weight(1, 50), Weight(1, 51), Weight(1, 0)]) == 1
    assert limit.fits([Weight(4, 0), Weight(1, 0)]) == 0


def test_a_transactions_share_is_far_below_what_may_be_waited_for() -> None:
    """A callback's body fits; what is written while half a MiB is overwritten takes a tenth of 50
    ms.
    """
    assert 256 << 10 < LIMIT.bytes <= 1 << 19
    assert LIMIT.rows <= 100
    assert LIMIT.bytes // LIMIT.rows > BARE


# --- what is old ---


async def test_one_task_with_very_much_goes_in_several_transactions(subject: Subject) -> None:
    """Of rows and of bytes none takes more than its share, and nothing is left but the line."""
    task_id = await laden(subject)
    subject.clock.shift(31 * DAY)
    weighed = Weighed(subject.store)
    assert await weighed.job(subject.clock.now).apply() == {
        "events": 2,
        "deliveries": 20,
        "tasks": 1,
        "images": 0,
    }
    check(weighed, 200 // SMALL.rows)
    assert {name: count for name, count in (await left(subject)).items() if count} == {
        "tasks: bytes": len("{}")
    }
    assert (await subject.task(task_id))["erased_at"] == subject.clock.now


async def test_ordinary_tasks_share_a_transaction(subject: Subject) -> None:
    """As many as fit; they come the oldest first, and one that does not fit begins the next."""
    made = []
    for size in (10, 10, 1990, 10):
        task_id = await subject.submitted(request={}, body=b"x" * size)
        await subject.settle(task_id, failed(task_id))
        made.append(task_id)
        subject.clock.shift(1)
    batches = []
    limit = Limit(100, 2000)
    while (old := await subject.store.read(old_tasks, subject.clock.now, limit, 9)) is not None:
        assert old.part is None or old.part.of == made[2]
        batches.append(old.whole)
        if old.part:
            assert await subject.write(thin_tasks, old.part) > 0
        else:
            assert await subject.write(strip_tasks, old.whole) == len(old.whole)
    assert batches == [made[:2], [], made[2:3], made[3:]]


@pytest.mark.parametrize("survived", range(1, 12, 3))
async def test_a_pass_that_dies_between_two_transactions_is_made_up_for(
    opener: Opener, clock: Any, survived: int
) -> None:
    """Whatever is left of a task then is found by the next one, also by another process."""
    async with opener() as store:
        subject = Subject(store, clock)
        task_id = await laden(subject, 3)
        clock.shift(31 * DAY)
        weighed = Weighed(store, last=survived)
        with pytest.raises(StoreUnavailable):
            await weighed.job(clock.now).apply()
        assert (await subject.task(task_id))["erased_at"] is None
    async with opener("two") as store:
        await Weighed(store).job(clock.now).apply()
        found = await store.read(held)
        assert {name: count for name, count in found.items() if count} == {
            "tasks: bytes": len("{}")
        }


async def test_a_task_that_is_taken_up_again_loses_nothing_more(subject: Subject) -> None:
    """Between the look at it and the transaction: what was to go stays."""
    task_id = await subject.submitted()
    for number in range(20):
        await subject.callback(task_id, None, b"?" * (150 + number))
    await subject.cancel(task_id)
    part = await subject.store.read(stripped_part, task_id, SMALL)
    before = await left(subject)
    assert not part.whole
    assert await subject.write(thin_tasks, part) == 0, "the upstream is asked about it"
    assert await left(subject) == before


async def test_attempts_of_a_delivery_that_is_tried_again_stay(subject: Subject) -> None:
    """Between the look at it and the transaction."""
    task_id = await laden(subject)
    told = [event["id"] for event in await subject.events(task_id)]
    old = await subject.store.read(old_deliveries, told, SMALL)
    assert old is not None
    assert old.part is not None

    def again(tx: Transaction, ids: Sequence[str]) -> list[None]:
        for id in ids:
            tx.change(deliveries, id, {"state": "pending"})
        return [None] * len(ids)

    await subject.write(again, old.part.of)
    assert await subject.write(thin_deliveries, old.part) == 0
    assert len(await subject.rows(attempts, delivery_id=old.part.of)) == 10


@dataclass(slots=True)
class Hasty(Weighed):
    """A store in which all that a pass looks at is taken up again before it goes."""

    async def read(self, query: Callable[..., Any], *arguments: Any) -> Any:
        found = await self.store.read(query, *arguments)
        if query in (old_tasks, old_deliveries):
            await self.store.write(taken_up, None)
        return found


def taken_up(tx: Transaction, items: Sequence[None]) -> list[None]:
    tx.connection.execute(update(deliveries).values(state="pending"))
    tx.connection.execute(update(tasks).values(settle_due_at=tx.now))
    return [None] * len(items)


@pytest.mark.parametrize("limit", [SMALL, Limit(1000, 100_000)])
async def test_a_pass_takes_nothing_that_is_taken_up_again_and_comes_to_its_end(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, limit: Limit
) -> None:
    """Whether it would have gone in parts or as a whole."""
    monkeypatch.setattr(batches, "LIMIT", limit)
    await laden(subject)
    subject.clock.shift(31 * DAY)
    before = await left(subject)
    removed = await Hasty(subject.store).job(subject.clock.now).apply()
    assert removed == {"events": 0, "deliveries": 0, "tasks": 0, "images": 0}
    assert await left(subject) == before


async def test_no_more_replays_go_at_once_than_fit(subject: Subject) -> None:
    """All of them in the end."""
    for _ in range(9):
        await subject.replay()

    def ended(tx: Transaction, items: Sequence[None]) -> list[None]:
        tx.connection.execute(update(replays).values(finished_at=tx.now))
        return [None] * len(items)

    await subject.write(ended, None)
    counts = [await subject.write(forget_replays, subject.clock.now) for _ in range(3)]
    assert counts == [7, 2, 0]


# --- erasure ---


async def test_one_task_with_very_much_is_erased_in_several_transactions(subject: Subject) -> None:
    """The answer comes after the last: nothing of the content is left then."""
    task_id = await laden(subject, prompt="a private lighthouse")
    weighed = Weighed(subject.store)
    assert await erase(weighed.resources, task_id, OWNER) is None
    check(weighed, 200 // SMALL.rows)
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
    again = Weighed(subject.store)
    assert await erase(again.resources, task_id, OWNER) is None
    assert again.taken == [Weight(0, 0)]


@pytest.mark.parametrize("survived", range(1, 9, 3))
async def test_an_erasure_that_dies_between_two_transactions_ends_when_it_is_asked_for_again(
    opener: Opener, clock: Any, survived: int
) -> None:
    """Its client had no answer. If it never asks again, the task goes when its days are over."""
    async with opener() as store:
        subject = Subject(store, clock)
        first, second = await laden(subject, 3), await laden(subject, 3)
        for task_id in (first, second):
            with pytest.raises(StoreUnavailable):
                await erase(Weighed(store, last=survived).resources, task_id, OWNER)
            assert (await subject.task(task_id))["erased_at"] is None
    async with opener("two") as store:
        subject = Subject(store, clock)
        assert await erase(Weighed(store).resources, first, None) is None
        assert (await subject.task(first))["erased_at"] == clock.now
        part = await store.read(erased_part, first, Limit(1000, 1 << 20))
        assert (part.ids, part.whole) == ({}, True)
        clock.shift(31 * DAY)
        assert (await Weighed(store).job(clock.now).apply())["tasks"] == 1
        assert (await subject.task(second))["erased_at"] == clock.now


async def test_what_comes_while_a_task_is_erased_goes_too(subject: Subject) -> None:
    """Callbacks and lines of its timeline, between any two transactions."""
    task_id = await laden(subject, 3)
    (event, *_) = await subject.events(task_id)
    weighed = Weighed(subject.store)

    async def more() -> None:
        if len(weighed.taken) < 4:
            await subject.callback(task_id, failed(task_id, f"code_{len(weighed.taken)}"), b"more")
            await subject.write(gather, (task_id, event["id"], 1))

    weighed.between = more
    assert await erase(weighed.resources, task_id, OWNER) is None
    assert {row["body"] for row in await subject.rows(callbacks)} == {b""}
    assert {row["answer"] for row in await subject.rows(attempts)} == {None}
    assert await subject.rows(steps) == []


async def test_erasures_together_take_no_more_than_one(subject: Subject) -> None:
    """In one transaction: who does not fit is left, untouched; small ones go together."""
    large = [await laden(subject, 3) for _ in range(3)]
    parts = [await subject.store.read(erased_part, task_id, SMALL) for task_id in large]
    before = await left(subject)
    asked = [Erasure(task_id, None, part) for task_id, part in zip(large, parts, strict=True)]
    assert await subject.batch(erase_tasks, asked) == [Erased(left=True)] * 3
    after = await left(subject)
    assert (
        before["callbacks filled"] - after["callbacks filled"]
        == len(parts[0].some(callbacks))
        <= SMALL.rows
    )
    tiny = [
        Erasure(f"task_{number}", None, Part("", {}, Weight(1, 10), whole=True))
        for number in range(3)
    ]
    assert await subject.batch(erase_tasks, tiny) == [Erased("missing")] * 3


async def test_a_part_of_anothers_task_does_not_go(subject: Subject) -> None:
    """Nor of one that has not ended: who asks is told before anything is taken."""
    ended, going = await laden(subject, 3), await subject.submitted()
    for number in range(20):
        await subject.callback(going, None, b"?" * (150 + number))
    before = await left(subject)
    for task_id, owner, refused in ((ended, "other", "missing"), (going, OWNER, "submitted")):
        assert await erase(Weighed(subject.store).resources, task_id, owner) == refused
    assert await left(subject) == before
