"""What goes and what stays: a task erased by its owner, and everything whose days are over
(contract sections 2 and 3).
"""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from sqlalchemy import Connection, update

from service.db.clock import wall_clock
from service.db.readiness import mark
from service.db.tables import attempts, callbacks, deliveries, events, metadata, replays, steps
from service.db.transaction import Transaction
from service.events.deliveries import (
    DeliveryAttempt,
    DeliveryOutcome,
    delivery_to_send,
    record_attempts,
)
from service.events.feed import event_list
from service.images.downloads import shown_image
from service.images.sweep import orphans
from service.tasks import task_queries
from service.tasks.cancel import Cancellation, cancel_tasks
from service.tasks.state import State
from service.upkeep import expiry
from service.upkeep.expiry import (
    Erased,
    Erasure,
    OldEvents,
    erase_tasks,
    forget_deliveries,
    forget_events,
    forget_images,
    forget_replays,
    old_events,
    strip_tasks,
)
from service.upstreams.base import Report
from tests.contract.subject import (
    DAY,
    OWNER,
    Opener,
    Subject,
    completed,
    failed,
    new_id,
    stored,
    upstream_id,
)
from tests.stores import open_postgres

URL = "https://r.test/0"
SECRET = "a very private lighthouse"
PRIVATE: dict[str, Any] = {
    "prompt": SECRET,
    "request": {"negative_prompt": SECRET},
    "metadata": {"customer": SECRET},
    "body": SECRET.encode(),
    "callback_url": f"https://c.test/{SECRET}",
}


async def erase(subject: Subject, task_id: str, owner: str | None = OWNER) -> Erased:
    return await subject.write(erase_tasks, Erasure(task_id, owner))


async def everything(subject: Subject) -> str:
    """Every value of every row, as text."""
    return "\n".join(
        [str(dict(row)) for table in metadata.sorted_tables for row in await subject.rows(table)]
    )


async def outbox(subject: Subject, before: int) -> tuple[int, int]:
    """Removes old deliveries and events; how many of each."""
    last, counts = 0, [0, 0]
    while (page := await subject.store.read(old_events, last, before)) is not None:
        while gone := await subject.write(forget_deliveries, page.events):
            counts[0] += gone
        counts[1] += await subject.write(forget_events, page.events)
        last = page.last
    return counts[0], counts[1]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that a few rows reach."""
    monkeypatch.setattr(expiry, "EVENTS", 2)
    monkeypatch.setattr(expiry, "DELIVERIES", 2)


async def forgotten(subject: Subject) -> int:
    """Up to where the outbox has holes, as a reader is told."""
    return (await subject.store.read(event_list, None, 0, 1))[2]


# --- erasure ---


@pytest.mark.parametrize("state", ["queued", "submitting", "uncertain", "submitted", "storing"])
async def test_a_task_that_has_not_ended_is_not_erased(subject: Subject, state: str) -> None:
    """The refusal names its state; nothing is changed."""
    made = await (subject.storing(URL) if state == "storing" else getattr(subject, state)())
    task_id = made if isinstance(made, str) else made.key
    before = await everything(subject)
    assert await erase(subject, task_id) == Erased(state)
    assert await everything(subject) == before


async def test_a_task_that_ends_in_the_same_transaction_is_not_erased(subject: Subject) -> None:
    """Its event is not written yet: who asks again gets it."""
    task_id = await subject.submitted()

    def both(tx: Transaction, ids: Sequence[str]) -> list[Erased]:
        assert cancel_tasks(tx, [Cancellation(id, None) for id in ids]) == [None]
        tx.write()
        return erase_tasks(tx, [Erasure(id, None) for id in ids])

    assert (await subject.write(both, task_id)).refused == "cancelled"
    assert (await erase(subject, task_id)).refused is None


async def test_anothers_task_is_missing(subject: Subject) -> None:
    """As one that nobody has; an admin erases anybody's."""
    task_id = await subject.completed(**PRIVATE)
    assert (
        await erase(subject, task_id, "other")
        == await erase(subject, "task_unknown")
        == Erased("missing")
    )
    assert (await subject.task(task_id))["prompt"] == SECRET
    assert (await erase(subject, task_id, None)).refused is None


