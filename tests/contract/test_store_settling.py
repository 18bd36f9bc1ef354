"""Settling: the upstream's word is recorded once (design, decision 6); cancelling; no move outside
the contract's table.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from service.db.transaction import Transaction
from service.images.downloads import Retry
from service.tasks.confirm_worker import Settlement, record_settlements
from service.tasks.state import TERMINAL, State, may_become
from service.tasks.transitions import change, lock, move
from service.upstreams.base import Report, Status
from tests.contract.subject import (
    ASK_AGAIN,
    DAY,
    HOUR,
    LEASE,
    LOST,
    MINUTE,
    SECOND,
    UNDECIDED,
    Subject,
    accepted,
    completed,
    digest,
    doubts,
    error_of,
    failed,
    processing,
    stored,
    upstream_id,
)

URL, OTHER = "https://r.test/0", "https://r.test/1"


async def test_a_completed_task_is_stored_before_it_is_completed(subject: Subject) -> None:
    """`completed` means that every result is stored: the query's word alone makes it `storing`,
    without an event.
    """
    task_id = await subject.submitted()
    report = completed(task_id, URL, credits_used=1_500_000, progress=90)
    assert await subject.settle(task_id, report) is State.STORING
    task = await subject.task(task_id)
    assert (task["settled_digest"], task["credits_used"], task["settle_due_at"]) == (
        digest(report),
        1_500_000,
        None,
    )
    assert (task["settle_lease_until"], task["terminal_at"]) == (None, None)
    assert await subject.types(task_id) == ["image.task.submitted"]


@pytest.mark.parametrize(
    ("report", "state", "code", "type"),
    [
        (
            Report(status=Status.FAILED, error=error_of("service_error")),
            State.FAILED,
            "service_error",
            "failed",
        ),
        (Report(status=Status.FAILED), State.FAILED, "unknown_error", "failed"),
        (
            Report(status=Status.CANCELLED, error=error_of("request_cancelled")),
            State.CANCELLED,
            "request_cancelled",
            "cancelled",
        ),
        (Report(status=Status.CANCELLED), State.CANCELLED, "request_cancelled", "cancelled"),
        (Report(status=Status.COMPLETED), State.FAILED, "no_results", "failed"),
        (
            Report(status=Status.FAILED, error=error_of("resource_not_found")),
            State.EXPIRED,
            "expired",
            "expired",
        ),
    ],
)
async def test_an_end_without_results(
    subject: Subject, report: Report, state: State, code: str, type: str
) -> None:
    """Each final answer ends the task as the contract says, with the upstream's error or one of
    ours, in one event.
    """
    task_id = await subject.submitted()
    assert await subject.settle(task_id, report) is state
    task = await subject.task(task_id)
    assert (task["error"]["code"], task["terminal_at"], task["settle_due_at"]) == (
        code,
        subject.clock.now,
        None,
    )
    assert task["settled_digest"] == (
        None if state is State.EXPIRED else digest(report)
    )  # to `expired` proof may still come
    assert await subject.types(task_id) == ["image.task.submitted", f"image.task.{type}"]


async def test_a_running_task_is_asked_again(subject: Subject) -> None:
    """Not final: progress is shown, usage kept, and the next question is due after the wait."""
    task_id = await subject.submitted()
    assert (
        await subject.settle(task_id, processing(task_id, progress=30, estimated_time=20))
        is State.SUBMITTED
    )
    task = await subject.task(task_id)
    assert (task["upstream_status"], task["progress"], task["estimated_time"]) == (
        "processing",
        30,
        20,
    )
    assert task["settle_due_at"] == subject.clock.now + ASK_AGAIN


@pytest.mark.parametrize("report", [None, Report(status=None)])
async def test_no_answer_and_an_undocumented_one_change_nothing(
    subject: Subject, report: Report | None
) -> None:
    """Asked again after the wait; the attempts are counted for the plan."""
    task_id = await subject.submitted()
    for attempts in (1, 2, 3):
        lease = await subject.asking(task_id)
        assert lease.attempts == attempts
        assert await subject.settle(task_id, report, lease=lease) is State.SUBMITTED
    assert (await subject.task(task_id))["upstream_status"] == "pending"


async def test_an_unknown_task_expires_only_when_it_is_old(subject: Subject) -> None:
    """404 is asked again; `expired` only after the time for which the upstream keeps a task."""
    task_id = await subject.submitted()
    assert await subject.settle(task_id, None, expires_ms=HOUR) is State.SUBMITTED
    subject.clock.now = (await subject.task(task_id))["submitted_at"] + HOUR - 1
    assert await subject.settle(task_id, None, expires_ms=HOUR) is State.SUBMITTED
    assert await subject.settle(task_id, None) is State.SUBMITTED, (
        "no answer proves nothing, however old the task is"
    )
    assert await subject.settle(task_id, None, expires_ms=HOUR) is State.EXPIRED
    assert (await subject.task(task_id))["error"]["code"] == "expired"
    assert await subject.types(task_id) == ["image.task.submitted", "image.task.expired"]


async def test_a_task_that_is_storing_does_not_expire(subject: Subject) -> None:
    """Its results are known; `storing` may not become `expired`."""
    task_id = await subject.storing(URL)
    lease = await subject.requeued("settle", task_id)
    subject.clock.shift(2 * DAY)
    assert await subject.settle(task_id, None, expires_ms=HOUR, lease=lease) is State.STORING


async def test_an_answer_under_an_ended_lease_changes_nothing(subject: Subject) -> None:
    """The fence: after the lease went elsewhere only the new holder's answer counts."""
    task_id = await subject.submitted()
    late = await subject.asking(task_id)
    subject.clock.shift(LEASE)
    holder = await subject.claimed("reconcile", task_id)
    before = await subject.task(task_id)
    assert await subject.settle(task_id, failed(task_id), lease=late) is None
    assert await subject.task(task_id) == before
    assert await subject.settle(task_id, completed(task_id, URL), lease=holder) is State.STORING


