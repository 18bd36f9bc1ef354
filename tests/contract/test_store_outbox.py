"""The outbox: one order that readers can trust, one terminal event per task, and deliveries in the
same transaction (docs/concepts.md).
"""

import asyncio
from collections.abc import Sequence

import pytest
from sqlalchemy import insert
from sqlalchemy.exc import IntegrityError

from service.db.tables import counters, deliveries, events, steps
from service.db.transaction import Emitted, Transaction
from service.events import outbox
from service.events.deliveries import delivery_to_send
from service.events.feed import event_list
from service.ids import sequence_text
from service.links import Links
from service.tasks import task_queries
from service.tasks.accept import insert_tasks
from service.tasks.document import task_document
from service.tasks.state import State
from tests.contract.subject import (
    MINUTE,
    Opener,
    Subject,
    accepted,
    completed,
    failed,
    new_id,
    stored,
    upstream_id,
)

URL = "https://r.test/0"

LINKS = Links("https://d.test")


def announce(tx: Transaction, types: Sequence[str]) -> list[None]:
    """An operation that emits an operators' event of each type."""
    for type in types:
        outbox.emit_operators(tx, type, {"key": type})
    return [None] * len(types)


async def test_sequences_are_dense_and_in_the_order_of_commits(subject: Subject) -> None:
    """They start at 1 and have no gaps. Within a batch, they follow the order of the operations."""
    for number in range(3):
        await subject.batch(announce, [f"test.{number}", f"test.{number}"])
    rows = await subject.events()
    assert [(row["sequence"], row["type"]) for row in rows] == [
        (1, "test.0"),
        (2, "test.0"),
        (3, "test.1"),
        (4, "test.1"),
        (5, "test.2"),
        (6, "test.2"),
    ]
    assert [row["value"] for row in await subject.rows(counters, name="events")] == [6]


async def test_a_rolled_back_event_uses_no_sequence(subject: Subject) -> None:
    """The counter is rolled back with its transaction."""

    def broken(tx: Transaction, types: Sequence[str]) -> list[None]:
        announce(tx, types)
        outbox.flush(tx)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await subject.write(broken, "test.lost")
    await subject.write(announce, "test.kept")
    assert [(row["sequence"], row["type"]) for row in await subject.events()] == [(1, "test.kept")]


async def test_events_reach_the_workers_after_the_commit(subject: Subject) -> None:
    """They carry their sequence and their number of deliveries. Listeners for events get a hint."""
    await subject.endpoint(None, ["*"])
    with subject.store.signals.listen("events") as hint:
        await subject.write(announce, "test.told")
        assert await subject.store.signals.wait(hint, 10)
    (emitted,) = subject.places.transactions[-1].emitted
    assert (emitted.sequence, emitted.deliveries, emitted.owner) == (1, 1, "admin")


async def test_a_changed_task_wakes_the_requests_that_wait_for_it(subject: Subject) -> None:
    """Each task that a transaction changed gives a hint, and no other task does."""
    one, other = await subject.queued(), await subject.queued()
    with subject.store.signals.listen(one) as mine, subject.store.signals.listen(other) as others:
        await subject.cancel(one)
        assert await subject.store.signals.wait(mine, 10)
        assert not others.is_set()


async def test_an_event_keeps_the_task_as_it_was(subject: Subject) -> None:
    """Later changes of the task do not change the event. It contains no prompt, and no links,
    because they follow the service's address.
    """
    task_id = await subject.storing(URL)
    (image,) = await subject.images(task_id)
    await subject.download(image, stored(image))
    first, last = await subject.events(task_id)
    found = await subject.store.read(task_queries.task, task_id, None)
    assert found is not None
    assert last["data"] == task_document(*found)
    assert (last["data"]["state"], last["data"]["status"], last["data"]["progress"]) == (
        "completed",
        "completed",
        100,
    )
    assert [image["url"] for image in last["data"]["images"]] == [None]
    assert (first["data"]["state"], first["data"]["images"], first["data"]["upstream_id"]) == (
        "submitted",
        [],
        upstream_id(task_id),
    )
    assert "lighthouse" not in f"{first['data']}{last['data']}"
    assert (last["owner"], last["time"], last["terminal"], first["terminal"]) == (
        "painter",
        subject.clock.now,
        True,
        None,
    )