async def test_nothing_of_the_content_stays(subject: Subject) -> None:
    """Wherever it was kept: task, events, callbacks, pictures, timeline, what subscribers
    answered.
    """
    await subject.key(OWNER)
    endpoint = await subject.endpoint()
    task_id = await subject.submitted(**PRIVATE)
    body = json.dumps({"prompt": SECRET}).encode()
    await subject.callback(task_id, completed(task_id, f"https://r.test/{SECRET}"), body)
    await subject.settle(task_id, completed(task_id, f"https://r.test/{SECRET}"))
    (image,) = await subject.images(task_id)
    await subject.download(image, stored(image))
    (image,) = await subject.images(task_id)
    (told,) = await subject.rows(events, task_id=task_id, terminal=True)
    (sent,) = await subject.rows(deliveries, event_id=told["id"], endpoint_id=endpoint)
    answered = DeliveryAttempt(new_id("attempt"), 200, 12, None, SECRET.encode())
    await subject.write(
        record_attempts,
        DeliveryOutcome(await subject.claimed("deliver", sent["id"]), "delivered", answered),
    )
    assert (await everything(subject)).count(SECRET) >= 7
    assert await erase(subject, task_id) == Erased(None, (image["blob"],))
    left = await everything(subject)
    assert SECRET not in left
    assert image["sha256"] not in left
    assert await subject.rows(steps, task_id=task_id) == []


async def test_a_line_with_its_figures_stays(subject: Subject) -> None:
    """Ids, owner, times, model, state, credits, and the code of an error; its message may quote the
    prompt.
    """
    task_id = await subject.submitted(**PRIVATE, idempotency_key="k", idempotency_hash="h")
    report = failed(task_id)
    await subject.settle(
        task_id, Report(report.upstream_id, report.status, (), report.error, credits_used=3_000_000)
    )
    before = await subject.task(task_id)
    subject.clock.shift(DAY)
    await erase(subject, task_id)
    after = await subject.task(task_id)
    lost: dict[str, Any] = {
        "prompt": None,
        "request": {},
        "metadata": {},
        "body": b"",
        "callback_url": None,
        "erased_at": subject.clock.now,
    }
    error = {"code": "content_policy_violation", "message": "erased", "type": "task_error"}
    assert dict(after) == {**before, **lost, "error": error}
    assert after["credits_used"] == 3_000_000
    lines = await subject.store.read(task_queries.timeline, task_id, None)
    assert [line["step"] for line in lines] == ["event.emitted", "event.emitted", "task.erased"]


async def test_erasing_again_changes_nothing(subject: Subject) -> None:
    """Also a day later."""
    task_id = await subject.completed(**PRIVATE)
    assert len((await erase(subject, task_id)).blobs) == 1
    before = await everything(subject)
    subject.clock.shift(DAY)
    assert await erase(subject, task_id) == Erased()
    assert await everything(subject) == before


async def test_an_erased_image_is_known_as_such(subject: Subject) -> None:
    """Its row stays, with figures, so that its link can say so; the task lists it no more, and its
    blob is nobody's.
    """
    task_id = await subject.completed(URL)
    (image,) = await subject.images(task_id)
    await erase(subject, task_id)
    row = await subject.store.read(shown_image, image["id"])
    assert row is not None
    assert (row.state, row.blob, row.bytes, row.source_url) == ("erased", None, image["bytes"], "")
    found = await subject.store.read(task_queries.task, task_id, OWNER)
    assert found is not None
    assert found[1] == []
    assert await subject.store.read(orphans, [image["blob"]]) == [image["blob"]]


async def test_the_events_of_an_erased_task_stay_in_their_places(subject: Subject) -> None:
    """Whoever reads them later gets the shape of always: id, state and figures, and nothing of the
    content.
    """
    task_id = await subject.completed(**PRIVATE)
    before = await subject.events(task_id)
    await erase(subject, task_id)
    after = await subject.events(task_id)
    for was, now in zip(before, after, strict=True):
        assert {**was, "data": None} == {**now, "data": None}
        assert now["data"] == {**was["data"], "metadata": {}, "request": {}, "images": []}
    assert await forgotten(subject) == 0


async def test_pending_deliveries_go_out_without_content(subject: Subject) -> None:
    """To endpoints; the one to the task's own callback_url is dead, as the address is erased
    too.
    """
    await subject.key(OWNER)
    await subject.endpoint()
    task_id = await subject.completed(**PRIVATE)
    await erase(subject, task_id)
    (own,) = await subject.rows(deliveries, task_id=task_id, endpoint_id=None)
    assert (own["state"], own["due_at"], own["finished_at"]) == ("dead", None, subject.clock.now)
    *_, to_endpoint = await subject.rows(deliveries, task_id=task_id, state="pending")
    lease = await subject.claimed("deliver", to_endpoint["id"])
    parcel = await subject.store.read(delivery_to_send, lease.key)
    assert parcel is not None
    assert parcel.event is not None
    assert parcel.event["data"]["metadata"] == {}
    assert await subject.attempt(lease, "delivered")


