"""Submitting: each outcome of a submission, and at most one submission per task (docs/api.md,
"Submission outcomes").
"""

import asyncio
from dataclasses import replace

import pytest

from service.db.tables import steps, tasks
from service.db.transaction import Lease
from service.tasks.accept import insert_tasks
from service.tasks.state import State
from service.tasks.submissions import SubmissionResult
from service.upstreams.base import Finished, Report, Status
from tests.contract.subject import (
    FIRST_QUERY,
    HOUR,
    LEASE,
    MINUTE,
    SECOND,
    UNDECIDED,
    Subject,
    accepted,
    accepts,
    completed,
    creates_nothing,
    doubts,
    error_of,
    processing,
    refuses,
    stored,
    upstream_id,
)

NOT_CREATED = creates_nothing("429", 5 * SECOND, HOUR)
ERROR = error_of("content_filter")
REFUSED = refuses(422, ERROR)
TIMED_OUT = doubts("no answer in time", 15 * MINUTE)


async def test_a_new_task_is_queued_and_due(subject: Subject) -> None:
    """The row is committed as `queued` before anything else. Without a free place, it is due."""
    row = await subject.task(await subject.queued())
    assert (row["state"], row["submit_due_at"], row["submit_lease_until"]) == (
        "queued",
        subject.clock.now,
        None,
    )
    assert (row["settle_due_at"], row["upstream_id"], row["created_at"]) == (
        None,
        None,
        subject.clock.now,
    )


async def test_one_idempotency_key_gives_one_task(subject: Subject) -> None:
    """The key is unique per owner. A later insert, also one of the same batch, gets the first
    task.
    """
    first, second, third = (
        subject.wish(idempotency_key="k", idempotency_hash="h") for _ in range(3)
    )
    made = await subject.batch(insert_tasks, [first, second])
    assert [(inserted.task_id, inserted.created) for inserted in made] == [
        (first.id, True),
        (first.id, False),
    ]
    found = await subject.write(insert_tasks, third)
    assert (found.task_id, found.created, found.idempotency_hash) == (first.id, False, "h")
    assert len(await subject.rows(tasks)) == 1


async def test_one_idempotency_key_of_two_owners_gives_two_tasks(subject: Subject) -> None:
    """A key belongs to an owner. Tasks without a key are always distinct."""
    wishes = [
        subject.wish(owner=owner, idempotency_key=key)
        for owner, key in [("a", "k"), ("b", "k"), ("a", None), ("a", None)]
    ]
    assert all(inserted.created for inserted in await subject.batch(insert_tasks, wishes))


async def test_an_insert_that_is_repeated_finds_its_own_row(subject: Subject) -> None:
    """After a lost response to the commit, the operation runs again. The task exists once and
    counts as created.
    """
    wish = subject.wish(idempotency_key="k", idempotency_hash="h")
    assert await subject.write(insert_tasks, wish) == await subject.write(insert_tasks, wish)
    assert len(await subject.rows(tasks)) == len(await subject.rows(steps)) == 1


async def test_two_processes_with_one_idempotency_key_make_one_task(
    two: tuple[Subject, Subject],
) -> None:
    """The process that loses the race for the key gets the winner's task. The other items of its
    batch are not affected.
    """
    for number in range(5):
        wishes = [place.wish(idempotency_key=f"k{number}") for place in two for _ in range(4)]
        others = [place.wish() for place in two]
        made = await asyncio.gather(
            *(two[n % 2].write(insert_tasks, wish) for n, wish in enumerate(wishes + others))
        )
        assert len({inserted.task_id for inserted in made[: len(wishes)]}) == 1
        assert sum(inserted.created for inserted in made[: len(wishes)]) == 1
        assert all(inserted.created for inserted in made[len(wishes) :])
    assert len(await two[0].rows(tasks)) == 15


