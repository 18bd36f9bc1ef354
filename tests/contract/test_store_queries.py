"""Queries: lists page by page, a task's timeline, and the figures of the gauges (docs/api.md,
docs/observability.md).
"""

from typing import Any

from service.db.paging import After, Selection
from service.db.queues import QUEUES
from service.db.tables import deliveries
from service.images.downloads import image_and_origin
from service.tasks import task_queries
from service.tasks.state import State
from service.upkeep import store_figures
from tests.contract.subject import (
    DAY,
    OWNER,
    SECOND,
    Subject,
    completed,
    failed,
    processing,
    stored,
)

URL = "https://r.test/0"


async def test_tasks_are_listed_newest_first_page_by_page(subject: Subject) -> None:
    """Each task is listed once, also when several have the same millisecond."""
    ids = []
    for number in range(7):
        ids.append(await subject.queued())
        subject.clock.shift(number % 2)
    seen: list[str] = []
    after: After = None
    for size in (3, 3, 1):
        page = await subject.store.read(task_queries.task_list, Selection(OWNER, 3, after))
        assert len(page) == size
        seen += [task.id for task, _ in page]
        after = (page[-1][0].created_at, page[-1][0].id)
    assert seen == ids[::-1]
    assert await subject.store.read(task_queries.task_list, Selection(OWNER, 3, after)) == []


async def test_tasks_are_listed_by_owner_state_model_and_metadata(subject: Subject) -> None:
    """The filters work alone and together. Metadata is compared as text, under its exact names."""
    one = await subject.queued(metadata={"order": "7", "it's": 'a "b"'})
    two = await subject.submitted(model="other-model", metadata={"order": "8"})
    three = await subject.queued(owner="other", metadata={})

    async def listed(owner: str | None, **more: Any) -> list[str]:
        wanted = Selection(owner, 9)
        found = await subject.store.read(task_queries.task_list, wanted, **more)
        return [task.id for task, _ in found]

    assert await listed(None) == [three, two, one]
    assert await listed(OWNER) == [two, one]
    assert await listed(OWNER, state="queued") == [one]
    assert await listed(OWNER, model_name="other-model") == [two]
    assert await listed(OWNER, metadata={"order": "8"}) == [two]
    assert await listed(OWNER, metadata={"order": "7", "it's": 'a "b"'}) == [one]
    assert await listed(OWNER, metadata={"order": "7"}, state="submitted") == []
    assert await listed(None, metadata={"none": ""}) == []


async def test_a_list_has_what_was_created_between_two_times(subject: Subject) -> None:
    """The first time counts and the second one does not. Pages stay within both."""
    ids = []
    for _ in range(4):
        ids.append(await subject.queued())
        subject.clock.shift(SECOND)
    start = subject.clock.now - 4 * SECOND

    async def listed(**times: Any) -> list[str]:
        found = await subject.store.read(task_queries.task_list, Selection(OWNER, 9, **times))
        return [task.id for task, _ in found]

    assert await listed(since=start) == ids[::-1]
    assert await listed(since=start + 1) == ids[:0:-1]
    assert await listed(until=start + SECOND) == ids[:1]
    assert await listed(since=start + SECOND, until=start + 3 * SECOND) == [ids[2], ids[1]]
    after = (start + 2 * SECOND, ids[2])
    assert await listed(since=start + SECOND, until=start + 3 * SECOND, after=after) == [ids[1]]
    assert await listed(since=start + SECOND, until=start + SECOND) == []


async def test_a_listed_task_has_its_own_images_in_order(subject: Subject) -> None:
    one = await subject.storing("https://r.test/b", "https://r.test/a")
    for image in reversed(await subject.images(one)):
        await subject.download(image, stored(image))
    two = await subject.queued()
    tasks = await subject.store.read(task_queries.task_list, Selection(OWNER, 9))
    listed = {task.id: images for task, images in tasks}
    assert [image.id for image in listed[one]] == [row["id"] for row in await subject.images(one)]
    assert [image.position for image in listed[one]] == [0, 1]
    assert listed[two] == []
    assert await subject.store.read(task_queries.task, one, OWNER) in tasks


async def test_a_task_is_found_by_its_idempotency_key(subject: Subject) -> None:
    """The key belongs to an owner."""
    task_id = await subject.queued(idempotency_key="k", idempotency_hash="h")
    row = await subject.store.read(task_queries.task_by_key, OWNER, "k")
    assert row == (task_id, "h")
    assert await subject.store.read(task_queries.task_by_key, "other", "k") is None


