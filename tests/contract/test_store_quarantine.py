"""Bodies of results that were no image: kept for the operator until retention, never shown."""

from service.ids import quarantine_name
from service.images.downloads import Quarantined, Retry, quarantined_bodies, shown_image
from service.images.sweep import orphans
from service.upkeep.retention_sql import strip_tasks
from tests.contract.subject import LOST, SECOND, Subject, stored
from tests.contract.test_store_retention import erase

URL, SHA256 = "https://r.test/0", "0f" * 32


def body(task_id: str, sha256: str = SHA256) -> str:
    return quarantine_name(task_id, 0, sha256)


def no_image(task_id: str) -> Retry:
    kept = Quarantined(body(task_id), 7, SHA256)
    return Retry("no image", SECOND, wrong_sha256=SHA256, quarantined=kept)


async def quarantined(subject: Subject) -> str:
    """A task that failed, with one body in quarantine and one stored image."""
    task_id = await subject.storing(URL, f"{URL}?2")
    first, second = await subject.images(task_id)
    await subject.download(second, stored(second))
    assert await subject.download(first, no_image(task_id)) == "pending"
    assert await subject.download(first, LOST) == "lost"
    return task_id


async def test_a_body_in_quarantine_is_listed_and_not_shown(subject: Subject) -> None:
    """It outlives later failures of another kind. No image counts it."""
    task_id = await quarantined(subject)
    image, _ = await subject.images(task_id)
    listed = await subject.store.read(quarantined_bodies, task_id)
    assert listed == [
        {"index": 0, "blob": body(task_id), "bytes": 7, "sha256": SHA256, "reason": LOST.reason}
    ]
    assert await subject.store.read(shown_image, image["id"]) is None
    assert [each["index"] for each in (await subject.events(task_id))[-1]["data"]["images"]] == [1]


async def test_a_stored_image_takes_the_place_of_a_body_in_quarantine(subject: Subject) -> None:
    task_id = await subject.storing(URL)
    (image,) = await subject.images(task_id)
    await subject.download(image, no_image(task_id))
    assert len(await subject.store.read(quarantined_bodies, task_id)) == 1
    await subject.download(image, stored(image))
    assert await subject.store.read(quarantined_bodies, task_id) == []
    assert [row["blob"] for row in await subject.images(task_id)] == [stored(image).blob]


async def test_the_sweep_keeps_a_body_in_quarantine(subject: Subject) -> None:
    """A body that no row names is an orphan like an image."""
    task_id = await quarantined(subject)
    replaced = body(task_id, "1a" * 32)
    assert await subject.store.read(orphans, [body(task_id), replaced]) == [replaced]


async def test_a_body_in_quarantine_is_erased_with_its_task(subject: Subject) -> None:
    task_id = await quarantined(subject)
    _, second = await subject.images(task_id)
    assert set((await erase(subject, task_id)).blobs) == {body(task_id), stored(second).blob}
    assert await subject.store.read(quarantined_bodies, task_id) == []


async def test_a_body_in_quarantine_goes_with_its_tasks_content(subject: Subject) -> None:
    """The image beside it stays."""
    task_id = await quarantined(subject)
    stripped = await subject.write(strip_tasks, subject.clock.now)
    assert (stripped.tasks, stripped.blobs) == (1, [body(task_id)])
    assert await subject.store.read(quarantined_bodies, task_id) == []
    assert [row["state"] for row in await subject.images(task_id)] == ["lost", "stored"]