async def test_a_task_is_submitting_before_its_request_leaves(subject: Subject) -> None:
    """The worker gets the exact body after the state is committed, under a lease that outlasts the
    call.
    """
    lease = await subject.claimed("submit", await subject.queued(body=b"\x00\xff{"))
    assert await subject.start(lease) == b"\x00\xff{"
    row = await subject.task(lease.key)
    assert (row["state"], row["submit_lease_until"]) == (
        "submitting",
        subject.clock.now + 70 * SECOND,
    )


async def test_a_start_whose_commit_seemed_lost_may_send(subject: Subject) -> None:
    """The same lease gets the body again. Nothing was sent, because the first start got no
    response.
    """
    lease = await subject.submitting()
    assert await subject.start(lease) == b'{"prompt":"a lighthouse"}'


async def test_a_worker_without_the_lease_does_not_send(subject: Subject) -> None:
    """A lease that expired and was claimed by another worker gives no right to send."""
    lease = await subject.claimed("submit", await subject.queued())
    subject.clock.shift(LEASE)
    again = await subject.claimed("submit", lease.key)
    assert await subject.start(lease) is None
    assert await subject.start(again) is not None
    assert await subject.start(lease) is None


async def test_an_uncertain_task_is_resubmitted_only_on_purpose(subject: Subject) -> None:
    """`uncertain` becomes `submitting` only with `resubmit`."""
    task_id = await subject.uncertain(decide_ms=0)
    lease = await subject.claimed("submit", task_id)
    assert await subject.start(lease) is None
    assert await subject.start(lease, resubmit=True) is not None
    assert await subject.state(task_id) is State.SUBMITTING


async def test_a_response_with_an_id_makes_the_task_submitted(subject: Subject) -> None:
    """2xx with an id: the task is submitted once with one event, and the first query is due after
    the planned time.
    """
    lease = await subject.submitting()
    report = Report(
        "task-unified-1",
        Status.PENDING,
        estimated_time=45,
        credits_reserved=1_500_000,
        billing_rule="per_call",
        user_group="vip",
    )
    assert await subject.submission(lease, accepts(report, FIRST_QUERY)) is State.SUBMITTED
    row = await subject.task(lease.key)
    assert (row["upstream_id"], row["upstream_id_from"], row["submitted_at"]) == (
        "task-unified-1",
        "answer",
        subject.clock.now,
    )
    assert (row["submit_due_at"], row["submit_lease_until"], row["submit_outcomes"]) == (
        None,
        None,
        1,
    )
    assert row["settle_due_at"] == subject.clock.now + FIRST_QUERY
    assert (
        row["estimated_time"],
        row["credits_reserved"],
        row["billing_rule"],
        row["user_group"],
    ) == (45, 1_500_000, "per_call", "vip")
    assert await subject.types(lease.key) == ["image.task.submitted"]


async def test_a_submit_response_with_a_final_status_is_still_queried(subject: Subject) -> None:
    """Only a query confirms the outcome."""
    lease = await subject.submitting()
    outcome = accepts(completed(lease.key, "https://r.test/0"), 0)
    assert await subject.submission(lease, outcome) is State.SUBMITTED
    assert (await subject.task(lease.key))["settle_due_at"] == subject.clock.now
    assert (await subject.task(lease.key))["upstream_status"] is None


async def test_a_submission_that_created_nothing_is_queued_again(subject: Subject) -> None:
    """429, no connection, or a refused account: the task is due again after the wait, and not
    before.
    """
    lease = await subject.submitting()
    assert await subject.submission(lease, NOT_CREATED) is State.QUEUED
    subject.clock.shift(5 * SECOND - 1)
    assert await subject.claim("submit") == []
    subject.clock.shift(1)
    (again,) = await subject.claim("submit")
    assert (again.key, again.attempts, again.fence) == (lease.key, 2, lease.fence + 1)
    assert await subject.types(lease.key) == []


async def test_a_task_that_is_never_accepted_fails_at_its_age_limit(subject: Subject) -> None:
    """It fails with `not_submitted`."""
    lease = await subject.submitting()
    subject.clock.shift(HOUR)
    assert await subject.submission(lease, NOT_CREATED) is State.FAILED
    assert (await subject.task(lease.key))["error"]["code"] == "not_submitted"
    assert await subject.types(lease.key) == ["image.task.failed"]


