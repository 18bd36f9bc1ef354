"""Settling: the store records the upstream's report once. Cancelling, and moves outside the table
of states (docs/concepts.md, "States of a task").
"""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from service.db.transaction import Transaction
from service.images.downloads import Retry
from service.tasks.settlements import Settlement, record_settlements
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


async def test_a_completed_report_makes_the_task_storing(subject: Subject) -> None:
    """`completed` means that every result is stored. A query alone only makes the task `storing`,
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
    """Each final report without results ends the task with one event, with the upstream's error or
    one of ours.
    """
    task_id = await subject.submitted()
    assert await subject.settle(task_id, report) is state
    task = await subject.task(task_id)
    assert (task["error"]["code"], task["terminal_at"], task["settle_due_at"]) == (
        code,
        subject.clock.now,
        None,
    )
    # Proof may still arrive for an expired task.
    assert task["settled_digest"] == (None if state is State.EXPIRED else digest(report))
    assert await subject.types(task_id) == ["image.task.submitted", f"image.task.{type}"]


async def test_a_task_that_is_processing_is_queried_again(subject: Subject) -> None:
    """The store keeps its progress and usage. The next query is due after the wait."""
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
async def test_no_response_and_an_undocumented_status_change_nothing(
    subject: Subject, report: Report | None
) -> None:
    """The next query is due after the wait. The attempts count for the schedule."""
    task_id = await subject.submitted()
    for attempts in (1, 2, 3):
        lease = await subject.asking(task_id)
        assert lease.attempts == attempts
        assert await subject.settle(task_id, report, lease=lease) is State.SUBMITTED
    assert (await subject.task(task_id))["upstream_status"] == "pending"


async def test_an_unknown_task_expires_only_when_it_is_old(subject: Subject) -> None:
    """A 404 is followed by another query. The task expires only after the upstream's retention
    time.
    """
    task_id = await subject.submitted()
    assert await subject.settle(task_id, None, expires_ms=HOUR) is State.SUBMITTED
    subject.clock.now = (await subject.task(task_id))["submitted_at"] + HOUR - 1
    assert await subject.settle(task_id, None, expires_ms=HOUR) is State.SUBMITTED
    assert await subject.settle(task_id, None) is State.SUBMITTED, (
        "a query without a response proves nothing, at any age of the task"
    )
    assert await subject.settle(task_id, None, expires_ms=HOUR) is State.EXPIRED
    assert (await subject.task(task_id))["error"]["code"] == "expired"
    assert await subject.types(task_id) == ["image.task.submitted", "image.task.expired"]


async def test_a_task_that_is_storing_does_not_expire(subject: Subject) -> None:
    """Its results are known, and `storing` may not become `expired`."""
    task_id = await subject.storing(URL)
    lease = await subject.requeued("settle", task_id)
    subject.clock.shift(2 * DAY)
    assert await subject.settle(task_id, None, expires_ms=HOUR, lease=lease) is State.STORING


async def test_an_answer_under_an_expired_lease_changes_nothing(subject: Subject) -> None:
    """After another worker claims the task, the fence lets only that worker's answer count."""
    task_id = await subject.submitted()
    late = await subject.asking(task_id)
    subject.clock.shift(LEASE)
    holder = await subject.claimed("reconcile", task_id)
    before = await subject.task(task_id)
    assert await subject.settle(task_id, failed(task_id), lease=late) is None
    assert await subject.task(task_id) == before
    assert await subject.settle(task_id, completed(task_id, URL), lease=holder) is State.STORING


async def test_an_answer_under_an_expired_lease_that_no_worker_claimed_counts(
    subject: Subject,
) -> None:
    """The fence decides, not the clock. A late answer saves another query."""
    task_id = await subject.submitted()
    lease = await subject.asking(task_id)
    subject.clock.shift(LEASE + SECOND)
    assert await subject.settle(task_id, failed(task_id), lease=lease) is State.FAILED


async def test_a_settled_outcome_stands(subject: Subject) -> None:
    """After the end, a report only records credits. It changes no state, emits no event and makes
    no query due.
    """
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


@pytest.mark.parametrize("answer", ["resource_not_found", "no results", "failed", "cancelled"])
async def test_known_links_outlive_the_task_at_the_upstream(subject: Subject, answer: str) -> None:
    """The settled outcome stands. A storing task goes on with its links and ends by the outcome of
    its downloads.
    """
    for outcome, end in [(stored, State.COMPLETED), (None, State.FAILED)]:
        task_id = await subject.storing(URL, OTHER)
        first = (await subject.images(task_id))[0]
        assert await subject.download(first, Retry("answered 404", SECOND, stale=True)) == "pending"
        before = await subject.task(task_id)
        reports = {
            "no results": Report(status=Status.COMPLETED),
            "cancelled": Report(status=Status.CANCELLED),
        }
        code = "service_error" if answer == "failed" else answer
        report = reports.get(answer) or failed(task_id, code)
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