async def test_an_answer_under_a_lease_that_nobody_took_still_counts(subject: Subject) -> None:
    """The fence decides, not the clock: an answer a little late is better than asking again."""
    task_id = await subject.submitted()
    lease = await subject.asking(task_id)
    subject.clock.shift(LEASE + SECOND)
    assert await subject.settle(task_id, failed(task_id), lease=lease) is State.FAILED


async def test_what_is_settled_stands(subject: Subject) -> None:
    """After the end only credits are recorded; no state, no event, no further question."""
    task_id = await subject.completed(URL)
    lease = await subject.requeued("settle", task_id)
    report = replace(failed(task_id), credits_used=500_000)
    assert await subject.settle(task_id, report, lease=lease) is State.COMPLETED
    task = await subject.task(task_id)
    assert (task["credits_used"], task["error"], task["settle_due_at"]) == (500_000, None, None)
    assert await subject.types(task_id) == ["image.task.submitted", "image.task.completed"]
    lease = await subject.requeued("settle", task_id)
    assert await subject.settle(task_id, None, lease=lease) is State.COMPLETED
    assert (await subject.task(task_id))["settle_due_at"] is None


@pytest.mark.parametrize("word", ["resource_not_found", "no results", "failed", "cancelled"])
async def test_links_that_are_known_outlive_the_task_at_the_upstream(
    subject: Subject, word: str
) -> None:
    """What is settled stands: what is storing goes on with the links it has, and ends by what
    becomes of them.
    """
    for outcome, end in [(stored, State.COMPLETED), (None, State.FAILED)]:
        task_id = await subject.storing(URL, OTHER)
        first = (await subject.images(task_id))[0]
        assert await subject.download(first, Retry("answered 404", SECOND, stale=True)) == "pending"
        before = await subject.task(task_id)
        words = {
            "no results": Report(status=Status.COMPLETED),
            "cancelled": Report(status=Status.CANCELLED),
        }
        report = words.get(word) or failed(task_id, "service_error" if word == "failed" else word)
        assert await subject.settle(task_id, report) is State.STORING
        task = await subject.task(task_id)
        assert (task["settled_digest"], task["upstream_status"], task["settle_due_at"]) == (
            before["settled_digest"],
            "completed",
            None,
        )
        for image in await subject.images(task_id):
            assert image["state"] == "pending"
            await subject.download(image, outcome(image) if outcome else LOST)
        assert await subject.state(task_id) is end


async def test_a_callback_during_a_question_gets_it_asked_again(subject: Subject) -> None:
    """The answer was given before the callback was: it is recorded, and the upstream is asked once
    more at once.
    """
    task_id = await subject.submitted()
    lease = await subject.asking(task_id)
    asked = (await subject.task(task_id))["settle_requests"]
    await subject.callback(task_id, completed(task_id, URL))
    assert await subject.claim("settle") == [], "somebody is asking already"
    settlement = Settlement(lease, processing(task_id), asked, ASK_AGAIN, DAY)
    assert await subject.write(record_settlements, settlement) is State.SUBMITTED
    assert (await subject.task(task_id))["settle_due_at"] == subject.clock.now
    (again,) = await subject.claim("settle")
    assert (again.key, again.attempts) == (task_id, 1), "the schedule begins anew"


async def test_a_callback_during_a_question_that_ends_the_task_asks_no_more(
    subject: Subject,
) -> None:
    """There is nothing left to ask about."""
    task_id = await subject.submitted()
    lease = await subject.asking(task_id)
    asked = (await subject.task(task_id))["settle_requests"]
    await subject.callback(task_id, failed(task_id))
    assert (
        await subject.write(
            record_settlements, Settlement(lease, failed(task_id), asked, ASK_AGAIN, DAY)
        )
        is State.FAILED
    )
    assert (await subject.task(task_id))["settle_due_at"] is None


