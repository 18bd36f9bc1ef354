"""A clock that was set back: what was planned by the old one waits no longer than was meant
(design, decision 1).
"""

import asyncio
from collections.abc import Sequence

import pytest
from sqlalchemy import update
from sqlalchemy.util import await_only

from service.db.tables import endpoints
from service.db.transaction import Transaction
from service.queue import leases
from service.queue.crashes import claim_candidates
from service.tasks.submissions import Again, Submission, record_submissions
from tests.contract.subject import (
    HOUR,
    LEASE,
    SECOND,
    Clock,
    Opener,
    Subject,
    accepted,
    upstream_id,
)


def paused(tx: Transaction, items: Sequence[tuple[str, int]]) -> list[None]:
    for id, until in items:
        tx.connection.execute(
            update(endpoints).where(endpoints.c.id == id).values(paused_until=until)
        )
    return [None] * len(items)


async def test_a_start_after_the_clock_went_back_waits_no_hour(
    sqlite_opener: Opener, clock: Clock
) -> None:
    """What was due in five seconds when the last process stopped is due in five seconds."""
    async with sqlite_opener() as store:
        subject = Subject(store, clock)
        lease = await subject.submitting()
        await subject.write(record_submissions, Submission(lease, Again("no", 5 * SECOND, HOUR)))
    clock.shift(-HOUR)
    async with sqlite_opener() as store:
        subject = Subject(store, clock)
        assert await subject.claim("submit") == []
        clock.shift(5 * SECOND)
        assert [found.key for found in await subject.claim("submit")] == [lease.key]


async def test_a_clock_that_goes_back_under_running_processes_puts_nothing_off(
    subject: Subject,
) -> None:
    """What was due in five seconds, and a dead process's lease, end as soon as they would have;
    once, however often that is looked at.
    """
    await subject.write(leases.keep_time, None)
    waiting, leased = await subject.submitting(), await subject.queued()
    await subject.write(record_submissions, Submission(waiting, Again("no", 5 * SECOND, HOUR)))
    (held,) = await subject.claim("submit")
    assert held.key == leased
    subject.clock.shift(-HOUR)
    for _ in range(3):
        await subject.write(leases.keep_time, None)
    assert await subject.claim("submit") == []
    subject.clock.shift(5 * SECOND)
    assert [lease.key for lease in await subject.claim("submit")] == [waiting.key]
    subject.clock.shift(LEASE - 5 * SECOND)
    assert leased in [lease.key for lease in await subject.claim("submit")]


async def test_what_is_begun_after_the_clock_went_back_is_not_ended_by_that(
    two: tuple[Subject, Subject],
) -> None:
    """The first transaction that sees it brings nearer what was planned before; a submission under
    way then keeps its lease.
    """
    one, other = two
    await one.write(leases.keep_time, None)
    one.clock.shift(-HOUR)
    lease = await one.submitting()
    one.clock.shift(2 * SECOND)
    for subject in two:
        await subject.write(leases.keep_time, None)
    assert await other.claim("submit") == []
    assert await one.submission(lease, accepted(upstream_id(lease.key))) == "submitted"


async def test_nothing_is_begun_while_somebody_goes_through_what_was_planned(
    two: tuple[Subject, Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever sees that the clock went back waits for it: else what it begins by the new time would
    be ended with the rest.
    """
    one, other = two
    for each in two:
        await each.write(leases.keep_time, None)
    entered, go, set_back = asyncio.Event(), asyncio.Event(), leases._set_back

    def slow(tx: Transaction, by_ms: int) -> None:
        entered.set()
        await_only(go.wait())
        set_back(tx, by_ms)

    monkeypatch.setattr(leases, "_set_back", slow)
    one.clock.shift(-HOUR)
    setting = asyncio.create_task(other.write(leases.keep_time, None))
    await entered.wait()
    begun = asyncio.create_task(one.submitting())
    await asyncio.wait({begun}, timeout=0.5)
    assert not begun.done()
    go.set()
    await setting
    lease = await begun
    assert await other.claim("submit") == []
    assert await one.write(leases.renew, lease)


async def test_a_process_that_starts_after_the_clock_went_back_sees_it(
    postgres_opener: Opener, clock: Clock
) -> None:
    """Before it plans anything: the store knows what time it was."""
    async with postgres_opener() as store:
        subject = Subject(store, clock)
        await subject.write(leases.keep_time, None)
        lease = await subject.submitting()
        await subject.write(record_submissions, Submission(lease, Again("no", 60 * SECOND, HOUR)))
    clock.shift(-HOUR)
    async with postgres_opener("two") as store:
        subject = Subject(store, clock)
        started = await subject.submitting()
        clock.shift(60 * SECOND)
        assert [found.key for found in await subject.claim("submit", 9)] == [lease.key]
        assert await subject.submission(started, accepted(upstream_id(started.key))) == "submitted"


async def test_a_pause_that_an_endpoint_asked_for_goes_back_with_the_clock(
    subject: Subject,
) -> None:
    """It asked for seconds, not for an hour."""
    await subject.write(leases.keep_time, None)
    endpoint = await subject.endpoint()
    await subject.write(paused, (endpoint, subject.clock.now + 9 * SECOND))
    subject.clock.shift(-HOUR)
    await subject.write(leases.keep_time, None)
    (row,) = await subject.rows(endpoints)
    assert row["paused_until"] == subject.clock.now + 9 * SECOND


async def test_times_that_differ_by_a_little_are_no_jump(subject: Subject) -> None:
    """A transaction that waited for its turn read its time earlier."""
    await subject.write(leases.keep_time, None)
    lease = await subject.submitting()
    await subject.write(record_submissions, Submission(lease, Again("no", 60 * SECOND, HOUR)))
    subject.clock.shift(-leases.TOLERANCE_MS)
    await subject.write(leases.keep_time, None)
    subject.clock.shift(60 * SECOND)
    assert await subject.claim("submit") == []
    subject.clock.shift(leases.TOLERANCE_MS)
    assert [found.key for found in await subject.claim("submit")] == [lease.key]


async def test_work_that_a_suspect_gave_back_is_due_at_once(subject: Subject) -> None:
    """It was put off for the case that it brings the process down; a stop is none."""
    await subject.queued()
    for _ in range(2):
        await subject.claim("submit")
        subject.clock.shift(LEASE)
    candidate = await subject.write(claim_candidates, "submit")
    assert candidate is not None
    assert await subject.write(leases.give_back, candidate.lease)
    again = await subject.write(claim_candidates, "submit")
    assert again is not None
    assert (again.lease.attempts, again.crashes) == (candidate.lease.attempts, candidate.crashes)