async def test_a_callback_during_a_query_makes_another_query_due(subject: Subject) -> None:
    """The answer may be older than the callback. It is recorded, and another query is due at
    once.
    """
    task_id = await subject.submitted()
    lease = await subject.asking(task_id)
    asked = (await subject.task(task_id))["settle_requests"]
    await subject.callback(task_id, completed(task_id, URL))
    assert await subject.claim("settle") == [], "a worker has the task already"
    settlement = Settlement(lease, processing(task_id), asked, ASK_AGAIN, DAY)
    assert await subject.write(record_settlements, settlement) is State.SUBMITTED
    assert (await subject.task(task_id))["settle_due_at"] == subject.clock.now
    (again,) = await subject.claim("settle")
    assert (again.key, again.attempts) == (task_id, 1), "the schedule starts anew"


async def test_a_callback_during_a_query_that_ends_the_task_makes_no_query_due(
    subject: Subject,
) -> None:
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


async def test_settling_and_submitting_have_separate_leases(subject: Subject) -> None:
    """A callback never waits for a submission. A task whose submit call still runs is settled to
    its end.
    """
    lease = await subject.submitting()
    await subject.callback(lease.key, failed(lease.key))
    assert await subject.settle(lease.key, failed(lease.key)) is State.FAILED
    assert await subject.submission(lease, doubts("no answer in time", MINUTE)) is State.FAILED
    assert await subject.types(lease.key) == ["image.task.submitted", "image.task.failed"]


async def test_a_query_proves_an_uncertain_task(subject: Subject) -> None:
    """A callback or an operator gave the id. The answer to the query makes the task submitted."""
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


async def test_progress_and_usage_never_go_back(subject: Subject) -> None:
    """A report that says less than the row changes nothing."""
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


async def test_a_cancel_ends_a_task_in_every_state_that_is_not_terminal(subject: Subject) -> None:
    """The cancel is local: no download and no submission is due any more. Only a query for the
    charge is.
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


async def test_a_cancelled_task_is_queried_until_its_charge_is_known(subject: Subject) -> None:
    """The queries follow the schedule until the upstream has ended the task or does not know it any
    more.
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
    assert (await subject.task(forgotten))["settle_due_at"] is not None, (
        "a 404 is followed by another query"
    )
    subject.clock.shift(DAY)
    assert await subject.settle(forgotten, None, expires_ms=DAY) is State.CANCELLED
    assert (await subject.task(forgotten))["settle_due_at"] is None


async def test_a_refused_cancel_names_the_reason(subject: Subject) -> None:
    """For a terminal task, it is the state. For a missing task and another owner's task, it is
    `missing`.
    """
    task_id, other = await subject.completed(URL), await subject.queued(owner="other")
    assert await subject.cancel(task_id) == "completed"
    assert await subject.cancel("task_gone") == "missing"
    assert await subject.cancel(other, "painter") == "missing"
    assert await subject.cancel(other, None) is None
    assert await subject.cancel(other, None) == "cancelled"


async def test_a_move_outside_the_table_of_states_is_refused(subject: Subject) -> None:
    """The only function that moves a task checks the table. Nothing is committed."""
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
    """The transaction that locks the row first ends the task. The other one finds it ended."""
    for _ in range(5):
        task_id = await two[0].submitted()
        lease = await two[0].asking(task_id)
        cancelled, settled = await asyncio.gather(
            two[1].cancel(task_id), two[0].settle(task_id, failed(task_id), lease=lease)
        )
        assert (cancelled, settled) in [(None, State.CANCELLED), ("failed", State.FAILED)]
        assert len(await two[0].types(task_id)) == 2


async def test_an_upstream_id_names_one_task(subject: Subject) -> None:
    """`(upstream, upstream_id)` is unique. The constraint refuses a second task with the same
    id.
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


async def test_a_callback_during_a_query_about_a_cancelled_task_makes_another_query_due(
    subject: Subject,
) -> None:
    """Without another query, the charge that the callback stands for would be lost."""
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


async def test_a_duplicate_callback_that_brings_the_id_makes_a_query_due(subject: Subject) -> None:
    """The first callback named no id, and the submit response may never come. The store counts this
    duplicate and binds its id.
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


async def test_an_unreadable_callback_makes_a_query_due_when_the_id_arrives(
    subject: Subject,
) -> None:
    """The token proved the caller. The query is due as soon as the submit response brings the
    id.
    """
    lease = await subject.submitting()
    assert (await subject.callback(lease.key, None)).verdict == "unreadable"
    assert (await subject.task(lease.key))["settle_due_at"] is None
    await subject.submission(lease, accepted("task-unified-early"))
    assert (await subject.task(lease.key))["settle_due_at"] == subject.clock.now