async def test_settling_and_submitting_are_leased_apart(subject: Subject) -> None:
    """A callback never waits for a submission: a task whose submit call still runs is settled to
    its end.
    """
    lease = await subject.submitting()
    await subject.callback(lease.key, failed(lease.key))
    assert await subject.settle(lease.key, failed(lease.key)) is State.FAILED
    assert await subject.submission(lease, doubts("no answer in time", MINUTE)) is State.FAILED
    assert await subject.types(lease.key) == ["image.task.submitted", "image.task.failed"]


async def test_a_query_proves_an_uncertain_task(subject: Subject) -> None:
    """Once the id is known by hand or by a callback, the answer itself submits it."""
    task_id = await subject.uncertain()

    def bind(tx: Transaction, ids: Sequence[str]) -> list[None]:
        for row in lock(tx, ids).values():
            change(
                tx,
                row,
                upstream_id="task-unified-found",
                upstream_id_from="callback",
                settle_due_at=tx.now,
            )
        return [None] * len(ids)

    await subject.write(bind, task_id)
    assert await subject.settle(task_id, completed(task_id, URL)) is State.STORING
    assert (await subject.task(task_id))["upstream_id"] == "task-unified-found"
    assert await subject.types(task_id) == ["image.task.submitted"]


async def test_progress_and_usage_are_never_taken_back(subject: Subject) -> None:
    """A report that says less than is known changes nothing."""
    task_id = await subject.submitted()
    full = processing(
        task_id,
        progress=70,
        credits_reserved=1_000_000,
        billing_rule="per_call",
        user_group="vip",
        can_cancel=False,
    )
    await subject.settle(task_id, full)
    await subject.settle(task_id, processing(task_id, progress=10))
    task = await subject.task(task_id)
    assert (task["progress"], task["credits_reserved"], task["billing_rule"]) == (
        70,
        1_000_000,
        "per_call",
    )
    assert (task["user_group"], task["can_cancel"]) == ("vip", False)


async def test_a_cancel_ends_a_task_in_every_state_before_its_end(subject: Subject) -> None:
    """Local: we stop waiting; no download and no submission is due any more, and no question but
    for the charge.
    """
    lease = await subject.submitting()
    waiting = [
        await subject.queued(),
        lease.key,
        await subject.uncertain(),
        await subject.submitted(),
        await subject.storing(URL),
    ]
    for task_id in waiting:
        assert await subject.cancel(task_id, "painter") is None
        task = await subject.task(task_id)
        assert (task["state"], task["error"]["code"], task["submit_due_at"]) == (
            "cancelled",
            "request_cancelled",
            None,
        )
        assert (await subject.types(task_id))[-1] == "image.task.cancelled"
    assert await subject.images(waiting[-1]) == []
    subject.clock.shift(DAY)
    assert [await subject.claim(stage, 9) for stage in ("submit", "download")] == [[], []]
    assert [lease.key for lease in await subject.claim("reconcile", 9)] == [waiting[3]]


async def test_a_cancelled_task_is_asked_about_until_its_charge_is_known(subject: Subject) -> None:
    """Charges are still recorded: asked on by the plan while the upstream works, until it has ended
    or no longer knows the task.
    """
    task_id = await subject.submitted()
    await subject.cancel(task_id)
    assert await subject.settle(task_id, processing(task_id)) is State.CANCELLED
    assert await subject.settle(task_id, None) is State.CANCELLED
    assert (
        await subject.settle(task_id, completed(task_id, URL, credits_used=1_500_000))
        is State.CANCELLED
    )
    task = await subject.task(task_id)
    assert (task["credits_used"], task["settle_due_at"], await subject.images(task_id)) == (
        1_500_000,
        None,
        [],
    )
    forgotten = await subject.submitted()
    await subject.cancel(forgotten)
    assert await subject.settle(forgotten, None, expires_ms=DAY) is State.CANCELLED
    assert (await subject.task(forgotten))["settle_due_at"] is not None, "a 404 is asked again"
    subject.clock.shift(DAY)
    assert await subject.settle(forgotten, None, expires_ms=DAY) is State.CANCELLED
    assert (await subject.task(forgotten))["settle_due_at"] is None


async def test_a_cancel_says_why_it_cannot(subject: Subject) -> None:
    """Terminal: the state that was there first; missing, or somebody else's: as if it were not
    there.
    """
    task_id, other = await subject.completed(URL), await subject.queued(owner="other")
    assert await subject.cancel(task_id) == "completed"
    assert await subject.cancel("task_gone") == "missing"
    assert await subject.cancel(other, "painter") == "missing"
    assert await subject.cancel(other, None) is None
    assert await subject.cancel(other, None) == "cancelled"


