"""Submissions that wait while the upstream refuses our key or account, and that become due when it
accepts them again.
"""

from collections.abc import Sequence

from sqlalchemy import text

from service.db.tables import tasks
from service.db.transaction import Lease, Transaction
from service.tasks.account_breaker import SubmissionHold, hold_submissions, resume_submissions
from service.tasks.state import State
from tests.contract.subject import HOUR, LEASE, MINUTE, Opener, Subject, creates_nothing


async def held(subject: Subject, wait_ms: int = MINUTE, owner: str = "a") -> str:
    """A new task whose submission is put on hold before the worker sends it."""
    lease = await subject.claimed("submit", await subject.queued(owner=owner))
    assert await hold(subject, lease, wait_ms)
    return lease.key


async def hold(subject: Subject, lease: Lease, wait_ms: int = MINUTE) -> bool:
    return await subject.write(hold_submissions, SubmissionHold(lease, wait_ms, HOUR))


async def test_a_held_task_stays_queued_and_counts_no_attempt(subject: Subject) -> None:
    """A client that waits for the first outcome gets one. The task keeps its turn and becomes due
    after its wait.
    """
    task_id = await held(subject)
    row = await subject.task(task_id)
    assert (
        row["state"],
        row["submit_attempts"],
        row["submit_outcomes"],
        row["submit_lease_until"],
    ) == ("queued", 0, 1, None)
    assert await subject.claim("submit", 5) == []
    subject.clock.shift(MINUTE)
    (again,) = await subject.claim("submit", 5)
    assert (again.key, again.attempts) == (task_id, 1)
    assert await hold(subject, again)
    assert (await subject.task(task_id))["submit_outcomes"] == 1
    assert await subject.types(task_id) == []


async def test_held_tasks_are_due_at_once_when_submissions_resume(subject: Subject) -> None:
    """As many tasks as requested become due, in their turn. A task that waits for its own time, as
    after a 429, is left alone.
    """
    first, second = await held(subject), await held(subject)
    throttled = await subject.submitting(owner="a")
    await subject.submission(throttled, creates_nothing("429", MINUTE, HOUR))
    assert await subject.write(resume_submissions, 1) == 1
    assert "submit" in subject.places.transactions[-1].due
    assert [lease.key for lease in await subject.claim("submit", 5)] == [first]
    assert await subject.write(resume_submissions, 500) == 1
    assert [lease.key for lease in await subject.claim("submit", 5)] == [second]
    assert await subject.write(resume_submissions, 500) == 0
    assert "submit" not in subject.places.transactions[-1].due


async def test_a_held_task_is_tried_before_it_is_given_up(subject: Subject) -> None:
    """The task is due at the latest at its age limit. It then waits for one more attempt, and ends
    by the outcome of that attempt.
    """
    task_id = await held(subject, wait_ms=2 * HOUR)
    subject.clock.shift(HOUR)
    assert await hold(subject, await subject.claimed("submit", task_id))
    row = await subject.task(task_id)
    assert (row["state"], row["submit_due_at"], row["submit_lease_until"]) == (
        "queued",
        subject.clock.now + MINUTE,
        None,
    )
    subject.clock.shift(MINUTE)
    lease = await subject.claimed("submit", task_id)
    assert await subject.start(lease) is not None
    assert (
        await subject.submission(lease, creates_nothing("401 unauthorized", 0, HOUR))
        is State.FAILED
    )
    row = await subject.task(task_id)
    assert (row["error"]["code"], "401 unauthorized" in row["error"]["message"]) == (
        "not_submitted",
        True,
    )
    assert await subject.types(task_id) == ["image.task.failed"]


async def test_held_tasks_of_all_owners_resume_in_turn(two: tuple[Subject, Subject]) -> None:
    """Owners take turns here too, in any order of arrival. If two tasks may go, one belongs to the
    last owner, whichever plan PostgreSQL chooses.
    """
    subject, _ = two

    def resume_by_a_scan(tx: Transaction, items: Sequence[int]) -> list[int]:
        for plan in ("indexscan", "indexonlyscan", "bitmapscan"):
            tx.connection.execute(text(f"SET LOCAL enable_{plan} = off"))
        return resume_submissions(tx, items)

    for owner in (*["a"] * 20, "b"):
        await held(subject, owner=owner)
    assert await subject.write(resume_by_a_scan, 2) == 2
    owners = [
        (await subject.task(lease.key))["owner"] for lease in await subject.claim("submit", 5)
    ]
    assert sorted(owners) == ["a", "b"]


async def test_an_uncertain_task_that_is_to_be_resubmitted_is_held_too(subject: Subject) -> None:
    """It stays uncertain at any age, because nothing proves that the upstream did not create it."""
    task_id = await subject.uncertain(decide_ms=0)
    subject.clock.shift(2 * HOUR)
    assert await hold(subject, await subject.claimed("submit", task_id))
    row = await subject.task(task_id)
    assert (row["state"], row["submit_outcomes"], row["submit_due_at"]) == (
        "uncertain",
        1,
        subject.clock.now + MINUTE,
    )
    assert await subject.write(resume_submissions, 500) == 1


async def test_a_worker_that_lost_its_lease_holds_nothing(subject: Subject) -> None:
    """Another worker has claimed the task, or the task is gone: the row stays as it is. A task that
    ended meanwhile does not become due.
    """
    lease = await subject.claimed("submit", await subject.queued())
    subject.clock.shift(LEASE + 1)
    newer = await subject.claimed("submit", lease.key)
    before = await subject.task(lease.key)
    assert not await hold(subject, lease)
    assert await subject.task(lease.key) == before
    assert not await hold(subject, Lease("submit", "gone", 1, 1))
    await subject.cancel(lease.key)
    assert await hold(subject, newer)
    row = await subject.task(lease.key)
    assert (row["state"], row["submit_due_at"], row["submit_lease_until"]) == (
        State.CANCELLED,
        None,
        None,
    )


async def test_another_process_takes_over_held_tasks(two: tuple[Subject, Subject]) -> None:
    """It resumes only the tasks that it held itself. After their wait, it submits the other
    process's tasks.
    """
    one, other = two
    task_id = await held(one)
    assert await other.write(resume_submissions, 500) == 0
    one.clock.shift(MINUTE)
    assert [lease.key for lease in await other.claim("submit", 5)] == [task_id]
    assert await one.write(resume_submissions, 500) == 0


async def test_a_restart_on_sqlite_submits_held_tasks_after_their_wait(
    sqlite_opener: Opener, subject: Subject
) -> None:
    """A held task has no lease that a new process would have to wait for."""
    async with sqlite_opener("first") as store:
        task_id = await held(Subject(store, subject.clock))
    subject.clock.shift(MINUTE)
    async with sqlite_opener("second") as store:
        again = Subject(store, subject.clock)
        assert [lease.key for lease in await again.claim("submit", 5)] == [task_id]
        assert (await again.rows(tasks, id=task_id))[0]["submit_deaths"] == 0