async def test_an_attempt_under_way_while_its_task_is_erased_ends_well(subject: Subject) -> None:
    """Its outcome is recorded; it is not tried again."""
    await subject.key(OWNER)
    task_id = await subject.completed(**PRIVATE)
    (row,) = await subject.rows(deliveries, task_id=task_id)
    lease = await subject.claimed("deliver", row["id"])
    await erase(subject, task_id)
    assert await subject.attempt(lease, "retry", wait_ms=1)
    after = await subject.row(deliveries, row["id"])
    assert (after["state"], after["due_at"]) == ("dead", None)


async def test_callbacks_of_an_erased_task_are_counted_without_bodies(subject: Subject) -> None:
    """Those that were there, those that come again and those that are new."""
    task_id = await subject.submitted()
    await subject.callback(task_id, completed(task_id, URL), b"first")
    await subject.settle(task_id, failed(task_id))
    await erase(subject, task_id)
    assert (
        await subject.callback(task_id, completed(task_id, URL), b"first")
    ).verdict == "conflict"
    assert (await subject.callback(task_id, failed(task_id), b"third")).verdict == "duplicate"
    rows = await subject.rows(callbacks, task_id=task_id)
    assert sorted((row["count"], row["body"]) for row in rows) == [(1, b""), (2, b"")]


async def test_late_proof_of_an_erased_task_is_worth_its_credits_alone(subject: Subject) -> None:
    """Nothing is fetched, nobody is told: as after a cancel."""
    task_id = await subject.submitted()
    subject.clock.shift(DAY)
    assert await subject.settle(task_id, None, expires_ms=DAY) is State.EXPIRED
    await erase(subject, task_id)
    before = await subject.types(task_id)
    assert (await subject.callback(task_id, completed(task_id, URL))).verdict == "accepted"
    assert await subject.images(task_id) == []
    await subject.settle(task_id, completed(task_id, URL, credits_used=2_000_000))
    task = await subject.task(task_id)
    assert (task["state"], task["credits_used"], task["settle_due_at"]) == (
        "expired",
        2_000_000,
        None,
    )
    assert await subject.images(task_id) == []
    assert await subject.types(task_id) == before


async def test_a_download_under_way_while_its_task_is_erased_counts_nothing(
    subject: Subject,
) -> None:
    """Of a late result; what it has put is nobody's."""
    task_id = await subject.submitted()
    subject.clock.shift(DAY)
    await subject.settle(task_id, None, expires_ms=DAY)
    await subject.callback(task_id, completed(task_id, URL))
    (image,) = await subject.images(task_id)
    lease = await subject.claimed("download", image["id"])
    await erase(subject, task_id)
    assert await subject.download(image, stored(image), lease) is None
    assert await subject.images(task_id) == []
    name = stored(image).blob
    assert await subject.store.read(orphans, [name]) == [name]


# --- by time ---


async def test_old_tasks_lose_their_content_and_keep_their_pictures(subject: Subject) -> None:
    """Prompt, body, metadata, callbacks and timeline go; figures, images and whatever is younger
    stay.
    """
    old = await subject.submitted(**PRIVATE)
    await subject.callback(old, completed(old, URL))
    await subject.settle(old, completed(old, URL))
    (image,) = await subject.images(old)
    await subject.download(image, stored(image))
    (row,) = await subject.rows(deliveries, task_id=old)
    await subject.attempt(await subject.claimed("deliver", row["id"]), "delivered")
    before = subject.clock.now
    subject.clock.shift(1)
    young = await subject.completed(metadata={"a": "b"})
    assert await subject.write(strip_tasks, before) == 1
    task = await subject.task(old)
    assert (
        task["prompt"],
        task["request"],
        task["metadata"],
        task["body"],
        task["callback_url"],
    ) == (None, {}, {}, b"", None)
    assert (task["state"], task["upstream_id"], task["erased_at"]) == (
        "completed",
        upstream_id(old),
        subject.clock.now,
    )
    assert (await subject.rows(callbacks), await subject.rows(steps, task_id=old)) == ([], [])
    assert [row["state"] for row in await subject.images(old)] == ["stored"]
    assert (await subject.task(young))["metadata"] == {"a": "b"}
    assert await subject.rows(steps, task_id=young) != []
    assert await subject.write(strip_tasks, before) == 0
    assert len((await erase(subject, old)).blobs) == 1  # by its owner, later


