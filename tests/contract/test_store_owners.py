"""Which tasks of the upstream an owner may see. All owners share one account there, so a task may
belong to another owner.

docs/behaviour.md describes the rule under "Owners and keys".
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


async def test_an_id_of_another_owners_task_stays_hidden_at_any_age(subject: Subject) -> None:
    """It is visible to its own owner. The same id at another upstream is another task."""
    task_id = await subject.completed()
    for created in (0, subject.clock.now, None):
        assert await hidden(subject, upstream_id(task_id), created)
        assert not await hidden(subject, upstream_id(task_id), created, OWNER)
        assert not await hidden(subject, UNKNOWN, created)
    assert not await subject.store.read(
        task_queries.may_be_anothers, "elsewhere", upstream_id(task_id), "other", None
    )


async def test_an_unknown_id_may_belong_to_a_task_that_is_being_submitted(subject: Subject) -> None:
    """This holds while that task has no id, for ids made since its submission. Clocks may differ by
    a minute.
    """
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


async def test_a_task_that_ended_without_an_id_hides_ids_made_in_its_time(subject: Subject) -> None:
    """A cancelled task whose submission was never answered. An id made before or after it belongs
    to another client of the account.
    """
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


async def test_a_task_that_was_never_created_upstream_hides_no_id(subject: Subject) -> None:
    """Queued and refused tasks hide no id. A task that is queued again hides ids, because its first
    submission may have created it.
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


async def test_an_owner_cannot_change_another_owners_endpoint(subject: Subject) -> None:
    """The result does not say whether the endpoint exists."""
    endpoint_id = await subject.endpoint()
    for id in (endpoint_id, "ep_unknown"):
        assert not await subject.change(id, "other", status="paused")
        assert not await subject.change(id, "other", delete=True)
    row = await subject.store.read(endpoint_row, endpoint_id, OWNER)
    assert row is not None
    assert row["status"] == "enabled"
    assert await subject.change(endpoint_id, OWNER, status="paused")
    assert await subject.change(endpoint_id, None, delete=True)