async def test_a_terminal_event_has_the_time_of_the_callback(subject: Subject) -> None:
    """The metric of the time from callback to event needs it. An earlier event does not have it."""
    task_id = await subject.submitted()
    await subject.callback(task_id, failed(task_id))
    called = subject.clock.now
    subject.clock.shift(MINUTE)
    await subject.settle(task_id, failed(task_id))
    assert [row["called_back_at"] for row in await subject.events(task_id)] == [None, called]


async def test_a_task_has_one_terminal_event_by_constraint(subject: Subject) -> None:
    """Not even a defect can write a second one: its transaction commits nothing."""
    task_id = await subject.completed()

    def again(tx: Transaction, ids: Sequence[str]) -> list[None]:
        tx.step(task_id, "task.settled")
        tx.emitted.append(
            Emitted(tx.id("event"), "painter", "image.task.failed", task_id, {}, terminal=True)
        )
        return [None] * len(ids)

    before = len(await subject.rows(steps))
    with pytest.raises(IntegrityError):
        await subject.write(again, task_id)
    assert await subject.types(task_id) == ["image.task.submitted", "image.task.completed"]
    assert len(await subject.rows(steps)) == before


async def test_a_reader_never_sees_a_sequence_before_a_lower_one(
    two: tuple[Subject, Subject], postgres_opener: Opener
) -> None:
    """Six committers in two processes write. A reader on a third connection goes on after the last
    event that it saw, and misses none.
    """
    writers = [two[n % 2].write(announce, f"test.{n}") for n in range(240)]
    async with postgres_opener("reader") as reader:
        writing = asyncio.gather(*writers)
        seen: list[int] = []
        looks = 0
        while not (writing.done() and len(seen) >= 240):
            entries, after, *_ = await reader.read(
                event_list, LINKS, None, seen[-1] if seen else 0, 1000
            )
            got = [entry.sequence for entry in entries]
            assert got == list(range(len(seen) + 1, len(seen) + 1 + len(got)))
            assert after >= (got[-1] if got else 0)
            seen += got
            looks += 1
            assert looks < 100_000
        await writing
    assert seen == list(range(1, 241))


async def test_an_event_is_delivered_to_each_endpoint_that_subscribes_to_it(
    subject: Subject,
) -> None:
    """An endpoint of an owner gets the events of the owner's tasks. An endpoint without an owner
    gets all owners' events, and `admin` gets operators' events.
    """
    ends = {
        name: await subject.endpoint(owner, types)
        for name, (owner, types) in {
            "mine": ("painter", ["image.task.*"]),
            "mine completed": ("painter", ["image.task.completed", "image.task.*"]),
            "mine failed": ("painter", ["image.task.failed"]),
            "others": ("other", ["*"]),
            "all": (None, ["image.task.*"]),
            "operators": ("admin", ["*"]),
            "all conflicts": (None, ["callback.conflict"]),
        }.items()
    }
    names = {id: name for name, id in ends.items()}
    task_id = await subject.submitted()
    await subject.callback(task_id, failed(task_id))
    await subject.callback(task_id, completed(task_id, URL))
    await subject.settle(task_id, failed(task_id))
    types = {row["id"]: row["type"].removeprefix("image.task.") for row in await subject.events()}
    rows = await subject.rows(deliveries)
    assert sorted((types[row["event_id"]], names[row["endpoint_id"]]) for row in rows) == [
        ("callback.conflict", "all conflicts"),
        ("callback.conflict", "operators"),
        ("failed", "all"),
        ("failed", "mine"),
        ("failed", "mine completed"),
        ("failed", "mine failed"),
        ("submitted", "all"),
        ("submitted", "mine"),
        ("submitted", "mine completed"),
    ]
    assert {(names[row["endpoint_id"]], row["owner"]) for row in rows} >= {
        ("mine", "painter"),
        ("all", "admin"),
        ("operators", "admin"),
    }
    assert {
        (row["state"], row["due_at"] is not None, row["attempts"], row["task_id"]) for row in rows
    } == {("pending", True, 0, task_id)}


async def test_a_disabled_endpoint_gets_no_deliveries_and_a_paused_one_does(
    subject: Subject,
) -> None:
    """A worker puts the paused endpoint's deliveries on hold at their first attempt."""
    disabled, paused = await subject.endpoint(), await subject.endpoint()
    await subject.change(disabled, status="disabled")
    await subject.change(paused, status="paused")
    await subject.submitted()
    assert [row["endpoint_id"] for row in await subject.rows(deliveries)] == [paused]