async def test_a_task_that_goes_on_keeps_its_content_however_old(subject: Subject) -> None:
    """Not ended; ended but asked about still; its own callback to be sent; a late picture to be
    fetched.
    """
    await subject.key(OWNER)
    await subject.queued()
    await subject.storing(URL)
    cancelled = await subject.submitted()
    await subject.cancel(cancelled)
    await subject.completed(callback_url="https://c.test/done")
    late = await subject.submitted()
    subject.clock.shift(DAY)
    await subject.settle(late, None, expires_ms=DAY)
    await subject.callback(late, completed(late, URL))
    await subject.settle(late, completed(late, URL))
    assert await subject.write(strip_tasks, subject.clock.now + DAY) == 0
    await subject.settle(cancelled, failed(cancelled))
    assert await subject.write(strip_tasks, subject.clock.now + DAY) == 1
    assert (await subject.task(cancelled))["erased_at"] == subject.clock.now


async def test_old_tasks_go_the_oldest_first(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many in a transaction, until none is left."""
    monkeypatch.setattr(expiry, "TASKS", 2)
    made = []
    for _ in range(3):
        made.append(await subject.completed())
        subject.clock.shift(1)
    assert await subject.write(strip_tasks, subject.clock.now) == 2
    erased = [(await subject.task(task_id))["erased_at"] is not None for task_id in made]
    assert erased == [True, True, False]
    assert [await subject.write(strip_tasks, subject.clock.now) for _ in range(2)] == [1, 0]


async def test_what_is_old_is_so_by_the_databases_clock(
    migrated_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine whose own clock was set forward by 30 days removes nothing for that."""
    monkeypatch.setattr("service.db.postgres.wall_clock", lambda: wall_clock() + 30 * DAY)
    async with open_postgres(migrated_database, process="ahead", new_id=new_id) as store:
        assert abs(store.clock() - wall_clock()) < DAY
        first = store.clock()
        await store.write(mark, None)
        assert first <= store.clock() < wall_clock() + DAY


async def test_old_events_go_with_their_deliveries_and_attempts(subject: Subject) -> None:
    """Delivered or dead; younger ones stay; a task cannot end twice for it."""
    endpoint = await subject.endpoint()
    old = await subject.completed()
    for lease in await subject.claim("deliver", 9):
        await subject.attempt(
            lease, "delivered" if lease.key == (await subject.rows(deliveries))[0]["id"] else "gone"
        )
    await subject.change(endpoint, status="paused")
    before = max(row["time"] for row in await subject.events())
    subject.clock.shift(1)
    young = await subject.submitted()
    count = len([row for row in await subject.events() if row["time"] <= before])
    assert await outbox(subject, before) == (2, count)
    assert {row["task_id"] for row in await subject.events()} == {young}
    assert (await subject.rows(attempts), await subject.rows(deliveries, task_id=old)) == ([], [])
    assert await forgotten(subject) == count
    assert await outbox(subject, before) == (0, 0)


async def test_an_event_whose_delivery_is_pending_stays(subject: Subject) -> None:
    """With all its deliveries, however old, also while its endpoint is paused; other events go, and
    readers are told.
    """
    endpoint = await subject.endpoint(types=["image.task.completed"])
    other = await subject.endpoint(types=["image.task.completed"])
    await subject.change(endpoint, status="paused")
    task_id = await subject.completed()
    (mine,) = await subject.rows(deliveries, endpoint_id=endpoint)
    await subject.write(hold, mine["id"])
    (theirs,) = await subject.rows(deliveries, endpoint_id=other)
    await subject.attempt(await subject.claimed("deliver", theirs["id"]), "delivered")
    assert await outbox(subject, subject.clock.now + 99 * DAY) == (0, 1)
    assert await subject.types(task_id) == ["image.task.completed"]
    assert len(await subject.rows(deliveries)) == 2
    assert await forgotten(subject) == 1
    await subject.change(endpoint, status="disabled")
    assert await outbox(subject, subject.clock.now + 99 * DAY) == (2, 1)
    assert await forgotten(subject) == 2


def hold(tx: Transaction, ids: Sequence[str]) -> list[None]:
    """A paused endpoint's delivery: pending, not due."""
    for id in ids:
        tx.change(deliveries, id, {"due_at": None, "lease_until": None})
    return [None] * len(ids)


def again(tx: Transaction, ids: Sequence[str]) -> list[None]:
    """A delivery that had its end is tried once more."""
    for id in ids:
        tx.change(deliveries, id, {"state": "pending", "due_at": tx.now})
    return [None] * len(ids)


async def test_what_is_taken_up_again_before_it_goes_stays(subject: Subject) -> None:
    """A delivery that is pending again when its batch comes, and its event with it."""
    await subject.endpoint(types=["image.task.completed"])
    await subject.completed()
    (row,) = await subject.rows(deliveries)
    await subject.attempt(await subject.claimed("deliver", row["id"]), "gone")
    page = await subject.store.read(old_events, 0, subject.clock.now)
    assert page is not None
    assert len(page.events) == 2
    await subject.write(again, row["id"])
    assert await subject.write(forget_deliveries, page.events) == 0
    assert await subject.write(forget_events, page.events) == 1
    kept = {event["id"] for event in await subject.events()}
    assert kept & set(page.events) == {row["event_id"]}


async def test_deliveries_go_in_batches(subject: Subject) -> None:
    """Of one event as well: it goes after the last of them."""
    for _ in range(5):
        await subject.endpoint(types=["image.task.submitted"])
    await subject.submitted()
    for lease in await subject.claim("deliver", 9):
        await subject.attempt(lease, "delivered")
    page = await subject.store.read(old_events, 0, subject.clock.now)
    assert page is not None
    assert await subject.write(forget_events, page.events) == 0
    counts = [await subject.write(forget_deliveries, page.events) for _ in range(4)]
    assert counts == [2, 2, 1, 0]
    assert await subject.rows(attempts) == []
    assert await subject.write(forget_events, page.events) == 1


async def test_no_more_replays_go_at_once_than_fit(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them in the end."""
    monkeypatch.setattr(expiry, "REPLAYS", 7)
    for _ in range(9):
        await subject.replay()

    def ended(tx: Transaction, items: Sequence[None]) -> list[None]:
        tx.connection.execute(update(replays).values(finished_at=tx.now))
        return [None] * len(items)

    await subject.write(ended, None)
    counts = [await subject.write(forget_replays, subject.clock.now) for _ in range(3)]
    assert counts == [7, 2, 0]


async def test_a_reader_is_told_what_is_no_longer_kept_and_gets_past_it(subject: Subject) -> None:
    """The last place that was emptied never goes back; `next_after` is never before it, also when
    nothing is left.
    """
    await subject.completed()
    assert await subject.store.read(old_events, 0, subject.clock.now) == OldEvents(
        [event["id"] for event in await subject.events()], 2
    )
    await outbox(subject, subject.clock.now)
    assert await subject.store.read(event_list, None, 0, 9) == ([], 2, 2)
    assert await subject.write(forget_events, []) == 0
    assert await forgotten(subject) == 2
    await subject.submitted()
    rows, last, gone = await subject.store.read(event_list, None, 2, 9)
    assert ([row["sequence"] for row in rows], last, gone) == ([3], 3, 2)


async def test_old_images_are_erased_and_their_blobs_named_once(subject: Subject) -> None:
    """By the time they were stored, the oldest first, of tasks that have ended."""
    one = await subject.completed(URL, "https://r.test/1")
    before = subject.clock.now
    subject.clock.shift(1)
    await subject.completed()
    going = await subject.storing("https://r.test/2", "https://r.test/3")
    first, _ = await subject.images(going)
    await subject.download(first, stored(first))
    names = {row["blob"] for row in await subject.images(one)}
    assert set(await subject.write(forget_images, before)) == names
    assert await subject.write(forget_images, before) == []
    assert {row["state"] for row in await subject.images(one)} == {"erased"}
    assert (await subject.task(one))["erased_at"] is None
    assert len(await subject.write(forget_images, subject.clock.now)) == 1, (
        "the task that goes on keeps its own"
    )


async def test_what_is_old_is_found_by_an_index(sqlite_opener: Opener) -> None:
    """However many rows have been dealt with."""
    async with sqlite_opener() as store:

        def plans(connection: Connection) -> list[str]:
            found = []
            for text in (
                (
                    "SELECT id FROM tasks WHERE terminal_at <= 5 AND erased_at IS NULL AND"
                    " settle_due_at IS NULL ORDER BY terminal_at LIMIT 9"
                ),
                (
                    "SELECT id FROM images WHERE blob IS NOT NULL AND stored_at <= 5 ORDER BY"
                    " stored_at LIMIT 9"
                ),
            ):
                (row,) = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}")
                found.append(row.detail)
            return found

        first, second = await store.read(plans)
    assert "ix_tasks_terminal_at" in first
    assert "ix_images_stored_at" in second
