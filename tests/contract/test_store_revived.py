"""An operator fetches the lost results of a task again (docs/api.md, "Proof that arrives late")."""

import pytest

from service.db.tables import events
from service.images.downloads import Retry
from service.tasks.admin import REVIVED_MS, reconcile_tasks
from tests.contract.subject import DAY, LOST, MINUTE, SECOND, Subject, completed, stored
from tests.contract.test_store_retention import erase

URL, OTHER, FRESH = "https://r.test/0", "https://r.test/1", "https://r.test/fresh"


async def lost_one(subject: Subject) -> str:
    """A task that failed with `results_lost`. The second of its images is stored."""
    task_id = await subject.storing(URL, OTHER)
    first, second = await subject.images(task_id)
    await subject.download(second, stored(second))
    await subject.download(first, LOST)
    assert (await subject.task(task_id))["error"]["code"] == "results_lost"
    return task_id


async def late_results(subject: Subject, task_id: str) -> list[tuple[int, int]]:
    told = await subject.rows(events, task_id=task_id, type="task.late_result")
    return [(event["data"]["stored"], event["data"]["lost"]) for event in told]


async def test_a_lost_image_is_stored_late(subject: Subject) -> None:
    """State, error and terminal event stand. The image is shown, and operators are told once."""
    task_id = await lost_one(subject)
    before, types = await subject.task(task_id), await subject.types(task_id)
    assert await subject.write(reconcile_tasks, task_id) is None
    image, _ = await subject.images(task_id)
    due_at = subject.clock.now + REVIVED_MS
    assert (image["state"], image["due_at"], image["error"]) == ("pending", due_at, None)
    assert await late_results(subject, task_id) == []
    assert await subject.download(image, stored(image)) == "stored"
    after = await subject.task(task_id)
    assert [after[name] for name in ("state", "error", "terminal_at")] == [
        before[name] for name in ("state", "error", "terminal_at")
    ]
    assert await subject.types(task_id) == [*types, "task.late_result"]
    assert await late_results(subject, task_id) == [(2, 0)]
    assert await subject.write(reconcile_tasks, task_id) is None  # nothing is missing any more
    await subject.settle(task_id, completed(task_id, URL, OTHER))
    assert await late_results(subject, task_id) == [(2, 0)]


async def test_the_upstream_gives_a_fresh_link(subject: Subject) -> None:
    """The query that the operator asked for brings it, also after the old link's time."""
    task_id = await lost_one(subject)
    subject.clock.shift(DAY + MINUTE)
    await subject.write(reconcile_tasks, task_id)
    await subject.settle(task_id, completed(task_id, FRESH, OTHER))
    image, _ = await subject.images(task_id)
    assert (image["state"], image["source_url"]) == ("pending", FRESH)
    assert await subject.download(image, stored(image)) == "stored"
    assert await late_results(subject, task_id) == [(2, 0)]


async def test_an_image_that_the_upstream_has_no_more_is_lost_again(subject: Subject) -> None:
    """After its link's time it has half an hour. Operators learn that the attempt failed."""
    task_id = await lost_one(subject)
    subject.clock.shift(2 * DAY)
    await subject.write(reconcile_tasks, task_id)
    await subject.settle(task_id, None)  # no answer
    assert (await subject.task(task_id))["settle_due_at"] is not None
    await subject.settle(task_id, None, expires_ms=DAY)  # it does not know the task
    assert (await subject.task(task_id))["settle_due_at"] is None
    image, _ = await subject.images(task_id)
    assert subject.clock.now < image["link_dies_at"] <= subject.clock.now + REVIVED_MS
    assert await subject.download(image, Retry("answered 500", SECOND)) == "pending"
    subject.clock.now = image["link_dies_at"]
    assert await subject.download(image, Retry("answered 500", SECOND)) == "lost"
    assert await late_results(subject, task_id) == [(1, 1)]


async def test_the_failures_so_far_do_not_count(subject: Subject) -> None:
    """Neither the wrong bytes nor the dead links of the first life."""
    task_id = await subject.storing(URL)
    (image,) = await subject.images(task_id)
    states = []
    for _ in range(3):
        states.append(await subject.download(image, Retry("no image", SECOND, wrong_sha256="a")))
        subject.clock.shift(6 * MINUTE)
    assert states == ["pending", "pending", "lost"]
    await subject.write(reconcile_tasks, task_id)
    (image,) = await subject.images(task_id)
    assert [image[name] for name in ("wrong_count", "wrong_since", "stale_count")] == [0, None, 0]
    assert await subject.download(image, Retry("no image", SECOND, wrong_sha256="a")) == "pending"


async def test_a_task_that_is_storing_completes_after_all(subject: Subject) -> None:
    """One image was lost, another is pending. The lost one is fetched before the task ends."""
    task_id = await subject.storing(URL, OTHER)
    first, second = await subject.images(task_id)
    await subject.download(first, LOST)
    await subject.write(reconcile_tasks, task_id)
    await subject.download(second, stored(second))
    await subject.download(first, stored(first))
    assert (await subject.task(task_id))["state"] == "completed"


@pytest.mark.parametrize("end", ["erased", "cancelled"])
async def test_an_erased_or_cancelled_task_keeps_nothing(subject: Subject, end: str) -> None:
    if end == "erased":
        task_id = await lost_one(subject)
        await erase(subject, task_id)
    else:
        task_id = await subject.storing(URL, OTHER)
        await subject.download((await subject.images(task_id))[0], LOST)
        await subject.cancel(task_id)
    before = await subject.images(task_id)
    assert await subject.write(reconcile_tasks, task_id) is None
    assert await subject.images(task_id) == before
