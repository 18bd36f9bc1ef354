"""Which blobs may be removed: those that no row names, of tasks that are over and done with."""

from hashlib import sha256

import pytest

from service.images.downloads import Retry
from service.images.sweep import orphans
from tests.contract.subject import DAY, LOST, SECOND, Subject, completed, stored

URL = "https://r.test/0"


def blob(task_id: str, words: str = "left behind") -> str:
    return f"{task_id}/0-{sha256(words.encode()).hexdigest()}.png"


async def test_what_a_row_names_is_kept(subject: Subject) -> None:
    """Of a completed task only what is beside its images is nobody's."""
    task_id = await subject.completed(URL, "https://r.test/1")
    named = [row["blob"] for row in await subject.images(task_id)]
    assert await subject.store.read(orphans, [*named, blob(task_id)]) == [blob(task_id)]


async def test_what_a_callback_alone_named_is_kept_too(subject: Subject) -> None:
    """It is stored while the question is asked, and may count yet."""
    task_id = await subject.submitted()
    await subject.callback(task_id, completed(task_id, URL))
    (image,) = await subject.images(task_id)
    await subject.download(image, stored(image))
    (image,) = await subject.images(task_id)
    assert (image["state"], image["confirmed"]) == ("stored", False)
    assert await subject.store.read(orphans, [image["blob"], blob(task_id)]) == []


@pytest.mark.parametrize("state", ["queued", "submitted", "uncertain", "storing"])
async def test_a_task_that_goes_on_keeps_everything(subject: Subject, state: str) -> None:
    """What is put comes before the row that names it."""
    task_id = await (subject.storing(URL) if state == "storing" else getattr(subject, state)())
    assert await subject.store.read(orphans, [blob(task_id)]) == []


async def test_a_late_result_keeps_everything_until_it_is_saved_or_lost(subject: Subject) -> None:
    """Also of a task that has long ended."""
    task_id = await subject.submitted()
    subject.clock.shift(DAY)
    await subject.settle(task_id, None, expires_ms=DAY)
    assert await subject.store.read(orphans, [blob(task_id)]) == [blob(task_id)]
    await subject.callback(task_id, completed(task_id, URL))
    (image,) = await subject.images(task_id)
    await subject.download(image, Retry("cut off", SECOND, stale=False))
    assert await subject.store.read(orphans, [blob(task_id)]) == []
    await subject.download(image, LOST)
    assert await subject.store.read(orphans, [blob(task_id)]) == [blob(task_id)]


async def test_what_a_cancelled_task_had_saved_is_nobodys(subject: Subject) -> None:
    """Its rows went with the cancel."""
    task_id = await subject.storing(URL, "https://r.test/1")
    first, _ = await subject.images(task_id)
    await subject.download(first, stored(first))
    (name,) = [row["blob"] for row in await subject.images(task_id) if row["blob"]]
    await subject.cancel(task_id)
    assert await subject.store.read(orphans, [name]) == [name]


async def test_what_belongs_to_an_unknown_task_is_not_ours(subject: Subject) -> None:
    """It may be another installation's, or newer than the backup that this store was restored
    from.
    """
    await subject.completed()
    assert await subject.store.read(orphans, [blob("task_unknown"), "nothing", "/"]) == []