async def test_a_move_outside_the_table_is_refused(subject: Subject) -> None:
    """The contract's table of states is held by the only function that moves a task: nothing is
    committed.
    """
    task_id = await subject.queued()

    def leap(tx: Transaction, ids: Sequence[str]) -> list[None]:
        for row in lock(tx, ids).values():
            move(tx, row, State.COMPLETED)
        return [None] * len(ids)

    with pytest.raises(AssertionError, match="from queued to completed"):
        await subject.write(leap, task_id)
    assert await subject.state(task_id) is State.QUEUED
    assert not any(may_become(state, after) for state in TERMINAL for after in State)


async def test_cancel_and_settle_at_once_from_two_processes_end_a_task_once(
    two: tuple[Subject, Subject],
) -> None:
    """Whoever locks the row first ends it; the other finds it ended; one terminal event."""
    for _ in range(5):
        task_id = await two[0].submitted()
        lease = await two[0].asking(task_id)
        cancelled, settled = await asyncio.gather(
            two[1].cancel(task_id), two[0].settle(task_id, failed(task_id), lease=lease)
        )
        assert (cancelled, settled) in [(None, State.CANCELLED), ("failed", State.FAILED)]
        assert len(await two[0].types(task_id)) == 2


async def test_an_upstream_id_names_one_task(subject: Subject) -> None:
    """`(upstream, upstream_id)` is unique: a second task with an id is refused by the constraint,
    the first stays.
    """
    task_id = await subject.submitted()
    lease = await subject.submitting()

    def steal(tx: Transaction, ids: Sequence[str]) -> list[None]:
        for row in lock(tx, ids).values():
            change(tx, row, upstream_id=upstream_id(task_id))
        return [None] * len(ids)

    with pytest.raises(Exception, match=r"(?i)unique"):
        await subject.write(steal, lease.key)
    assert (await subject.task(lease.key))["upstream_id"] is None


async def test_a_callback_while_the_upstream_answers_asks_again_after_an_end_of_our_own(
    subject: Subject,
) -> None:
    """A cancelled task whose question is under way: what a callback says meanwhile is asked for, or
    its charge would be lost.
    """
    task_id = await subject.submitted()
    await subject.cancel(task_id)
    lease = await subject.asking(task_id)
    before = (await subject.task(task_id))["settle_requests"]
    await subject.callback(task_id, completed(task_id, URL))
    answer = Settlement(
        lease, processing(task_id), requests=before, wait_ms=ASK_AGAIN, result_ttl_ms=DAY
    )
    assert await subject.write(record_settlements, answer) is State.CANCELLED
    assert (await subject.task(task_id))["settle_due_at"] == subject.clock.now


async def test_after_an_unproved_end_the_charge_is_still_asked_for(subject: Subject) -> None:
    """`submission_uncertain` is our own word: once a callback names the upstream's id, it is asked
    until it has ended the task too.
    """
    task_id = await subject.uncertain(0)
    lease = await subject.claimed("submit", task_id)
    assert await subject.submission(lease, UNDECIDED) is State.FAILED
    await subject.callback(task_id, processing(task_id))
    assert await subject.settle(task_id, processing(task_id)) is State.FAILED
    assert (await subject.task(task_id))["settle_due_at"] is not None
    assert (
        await subject.settle(task_id, completed(task_id, URL, credits_used=2_000_000))
        is State.FAILED
    )
    task = await subject.task(task_id)
    assert (task["credits_used"], task["settle_due_at"]) == (2_000_000, None)


async def test_a_callback_that_brings_the_id_after_one_without_it_is_asked_about(
    subject: Subject,
) -> None:
    """The first had nothing to ask for, and the submission's answer may never come: a duplicate
    that names the task is not just counted.
    """
    task_id = await subject.uncertain()
    assert (
        await subject.callback(task_id, replace(completed(task_id, URL), upstream_id=None))
    ).verdict == "accepted"
    assert (await subject.callback(task_id, completed(task_id, URL))).verdict == "duplicate"
    task = await subject.task(task_id)
    assert (task["state"], task["upstream_id"], task["settle_due_at"]) == (
        "submitted",
        upstream_id(task_id),
        subject.clock.now,
    )


async def test_an_unreadable_callback_before_the_answer_is_asked_about_once_there_is_an_id(
    subject: Subject,
) -> None:
    """The token proved who called: the question waits for the id, not for the plan."""
    lease = await subject.submitting()
    assert (await subject.callback(lease.key, None)).verdict == "unreadable"
    assert (await subject.task(lease.key))["settle_due_at"] is None
    await subject.submission(lease, accepted("task-unified-early"))
    assert (await subject.task(lease.key))["settle_due_at"] == subject.clock.now
