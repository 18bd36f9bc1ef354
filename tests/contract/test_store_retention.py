"""Erasure of a task by its owner, and retention of everything by time (docs/retention.md)."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from sqlalchemy import Connection, update

from service.db.clock import wall_clock
from service.db.paging import Owned
from service.db.tables import attempts, callbacks, deliveries, events, metadata, replays, steps
from service.db.transaction import Transaction
from service.events.deliveries import DeliveryOutcome, delivery_to_send, record_attempts
from service.events.endpoints import DeliveryAttempt
from service.events.feed import event_list
from service.ids import rfc3339
from service.images.downloads import shown_image
from service.images.sweep import orphans
from service.links import Links
from service.tasks import task_queries
from service.tasks.admin import cancel_tasks
from service.tasks.state import State
from service.upkeep import retention_sql
from service.upkeep.retention_sql import (
    Erased,
    OldEvents,
    erase_tasks,
    forget_deliveries,
    forget_events,
    forget_images,
    forget_replays,
    old_events,
    strip_tasks,
)
from service.upkeep.store_figures import mark
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
    "warnings": [SECRET],
    "metadata": {"customer": SECRET},
    "body": SECRET.encode(),
    "callback_url": f"https://c.test/{SECRET}",
}

LINKS = Links("https://d.test")


async def erase(subject: Subject, task_id: str, owner: str | None = OWNER) -> Erased:
    return await subject.write(erase_tasks, Owned(task_id, owner))


async def everything(subject: Subject) -> str:
    """Every value of every row, as text."""
    return "\n".join(
        [str(dict(row)) for table in metadata.sorted_tables for row in await subject.rows(table)]
    )


async def outbox(subject: Subject, before: int) -> tuple[int, int]:
    """Removes old deliveries and events. Returns how many of each."""
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
    monkeypatch.setattr(retention_sql, "EVENTS", 2)
    monkeypatch.setattr(retention_sql, "DELIVERIES", 2)


async def forgotten(subject: Subject) -> int:
    """The last sequence before which the outbox may have gaps, as a reader learns it."""
    return (await subject.store.read(event_list, LINKS, None, 0, 1))[2]


# --- erasure ---


@pytest.mark.parametrize("state", ["queued", "submitting", "uncertain", "submitted", "storing"])
async def test_a_task_that_has_not_ended_is_not_erased(subject: Subject, state: str) -> None:
    """The refusal names the task's state. Nothing changes."""
    made = await (subject.storing(URL) if state == "storing" else getattr(subject, state)())
    task_id = made if isinstance(made, str) else made.key
    before = await everything(subject)
    assert await erase(subject, task_id) == Erased(state)
    assert await everything(subject) == before


async def test_a_task_that_ends_in_the_same_transaction_is_not_erased(subject: Subject) -> None:
    """Its event is not written yet. A second request erases it."""
    task_id = await subject.submitted()

    def both(tx: Transaction, ids: Sequence[str]) -> list[Erased]:
        assert cancel_tasks(tx, [Owned(id, None) for id in ids]) == [None]
        tx.write()
        return erase_tasks(tx, [Owned(id, None) for id in ids])

    assert (await subject.write(both, task_id)).refused == "cancelled"
    assert (await erase(subject, task_id)).refused is None


async def test_another_owners_task_is_missing(subject: Subject) -> None:
    """The answer is the same as for an unknown id. An admin erases any task."""
    task_id = await subject.completed(**PRIVATE)
    assert (
        await erase(subject, task_id, "other")
        == await erase(subject, "task_unknown")
        == Erased("missing")
    )
    assert (await subject.task(task_id))["prompt"] == SECRET
    assert (await erase(subject, task_id, None)).refused is None