async def test_a_tasks_own_callback_url_gets_the_terminal_event_alone(subject: Subject) -> None:
    """It is one delivery without an endpoint that belongs to the owner and has all that an attempt
    needs.
    """
    await subject.key("painter", b"callback secret")
    task_id = await subject.completed(callback_url="https://c.test/done")
    (row,) = await subject.rows(deliveries)
    assert (row["endpoint_id"], row["owner"], row["task_id"]) == (None, "painter", task_id)
    assert row["event_id"] == (await subject.events(task_id))[-1]["id"]
    delivery = await subject.store.read(delivery_to_send, row["id"])
    assert delivery is not None
    assert delivery.event is not None
    assert (delivery.endpoint_status, delivery.url, delivery.secret) == (
        None,
        "https://c.test/done",
        b"callback secret",
    )
    assert delivery.event["type"] == "image.task.completed"


async def test_operators_events_of_a_task_do_not_go_to_its_callback_url(subject: Subject) -> None:
    task_id = await subject.submitted(callback_url="https://c.test/done")
    await subject.callback(task_id, failed(task_id))
    await subject.callback(task_id, completed(task_id, URL))
    assert await subject.types(task_id) == ["image.task.submitted", "callback.conflict"]
    assert await subject.rows(deliveries) == []


async def test_an_event_its_state_and_its_deliveries_are_one_commit(subject: Subject) -> None:
    """A transaction that fails after the outbox was written leaves no event and no delivery."""
    await subject.endpoint()
    lease = await subject.submitting()

    def fails_late(tx: Transaction, items: Sequence[str]) -> list[None]:
        outbox.emit_operators(tx, "test.first", {})
        outbox.flush(tx)
        tx.connection.execute(
            insert(events).values(
                sequence=1, id=new_id("event"), owner="x", type="x", time=0, data={}
            )
        )
        return [None] * len(items)

    with pytest.raises(IntegrityError):
        await subject.write(fails_late, "x")
    assert (await subject.events(), await subject.rows(deliveries)) == ([], [])
    assert await subject.submission(lease, accepted("task-unified-1")) is State.SUBMITTED
    assert [(row["sequence"], row["type"]) for row in await subject.events()] == [
        (1, "image.task.submitted")
    ]


async def test_events_are_listed_after_a_sequence_by_type_task_and_owner(subject: Subject) -> None:
    """`next_after` is the last sequence that the query examined. For a full page, it is the last
    event of the page.
    """
    one = await subject.submitted()
    two = await subject.submitted(owner="other")
    await subject.cancel(one)
    await subject.write(announce, "callback.conflict")
    await subject.write(announce, "imagextask.odd")

    async def listed(*arguments: object, **more: object) -> tuple[list[str], int]:
        # each case names some arguments
        entries, after, *_ = await subject.store.read(event_list, LINKS, *arguments, **more)  # type: ignore[arg-type]
        return [
            f"{entry.type.removeprefix('image.task.')}:{entry.sequence}" for entry in entries
        ], after

    assert await listed(None, 0, 9) == (
        ["submitted:1", "submitted:2", "cancelled:3", "callback.conflict:4", "imagextask.odd:5"],
        5,
    )
    assert await listed("painter", 0, 9) == (["submitted:1", "cancelled:3"], 5)
    assert await listed("painter", 0, 1) == (["submitted:1"], 1)
    assert await listed("painter", 1, 1) == (["cancelled:3"], 3)
    assert await listed("painter", 3, 9) == ([], 5)
    assert await listed(None, 7, 9) == ([], 7)
    assert await listed(None, 0, 9, ["image.task.*"]) == (
        ["submitted:1", "submitted:2", "cancelled:3"],
        5,
    )
    assert await listed(None, 0, 9, ["image.task.cancelled", "callback.conflict"]) == (
        ["cancelled:3", "callback.conflict:4"],
        5,
    )
    assert (await listed(None, 0, 9, ["*"]))[0] == (await listed(None, 0, 9))[0]
    assert await listed(None, 0, 9, (), two) == (["submitted:2"], 5)
    assert await listed("painter", 0, 9, (), two) == ([], 5)
    assert sequence_text(5) == "00000000000000000005"


async def test_an_empty_outbox_returns_the_requested_sequence(subject: Subject) -> None:
    assert await subject.store.read(event_list, LINKS, None, 0, 9) == ([], 0, 0, False)
    assert len(await subject.batch(insert_tasks, [subject.wish()])) == 1
    assert await subject.store.read(event_list, LINKS, None, 0, 9) == ([], 0, 0, False)
