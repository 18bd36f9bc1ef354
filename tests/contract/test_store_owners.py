"""Whose a task of the upstream's may be: all owners share one account there (contract section 3:
one sees what one's own tasks caused).
"""

from service.events.endpoints import endpoint_row
from service.tasks import task_queries
from service.tasks.state import State
from tests.contract.subject import (
    DAY,
    HOUR,
    MINUTE,
    OWNER,
    SECOND,
    Subject,
    creates_nothing,
    error_of,
    refuses,
    upstream_id,
)

UNKNOWN = "task-unified-1757165031-uyujaw3d"


async def hidden(subject: Subject, id: str, created: int | None, owner: str = "other") -> bool:
    return await subject.store.read(task_queries.may_be_anothers, "evolink", id, owner, created)


async def test_an_id_of_another_owners_task_is_anothers_for_ever(subject: Subject) -> None:
    """Whatever its age says; it is the owner's own, and another upstream's is another id."""
    task_id = await subject.completed()
    for created in (0, subject.clock.now, None):
        assert await hidden(subject, upstream_id(task_id), created)
        assert not await hidden(subject, upstream_id(task_id), created, OWNER)
        assert not await hidden(subject, UNKNOWN, created)
    assert not await subject.store.read(
        task_queries.may_be_anothers, "elsewhere", upstream_id(task_id), "other", None
    )


async def test_an_unknown_id_may_be_that_of_a_task_on_its_way(subject: Subject) -> None:
    """As long as that has none, for ids that were made since; clocks may differ by a minute."""
    began = subject.clock.now
    await subject.submitting()
    subject.clock.shift(HOUR)
    for created, may in (
        (began - 2 * MINUTE, False),
        (began - SECOND, True),
        (subject.clock.now, True),
        (None, True),
    ):
        assert await hidden(subject, UNKNOWN, created) is may
        assert not await hidden(subject, UNKNOWN, created, OWNER)


async def test_a_task_that_ended_without_its_id_hides_what_was_made_in_its_time(
    subject: Subject,
) -> None:
    """A cancelled one whose answer never came; what was made before or after is somebody else's."""
    began = subject.clock.now
    task_id = await subject.uncertain()
    subject.clock.shift(HOUR)
    assert await subject.cancel(task_id) is None
    ended = subject.clock.now
    subject.clock.shift(DAY)
    for created, may in (
        (began - HOUR, False),
        (began, True),
        (ended, True),
        (ended + 2 * MINUTE, False),
    ):
        assert await hidden(subject, UNKNOWN, created) is may


async def test_a_task_that_was_never_created_upstream_hides_nothing(subject: Subject) -> None:
    """Neither one that waits for its turn nor one that was refused; one that is sent again might
    have been created after all.
    """
    await subject.queued()
    refused = await subject.submitting()
    assert (
        await subject.submission(refused, refuses(400, error_of("invalid_parameter")))
        is State.FAILED
    )
    assert not await hidden(subject, UNKNOWN, subject.clock.now)
    again = await subject.submitting()
    assert await subject.submission(again, creates_nothing("429", 5 * SECOND, HOUR)) is State.QUEUED
    assert await hidden(subject, UNKNOWN, subject.clock.now)


async def test_nobody_changes_anothers_endpoint(subject: Subject) -> None:
    """Or learns by the answer that it is there."""
    endpoint_id = await subject.endpoint()
    for id in (endpoint_id, "ep_unknown"):
        assert not await subject.change(id, "other", status="paused")
        assert not await subject.change(id, "other", delete=True)
    row = await subject.store.read(endpoint_row, endpoint_id, OWNER)
    assert row is not None
    assert row["status"] == "enabled"
    assert await subject.change(endpoint_id, OWNER, status="paused")
    assert await subject.change(endpoint_id, None, delete=True)