async def test_a_refused_task_fails_with_the_upstreams_error(subject: Subject) -> None:
    """400, 402, 422 and similar: the task has the status and the error, and is never submitted
    again.
    """
    lease = await subject.submitting()
    assert await subject.submission(lease, REFUSED) is State.FAILED
    row = await subject.task(lease.key)
    assert (row["refusal_status"], row["error"], row["terminal_at"]) == (
        422,
        ERROR,
        subject.clock.now,
    )
    subject.clock.shift(HOUR)
    assert await subject.claim("submit") == []


async def test_an_unproved_outcome_waits_for_proof(subject: Subject) -> None:
    """After a timeout or a similar outcome, the task is uncertain. It is decided when the time is
    up, and not before.
    """
    lease = await subject.submitting()
    assert await subject.submission(lease, TIMED_OUT) is State.UNCERTAIN
    subject.clock.shift(15 * MINUTE - 1)
    assert await subject.claim("submit") == []
    subject.clock.shift(1)
    decided = await subject.claimed("submit", lease.key)
    assert await subject.submission(decided, UNDECIDED) is State.FAILED
    assert (await subject.task(lease.key))["error"]["code"] == "submission_uncertain"
    assert await subject.types(lease.key) == ["image.task.failed"]


async def test_an_uncertain_task_is_proved_by_a_callback(subject: Subject) -> None:
    """The callback's token proves the submission. The task is submitted under the callback's id."""
    task_id = await subject.uncertain()
    await subject.callback(task_id, completed(task_id, "https://r.test/0"))
    row = await subject.task(task_id)
    assert (row["state"], row["upstream_id"], row["upstream_id_from"]) == (
        "submitted",
        upstream_id(task_id),
        "callback",
    )
    assert (row["submit_due_at"], row["settle_due_at"]) == (None, subject.clock.now)


@pytest.mark.parametrize("outcome", [NOT_CREATED, REFUSED, TIMED_OUT, UNDECIDED])
async def test_an_outcome_that_proves_nothing_new_changes_nothing(
    subject: Subject, outcome: SubmissionResult
) -> None:
    """A callback proved the task while the call ran. The call's outcome is outdated, so only the
    lease ends.
    """
    lease = await subject.submitting()
    await subject.callback(lease.key, completed(lease.key, "https://r.test/0"))
    assert await subject.submission(lease, outcome) is State.SUBMITTED
    row = await subject.task(lease.key)
    assert (row["error"], row["submit_due_at"], row["submit_lease_until"]) == (None, None, None)


async def taken_over(subject: Subject) -> tuple[Lease, Lease]:
    """A call that outlasted its lease, and the lease of the worker that claimed the task then."""
    lease = await subject.submitting()
    subject.clock.shift(70 * SECOND)
    return lease, await subject.claimed("submit", lease.key)


async def test_an_accepted_response_is_always_recorded(subject: Subject) -> None:
    """A late response binds the id in every earlier state, without the lease. It does not release
    another worker's lease.
    """
    late, holder = await taken_over(subject)
    assert await subject.submission(late, accepted("task-unified-late")) is State.SUBMITTED
    row = await subject.task(late.key)
    assert (row["upstream_id"], row["submit_lease_until"] is not None) == (
        "task-unified-late",
        True,
    )
    assert await subject.submission(holder, TIMED_OUT) is State.SUBMITTED
    assert (await subject.task(late.key))["submit_lease_until"] is None


async def test_an_accepted_response_proves_an_uncertain_task(subject: Subject) -> None:
    """A late response does so as well as a callback."""
    late, holder = await taken_over(subject)
    assert await subject.submission(holder, TIMED_OUT) is State.UNCERTAIN
    assert await subject.submission(late, accepted("task-unified-late")) is State.SUBMITTED
    assert await subject.types(late.key) == ["image.task.submitted"]