async def test_an_erasure_removes_the_content_everywhere(subject: Subject) -> None:
    """It removes it from the task, events, callbacks, images, timeline, and subscribers'
    responses.
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
    (event,) = await subject.rows(events, task_id=task_id, terminal=True)
    (sent,) = await subject.rows(deliveries, event_id=event["id"], endpoint_id=endpoint)
    answered = DeliveryAttempt(new_id("attempt"), 200, 12, None, SECRET.encode())
    await subject.write(
        record_attempts,
        DeliveryOutcome(await subject.claimed("deliver", sent["id"]), "delivered", answered),
    )
    assert (await everything(subject)).count(SECRET) >= 7
    upstream_id = (await subject.task(task_id))["upstream_id"]
    assert await erase(subject, task_id) == Erased(None, (image["blob"],), upstream_id=upstream_id)
    left = await everything(subject)
    assert SECRET not in left
    assert image["sha256"] not in left
    assert await subject.rows(steps, task_id=task_id) == []


async def test_an_erased_task_keeps_its_figures(subject: Subject) -> None:
    """They are ids, owner, times, model, state, credits and the error's code. The error's message
    may quote the prompt, so it goes.
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
        "warnings": None,
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
    task_id = await subject.completed(**PRIVATE)
    assert len((await erase(subject, task_id)).blobs) == 1
    before = await everything(subject)
    subject.clock.shift(DAY)
    upstream_id = (await subject.task(task_id))["upstream_id"]
    assert await erase(subject, task_id) == Erased(upstream_id=upstream_id)
    assert await everything(subject) == before


async def test_an_erased_image_keeps_a_row_with_its_figures(subject: Subject) -> None:
    """Its link can then answer that it is erased. The task does not list it any more, and its blob
    is an orphan.
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


async def test_the_events_of_an_erased_task_keep_their_sequences(subject: Subject) -> None:
    """A later reader gets the usual shape with id, state and figures, and without content."""
    task_id = await subject.completed(**PRIVATE)
    before = await subject.events(task_id)
    await erase(subject, task_id)
    after = await subject.events(task_id)
    erased_at = rfc3339(subject.clock.now)
    bare: dict[str, Any] = {"metadata": {}, "request": {}, "warnings": [], "images": []}
    bare["erased_at"] = erased_at
    for was, now in zip(before, after, strict=True):
        assert {**was, "data": None} == {**now, "data": None}
        assert now["data"] == {**was["data"], **bare}
    assert await forgotten(subject) == 0


async def test_pending_deliveries_of_an_erased_task_have_no_content(subject: Subject) -> None:
    """Endpoints get them. The delivery to the task's own callback_url is dead, because the URL is
    erased too.
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


async def test_an_attempt_under_way_while_its_task_is_erased_is_recorded(subject: Subject) -> None:
    """No retry follows."""
    await subject.key(OWNER)
    task_id = await subject.completed(**PRIVATE)
    (row,) = await subject.rows(deliveries, task_id=task_id)
    lease = await subject.claimed("deliver", row["id"])
    await erase(subject, task_id)
    assert await subject.attempt(lease, "retry", wait_ms=1)
    after = await subject.row(deliveries, row["id"])
    assert (after["state"], after["due_at"]) == ("dead", None)


async def test_callbacks_of_an_erased_task_are_counted_without_bodies(subject: Subject) -> None:
    """This holds for callbacks that were there, that come again, and that are new."""
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


async def test_late_proof_of_an_erased_task_only_records_credits(subject: Subject) -> None:
    """No image is downloaded and no event is emitted, as after a cancel."""
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


async def test_a_download_under_way_while_its_task_is_erased_records_nothing(
    subject: Subject,
) -> None:
    """It belongs to a late result. Its blob is an orphan."""
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


# --- retention by time ---


async def test_old_tasks_lose_their_content_and_keep_their_images(subject: Subject) -> None:
    """Prompt, body, metadata, callbacks and timeline go. Figures, images and younger tasks stay."""
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
    assert (await subject.write(strip_tasks, before)).tasks == 1
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
    assert (await subject.write(strip_tasks, before)).tasks == 0
    assert len((await erase(subject, old)).blobs) == 1  # the owner erases it later


async def test_a_task_with_work_to_do_keeps_its_content_at_any_age(subject: Subject) -> None:
    """It has not ended, a query about it is due, its own callback is to be sent, or a late image is
    to be downloaded.
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
    assert (await subject.write(strip_tasks, subject.clock.now + DAY)).tasks == 0
    await subject.settle(cancelled, failed(cancelled))
    assert (await subject.write(strip_tasks, subject.clock.now + DAY)).tasks == 1
    assert (await subject.task(cancelled))["erased_at"] == subject.clock.now


async def test_old_tasks_go_the_oldest_first(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each transaction takes a limited number until none is left."""
    monkeypatch.setattr(retention_sql, "TASKS", 2)
    made = []
    for _ in range(3):
        made.append(await subject.completed())
        subject.clock.shift(1)
    assert (await subject.write(strip_tasks, subject.clock.now)).tasks == 2
    erased = [(await subject.task(task_id))["erased_at"] is not None for task_id in made]
    assert erased == [True, True, False]
    last = [(await subject.write(strip_tasks, subject.clock.now)).tasks for _ in range(2)]
    assert last == [1, 0]


