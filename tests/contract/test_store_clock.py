"""A clock that was set back. A lease that ends later than the longest possible lease counts as
expired.
"""

from service.queue import leases
from service.queue.crashes import claim_candidates
from tests.contract.subject import HOUR, LEASE, SECOND, Subject
from tests.stores import candidate_of


async def test_a_lease_that_ends_later_than_any_can_counts_as_expired(subject: Subject) -> None:
    """The clock goes back by an hour. Another worker claims the row of a dead process at once."""
    await subject.queued()
    subject.clock.shift(2 * HOUR)
    (dead,) = await subject.claim("submit")
    subject.clock.shift(-SECOND)
    assert await subject.claim("submit") == []
    subject.clock.shift(-HOUR)
    (again,) = await subject.claim("submit")
    assert (again.key, again.fence) == (dead.key, dead.fence + 1)


async def test_a_submission_keeps_its_lease_when_the_clock_goes_back(
    two: tuple[Subject, Subject],
) -> None:
    """Its own process renews the lease by the new time, and no other process claims the row."""
    one, other = two
    await one.queued()
    one.clock.shift(2 * HOUR)
    (lease,) = await one.claim("submit")
    one.clock.shift(-HOUR)
    assert await one.write(leases.renew, lease)
    assert await other.claim("submit") == []
    one.clock.shift(LEASE - 1)
    assert await other.claim("submit") == []


async def test_a_poison_candidate_that_a_stop_released_is_due_at_once(subject: Subject) -> None:
    """A poison candidate's due time is moved ahead in case it kills the process. A stop is no
    crash.
    """
    await subject.queued()
    for _ in range(2):
        await subject.claim("submit")
        subject.clock.shift(LEASE)
    candidate = await subject.write(claim_candidates, candidate_of("submit"))
    assert candidate is not None
    assert await subject.write(leases.give_back, candidate.lease)
    again = await subject.write(claim_candidates, candidate_of("submit"))
    assert again is not None
    assert (again.lease.attempts, again.crashes) == (candidate.lease.attempts, candidate.crashes)