async def test_an_accepted_response_proves_a_task_that_was_queued_again(subject: Subject) -> None:
    """The later outcome said that nothing was created. The proof wins, and the task is not
    submitted again.
    """
    late, holder = await taken_over(subject)
    assert await subject.submission(holder, NOT_CREATED) is State.QUEUED
    assert await subject.submission(late, accepted("task-unified-late")) is State.SUBMITTED
    subject.clock.shift(HOUR)
    assert await subject.claim("submit") == []


async def test_a_late_refusal_ends_an_uncertain_task(subject: Subject) -> None:
    """A refusal proves that nothing was created, although another worker claimed the task
    meanwhile.
    """
    late, holder = await taken_over(subject)
    assert await subject.submission(holder, TIMED_OUT) is State.UNCERTAIN
    assert await subject.submission(late, REFUSED) is State.FAILED
    assert (await subject.task(late.key))["refusal_status"] == 422


@pytest.mark.parametrize("outcome", [NOT_CREATED, REFUSED, TIMED_OUT, UNDECIDED])
async def test_a_late_outcome_does_not_disturb_the_worker_that_submits(
    subject: Subject, outcome: SubmissionResult
) -> None:
    """While another process has a `submitting` task, its request may be on its way. Only an
    accepted response counts then.
    """
    late, holder = await taken_over(subject)
    assert await subject.submission(late, outcome) is State.SUBMITTING
    assert await subject.submission(holder, accepted("task-unified-1")) is State.SUBMITTED


@pytest.mark.parametrize("outcome", [NOT_CREATED, TIMED_OUT, UNDECIDED])
async def test_a_late_outcome_without_proof_leaves_an_uncertain_task_as_it_is(
    subject: Subject, outcome: SubmissionResult
) -> None:
    """`uncertain` ends by proof, or by the worker with the lease when the time is up."""
    late, holder = await taken_over(subject)
    assert await subject.submission(holder, TIMED_OUT) is State.UNCERTAIN
    due = (await subject.task(late.key))["submit_due_at"]
    assert await subject.submission(late, outcome) is State.UNCERTAIN
    assert (await subject.task(late.key))["submit_due_at"] == due


async def test_a_late_response_only_fills_empty_fields(subject: Subject) -> None:
    """Fields that a callback set since are newer than the submit response. Its figures of money are
    not kept, because nothing confirmed them.
    """
    lease = await subject.submitting()
    newer = processing(lease.key, credits_reserved=2_000_000, can_cancel=False, progress=40)
    await subject.callback(lease.key, newer)
    report = Report(
        upstream_id(lease.key),
        Status.PENDING,
        credits_reserved=1_000_000,
        can_cancel=True,
        progress=0,
        estimated_time=45,
    )
    assert await subject.submission(lease, accepts(report, FIRST_QUERY)) is State.SUBMITTED
    row = await subject.task(lease.key)
    assert (row["credits_reserved"], row["can_cancel"], row["progress"], row["estimated_time"]) == (
        1_000_000,
        False,
        40,
        45,
    )
    assert (row["upstream_status"], await subject.types(lease.key)) == (
        "processing",
        ["image.task.submitted"],
    )


async def test_the_submit_responses_id_wins_over_the_callbacks(subject: Subject) -> None:
    """A callback's id stays only until the submit response comes. The response's id is never
    replaced.
    """
    lease = await subject.submitting()
    await subject.callback(
        lease.key, Report("task-unified-other", Status.COMPLETED, ("https://r.test/0",))
    )
    assert (await subject.task(lease.key))["upstream_id"] == "task-unified-other"
    await subject.submission(lease, accepted("task-unified-right"))
    assert (await subject.task(lease.key))["upstream_id"] == "task-unified-right"
    await subject.submission(lease, accepted("task-unified-third"))
    assert (await subject.task(lease.key))["upstream_id"] == "task-unified-right"


