"""A clock that was set back: what was planned by the old one waits no longer than was meant (design, decision 1)."""

from collections.abc import Sequence

from sqlalchemy import update

from service.store import Transaction
from service.store.operations.submissions import Again, Submission, record_submissions
from service.store.tables import tasks
from tests.contract.subject import HOUR, SECOND, Clock, Opener, Subject


def due_now(tx: Transaction, keys: Sequence[str]) -> list[None]:
    for key in keys:
        tx.connection.execute(update(tasks).where(tasks.c.id == key).values(submit_due_at=tx.now))
    return [None] * len(keys)


async def test_a_start_after_the_clock_went_back_waits_no_hour(sqlite_opener: Opener, clock: Clock) -> None:
    """What was due in five seconds when the last process stopped is due in five seconds."""
    async with sqlite_opener() as store:
        subject = Subject(store, clock)
        grant = await subject.submitting()
        await subject.write(record_submissions, Submission(grant, Again("no", 5 * SECOND, HOUR)))
    clock.shift(-HOUR)
    async with sqlite_opener() as store:
        subject = Subject(store, clock)
        assert await subject.claim("submit") == []
        clock.shift(5 * SECOND)
        assert [found.key for found in await subject.claim("submit")] == [grant.key]


async def test_a_lease_from_the_future_counts_as_ended(subject: Subject) -> None:
    """It was granted before the clock went back, for it is longer than any can be; nobody waits an hour for a process that died."""
    key = await subject.queued()
    await subject.claim("submit")
    subject.clock.shift(-HOUR)
    await subject.write(due_now, key)
    assert [grant.key for grant in await subject.claim("submit")] == [key]