async def test_the_timeline_has_every_step_in_the_order_of_time(subject: Subject) -> None:
    """It goes from `task.queued` to each `delivery.attempted`, with the names of the log. Callbacks
    have their verdict, count and last-seen time.
    """
    endpoint = await subject.endpoint()
    await subject.endpoint("admin", ["*"])
    task_id = await subject.submitted()
    subject.clock.shift(SECOND)
    await subject.callback(task_id, processing(task_id))
    subject.clock.shift(SECOND)
    await subject.callback(task_id, completed(task_id, URL))
    subject.clock.shift(SECOND)
    await subject.callback(task_id, completed(task_id, URL))
    await subject.callback(task_id, failed(task_id))
    subject.clock.shift(SECOND)
    await subject.settle(task_id, completed(task_id, URL))
    subject.clock.shift(SECOND)
    (image,) = await subject.images(task_id)
    await subject.download(image, stored(image))
    subject.clock.shift(SECOND)
    for row in await subject.rows(deliveries):
        await subject.attempt(await subject.claimed("deliver", row["id"]), "delivered")
    lines = await subject.store.read(task_queries.timeline, task_id, OWNER)
    assert [line["step"] for line in lines] == [
        "task.queued",
        "task.submitted",
        "event.emitted",
        "callback.received",
        "callback.received",
        "callback.received",
        "task.confirmed",
        "image.stored",
        "task.settled",
        "event.emitted",
        "delivery.attempted",
        "delivery.attempted",
    ]
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    first = lines[4]
    assert (first["verdict"], first["status"], first["count"]) == ("accepted", "completed", 2)
    assert first["last_seen_at"] > first["time"]
    assert (lines[1]["source"], lines[8]["state"], lines[9]["type"]) == (
        "answer",
        "completed",
        "image.task.completed",
    )
    assert (lines[-1]["endpoint_id"], lines[-1]["status"], lines[-1]["duration_ms"]) == (
        endpoint,
        204,
        12,
    )
    everything = await subject.store.read(task_queries.timeline, task_id, None)
    assert len(everything) == len(lines) + 1, "operators also see the delivery of the conflict"


async def test_settling_reads_the_task_and_its_first_terminal_callback(subject: Subject) -> None:
    """Earlier and later callbacks do not matter."""
    task_id = await subject.submitted()
    row, body = await subject.store.read(task_queries.settling, task_id)
    assert row is not None
    assert (row.id, body) == (task_id, None)
    await subject.callback(task_id, processing(task_id), b"0")
    await subject.callback(task_id, failed(task_id), b"1")
    await subject.callback(task_id, completed(task_id, URL), b"2")
    _, body = await subject.store.read(task_queries.settling, task_id)
    assert body == b"1"
    assert await subject.store.read(task_queries.settling, "task_gone") == (None, None)


async def test_a_download_reads_the_row_of_its_image(subject: Subject) -> None:
    task_id = await subject.storing(URL)
    (image,) = await subject.images(task_id)
    row, _ = await subject.store.read(image_and_origin, image["id"])
    assert row is not None
    assert (row.source_url, row.state, row.task_id) == (URL, "pending", task_id)
    assert (await subject.store.read(image_and_origin, "img_gone"))[0] is None


async def test_the_figures_of_an_empty_store_are_zero(subject: Subject) -> None:
    """Every state and every stage is present. Times are unknown."""
    figures = await subject.store.read(store_figures.figures)
    assert figures == {
        "tasks": {state.value: 0 for state in State},
        "queue_depth": dict.fromkeys([*QUEUES, "inbox"], 0),
        "oldest_unsettled": None,
        "oldest_due_delivery": None,
        "first_link_dies": None,
        "dead_letters": 0,
        "credits": {"reserved": 0, "used": 0, "estimated": 0, "refunded": 0},
    }


async def test_the_figures_count_the_rows_of_the_store(subject: Subject) -> None:
    """They are tasks by state, due rows by stage, the oldest times, and credits in millionths."""
    await subject.endpoint()
    done = await subject.storing("https://r.test/done")
    (image,) = await subject.images(done)
    await subject.download(image, stored(image))
    waiting = await subject.task(await subject.queued())
    task_id = await subject.submitted()
    assert (
        await subject.settle(
            task_id, completed(task_id, URL, credits_used=1_500_000, credits_reserved=2_000_000)
        )
        is State.STORING
    )
    stored_at = subject.clock.now
    (dead, retried, *_) = [row["id"] for row in await subject.rows(deliveries)]
    await subject.attempt(await subject.claimed("deliver", dead), "dead")
    await subject.attempt(await subject.claimed("deliver", retried), "retry", wait_ms=DAY)
    figures = await subject.store.read(store_figures.figures)
    assert {state: count for state, count in figures["tasks"].items() if count} == {
        "completed": 1,
        "queued": 1,
        "storing": 1,
    }
    assert figures["queue_depth"] == {
        "submit": 1,
        "settle": 0,
        "reconcile": 0,
        "download": 1,
        "deliver": 1,
        "redeliver": 1,
        "replay": 0,
        "inbox": 0,
    }
    assert (figures["oldest_unsettled"], figures["first_link_dies"]) == (
        waiting["created_at"],
        stored_at + DAY,
    )
    (fresh,) = await subject.rows(deliveries, state="pending", attempts=0)
    assert (figures["oldest_due_delivery"], figures["dead_letters"]) == (fresh["due_at"], 1)
    credits = figures["credits"]
    assert (credits["reserved"], credits["used"]) == (2_000_000, 1_500_000)