async def test_an_answer_about_the_callbacks_replaced_id_does_not_count(subject: Subject) -> None:
    """The submit response brought another id while the query ran. The answer is about another task,
    and a query for the right id is due at once.
    """
    lease = await subject.submitting()
    await subject.callback(
        lease.key, Report("task-unified-other", Status.COMPLETED, ("https://r.test/0",))
    )
    asked = await subject.claimed("settle", lease.key)
    await subject.submission(lease, accepted("task-unified-right"))
    assert (
        await subject.settle(lease.key, Report("task-unified-other", Status.FAILED), lease=asked)
        is None
    )
    assert await subject.state(lease.key) is State.SUBMITTED
    assert (await subject.task(lease.key))["settle_due_at"] == subject.clock.now


async def test_a_submit_response_after_a_cancel_leaves_the_end_as_it_is(subject: Subject) -> None:
    """The id and the reserved credits are recorded, and a query for the charge is due. State and
    event stand.
    """
    lease = await subject.submitting()
    await subject.cancel(lease.key)
    report = Report("task-unified-1", Status.PENDING, credits_reserved=1_000_000)
    assert await subject.submission(lease, accepts(report, FIRST_QUERY)) is State.CANCELLED
    row = await subject.task(lease.key)
    assert (row["upstream_id"], row["credits_reserved"], row["settle_due_at"]) == (
        "task-unified-1",
        1_000_000,
        subject.clock.now + FIRST_QUERY,
    )
    assert await subject.types(lease.key) == ["image.task.cancelled"]


async def test_a_response_with_results_is_recorded_once(subject: Subject) -> None:
    """The worker repeats a write whose commit seemed lost, before and after the task has ended."""
    lease = await subject.submitting()
    finished = SubmissionResult(lease, Finished(completed(lease.key, "https://r.test/0")))
    assert await subject.submission(lease, finished) is State.STORING
    rows, noted = await subject.images(lease.key), await subject.rows(steps, task_id=lease.key)
    assert await subject.submission(lease, finished) is State.STORING
    assert await subject.images(lease.key) == rows
    assert await subject.rows(steps, task_id=lease.key) == noted
    (image,) = await subject.images(lease.key)
    await subject.download(image, stored(image))
    assert await subject.submission(lease, finished) is State.COMPLETED
    assert len(await subject.images(lease.key)) == 1
    assert await subject.types(lease.key) == ["image.task.submitted", "image.task.completed"]


async def test_results_in_a_late_response_change_no_settled_task(subject: Subject) -> None:
    """A callback proved the task meanwhile, and a query settled it with one image."""
    lease = await subject.submitting()
    await subject.callback(lease.key, completed(lease.key, "https://r.test/0"))
    await subject.settle(lease.key, completed(lease.key, "https://r.test/0"))
    rows = await subject.images(lease.key)
    others = completed(lease.key, "https://r.test/1", "https://r.test/2")
    late = SubmissionResult(lease, Finished(replace(others, upstream_id=None)))
    assert await subject.submission(lease, late) is State.STORING
    assert await subject.images(lease.key) == rows


async def test_results_in_a_response_after_a_cancel_are_not_kept(subject: Subject) -> None:
    lease = await subject.submitting()
    await subject.cancel(lease.key)
    finished = SubmissionResult(lease, Finished(completed(lease.key, "https://r.test/0")))
    assert await subject.submission(lease, finished) is State.CANCELLED
    assert await subject.images(lease.key) == []
    assert await subject.types(lease.key) == ["image.task.cancelled"]


async def test_an_accepted_response_without_an_id_is_our_own_defect(subject: Subject) -> None:
    """2xx without an id proves nothing. Code that reports it as accepted is wrong, and nothing is
    recorded.
    """
    lease = await subject.submitting()
    with pytest.raises(AssertionError, match="has an id"):
        await subject.submission(lease, accepts(Report(), FIRST_QUERY))
    assert await subject.state(lease.key) is State.SUBMITTING


async def test_a_repeated_start_gets_a_whole_lease(subject: Subject) -> None:
    """Its first commit had no response for a minute. The call begins only now, and the lease must
    outlast it.
    """
    lease = await subject.submitting()
    subject.clock.shift(MINUTE)
    assert await subject.start(lease) is not None
    assert (await subject.task(lease.key))["submit_lease_until"] == subject.clock.now + 70 * SECOND
