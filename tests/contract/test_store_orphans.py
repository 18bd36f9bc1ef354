"""Which blobs the sweep may remove: blobs that no row names, of tasks that have ended."""

from hashlib import sha256

import pytest

from service.images.downloads import Retry
from service.images.sweep import orphans
from tests.contract.subject import DAY, LOST, SECOND, Subject, completed, stored

URL = "https://r.test/0"


def blob(task_id: str, words: str = "left behind") -> str:
    return f"{task_id}/0-{sha256(words.encode()).hexdigest()}.png"


async def test_a_blob_that_a_row_names_is_kept(subject: Subject) -> None:
    """A blob of a completed task is an orphan only if it is none of the task's images."""
    task_id = await subject.completed(URL, "https://r.test/1")
    named = [row["blob"] for row in await subject.images(task_id)]
    assert await subject.store.read(orphans, [*named, blob(task_id)]) == [blob(task_id)]


async def test_a_blob_that_only_a_callback_named_is_kept(subject: Subject) -> None:
    """A worker stored the image before the query that confirms the callback. It may still count."""
    task_id = await subject.submitted()
    await subject.callback(task_id, completed(task_id, URL))
    (image,) = await subject.images(task_id)
    await subject.download(image, stored(image))
    (image,) = await subject.images(task_id)
    assert (image["state"], image["confirmed"]) == ("stored", False)
    assert await subject.store.read(orphans, [image["blob"], blob(task_id)]) == []


@pytest.mark.parametrize("state", ["queued", "submitted", "uncertain", "storing"])
async def test_a_task_that_has_not_ended_keeps_every_blob(subject: Subject, state: str) -> None:
    """A worker puts a blob before it commits the row that names it."""
    task_id = await (subject.storing(URL) if state == "storing" else getattr(subject, state)())
    assert await subject.store.read(orphans, [blob(task_id)]) == []


async def test_a_late_result_keeps_every_blob_until_it_is_stored_or_lost(subject: Subject) -> None:
    """This holds also for a task that ended long ago."""
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


async def test_a_blob_of_a_cancelled_task_is_an_orphan(subject: Subject) -> None:
    """The cancel removed the row that named it."""
    task_id = await subject.storing(URL, "https://r.test/1")
    first, _ = await subject.images(task_id)
    await subject.download(first, stored(first))
    (name,) = [row["blob"] for row in await subject.images(task_id) if row["blob"]]
    await subject.cancel(task_id)
    assert await subject.store.read(orphans, [name]) == [name]


async def test_a_blob_of_an_unknown_task_is_kept(subject: Subject) -> None:
    """The blob may belong to another installation, or be newer than the backup that this store was
    restored from.
    """
    await subject.completed()
    assert await subject.store.read(orphans, [blob("task_unknown"), "nothing", "/"]) == []