async def test_age_is_measured_by_the_databases_clock(
    migrated_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine whose own clock is 30 days ahead removes nothing because of that."""
    monkeypatch.setattr("service.db.postgres.wall_clock", lambda: wall_clock() + 30 * DAY)
    async with open_postgres(migrated_database, process="ahead", new_id=new_id) as store:
        assert abs(store.clock() - wall_clock()) < DAY
        await store.write(mark, None)
        assert abs(store.clock() - wall_clock()) < DAY


async def test_old_events_go_with_their_deliveries_and_attempts(subject: Subject) -> None:
    """Their deliveries are delivered or dead. Younger events stay."""
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
    """All its deliveries stay too, at any age, also while the endpoint is paused. Other events go,
    and readers learn of the gap.
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
    """Puts a delivery on hold, as for a paused endpoint: pending and not due."""
    for id in ids:
        tx.change(deliveries, id, {"due_at": None, "lease_until": None})
    return [None] * len(ids)


def retried(tx: Transaction, ids: Sequence[str]) -> list[None]:
    """Makes a finished delivery pending again."""
    for id in ids:
        tx.change(deliveries, id, {"state": "pending", "due_at": tx.now})
    return [None] * len(ids)


async def test_a_delivery_that_is_pending_again_stays_with_its_event(subject: Subject) -> None:
    """It became pending between the read of the old events and its removal."""
    await subject.endpoint(types=["image.task.completed"])
    await subject.completed()
    (row,) = await subject.rows(deliveries)
    await subject.attempt(await subject.claimed("deliver", row["id"]), "gone")
    page = await subject.store.read(old_events, 0, subject.clock.now)
    assert page is not None
    assert len(page.events) == 2
    await subject.write(retried, row["id"])
    assert await subject.write(forget_deliveries, page.events) == 0
    assert await subject.write(forget_events, page.events) == 1
    kept = {event["id"] for event in await subject.events()}
    assert kept & set(page.events) == {row["event_id"]}


async def test_deliveries_of_one_event_go_in_batches(subject: Subject) -> None:
    """The event goes after the last of them."""
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


async def test_replays_go_in_batches(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention_sql, "REPLAYS", 7)
    for _ in range(9):
        await subject.replay()

    def ended(tx: Transaction, items: Sequence[None]) -> list[None]:
        tx.connection.execute(update(replays).values(finished_at=tx.now))
        return [None] * len(items)

    await subject.write(ended, None)
    counts = [await subject.write(forget_replays, subject.clock.now) for _ in range(3)]
    assert counts == [7, 2, 0]


async def test_a_reader_learns_of_removed_events_and_gets_past_them(subject: Subject) -> None:
    """The last removed sequence never goes back. `next_after` is never below it, also when no event
    is left.
    """
    await subject.completed()
    assert await subject.store.read(old_events, 0, subject.clock.now) == OldEvents(
        [event["id"] for event in await subject.events()], 2
    )
    await outbox(subject, subject.clock.now)
    assert await subject.store.read(event_list, LINKS, None, 0, 9) == ([], 2, 2, False)
    assert await subject.write(forget_events, []) == 0
    assert await forgotten(subject) == 2
    await subject.submitted()
    entries, last, gone, _ = await subject.store.read(event_list, LINKS, None, 2, 9)
    assert ([entry.sequence for entry in entries], last, gone) == ([3], 3, 2)


async def test_old_images_are_erased_and_their_blobs_named_once(subject: Subject) -> None:
    """They go by the time at which they were stored, the oldest first, and only of tasks that have
    ended.
    """
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
        "the task that has not ended keeps its image"
    )


async def test_an_index_finds_old_rows(sqlite_opener: Opener) -> None:
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
