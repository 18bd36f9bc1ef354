"""Proof that arrives after Darkroom ended a task without it. State and terminal event stand. The
credits and images are recorded, and operators get an event (docs/api.md, "Proof that arrives
late").
"""

import pytest

from service.db.tables import events, images
from service.images.downloads import AT_RISK_MS, Retry
from service.queue.crashes import FAULT_LIMIT, record_faults
from service.tasks.admin import TaskResolution, reconcile_tasks, resolve_tasks
from service.tasks.state import State
from service.upstreams.base import Report, Status
from tests.contract.subject import (
    DAY,
    HOUR,
    LOST,
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
    failed,
    processing,
    refuses,
    stored,
    upstream_id,
)
from tests.stores import fault

URLS = ("https://r.test/0", "https://r.test/1")
NOTHING_CREATED = creates_nothing("429", 5 * SECOND, HOUR)


async def given_up(subject: Subject) -> str:
    """A task that failed with `submission_uncertain`."""
    task_id = await subject.uncertain(15 * MINUTE)
    subject.clock.shift(15 * MINUTE)
    assert (
        await subject.submission(await subject.claimed("submit", task_id), UNDECIDED)
        is State.FAILED
    )
    return task_id


async def expired(subject: Subject) -> str:
    """A task that the upstream has not known for longer than its retention."""
    task_id = await subject.submitted()
    subject.clock.shift(DAY)
    assert await subject.settle(task_id, None, expires_ms=DAY) is State.EXPIRED
    return task_id


async def gone(subject: Subject) -> str:
    """A task that the upstream reported as gone."""
    task_id = await subject.submitted()
    assert await subject.settle(task_id, failed(task_id, "resource_not_found")) is State.EXPIRED
    return task_id


@pytest.mark.parametrize("ending", [given_up, expired, gone])
async def test_images_proved_late_are_stored_and_listed(subject: Subject, ending: object) -> None:
    """The task and its terminal event stay as they were. Credits and images are recorded, and
    operators get one event after the last image.
    """
    task_id = await ending(subject)  # type: ignore[operator]  # the three functions above
    before, types = await subject.task(task_id), await subject.types(task_id)
    assert (await subject.callback(task_id, completed(task_id, *URLS))).verdict == "accepted"
    assert len(await subject.images(task_id)) == 2  # downloaded while the query is under way
    assert await subject.settle(
        task_id, completed(task_id, *URLS, credits_used=2_000_000)
    ) is State(before["state"])
    first, second = await subject.images(task_id)
    assert await subject.download(second, stored(second)) == "stored"
    assert await subject.types(task_id) == types  # no event before the last image
    assert await subject.download(first, LOST) == "lost"
    after = await subject.task(task_id)
    assert [after[name] for name in ("state", "error", "terminal_at", "credits_used")] == [
        *(before[name] for name in ("state", "error", "terminal_at")),
        2_000_000,
    ]
    assert await subject.types(task_id) == [*types, "task.late_result"]
    (event,) = await subject.rows(events, type="task.late_result")
    assert event["owner"] == "admin"
    figures = {
        name: event["data"][name]
        for name in ("task_id", "state", "status", "stored", "lost", "credits_used")
    }
    assert figures == {
        "task_id": task_id,
        "state": before["state"],
        "status": "completed",
        "stored": 1,
        "lost": 1,
        "credits_used": 2,
    }
    assert (await subject.callback(task_id, completed(task_id, *URLS))).verdict == "duplicate"
    assert after["settle_due_at"] is None


async def test_the_query_emits_the_event_for_an_image_that_was_stored_before_it(
    subject: Subject,
) -> None:
    """An image that only a callback named does not count. It counts when the query agrees, and that
    emits the event.
    """
    task_id = await given_up(subject)
    await subject.callback(task_id, completed(task_id, URLS[0]))
    (image,) = await subject.images(task_id)
    assert await subject.download(image, stored(image)) == "stored"
    assert "task.late_result" not in await subject.types(task_id)
    await subject.settle(task_id, completed(task_id, URLS[0]))
    assert (await subject.types(task_id))[-1] == "task.late_result"


@pytest.mark.parametrize("status", [Status.FAILED, Status.CANCELLED])
async def test_a_task_that_proves_to_have_failed_emits_an_event(
    subject: Subject, status: Status
) -> None:
    """Operators learn that nothing was made. The image that the callback named is dropped."""
    task_id = await given_up(subject)
    await subject.callback(task_id, completed(task_id, URLS[0]))
    await subject.settle(
        task_id, Report(upstream_id(task_id), status, (), error_of("service_error"))
    )
    assert (await subject.types(task_id))[-1] == "task.late_result"
    assert await subject.images(task_id) == []


async def test_proof_counts_after_repeated_reports_that_a_task_is_gone(subject: Subject) -> None:
    """Such a report settles nothing, however often it comes. Images that are proved later are
    stored.
    """
    task_id = await gone(subject)
    await subject.callback(task_id, failed(task_id, "resource_not_found"))
    assert await subject.settle(task_id, failed(task_id, "resource_not_found")) is State.EXPIRED
    task = await subject.task(task_id)
    assert (task["settled_digest"], task["settle_due_at"]) == (None, None)
    assert "task.late_result" not in await subject.types(task_id)
    await subject.callback(task_id, completed(task_id, URLS[0]))
    assert await subject.settle(task_id, completed(task_id, URLS[0])) is State.EXPIRED
    (image,) = await subject.images(task_id)
    assert await subject.download(image, stored(image)) == "stored"
    assert (await subject.types(task_id))[-1] == "task.late_result"


async def test_queries_go_on_until_the_upstream_has_ended_the_task_too(subject: Subject) -> None:
    """Another query is due until the report is final. Only a final report is late proof."""
    task_id = await given_up(subject)
    await subject.callback(task_id, completed(task_id, URLS[0]))
    assert await subject.settle(task_id, processing(task_id)) is State.FAILED
    assert (await subject.task(task_id))["settle_due_at"] is not None
    assert "task.late_result" not in await subject.types(task_id)


async def test_a_late_image_gets_a_fresh_link(subject: Subject) -> None:
    """A query asks for a fresh link after the end of the task too, and the worker downloads it."""
    task_id = await given_up(subject)
    await subject.callback(task_id, completed(task_id, URLS[0]))
    await subject.settle(task_id, completed(task_id, URLS[0]))
    (image,) = await subject.images(task_id)
    assert await subject.download(image, Retry("answered 404", SECOND, stale=True)) == "pending"
    await subject.settle(task_id, completed(task_id, "https://r.test/fresh"))
    (image,) = await subject.images(task_id)
    assert image["source_url"] == "https://r.test/fresh"
    assert await subject.download(image, stored(image)) == "stored"
    assert (await subject.types(task_id))[-1] == "task.late_result"


# --- uncertain submissions ---


async def test_a_resubmission_that_creates_nothing_leaves_the_task_uncertain(
    subject: Subject,
) -> None:
    """The second call proves nothing about the first. The task ends with `submission_uncertain`,
    never with `not_submitted`.
    """
    task_id = await subject.uncertain(SECOND)
    subject.clock.shift(2 * HOUR)
    lease = await subject.claimed("submit", task_id)
    assert await subject.start(lease, resubmit=True) is not None
    assert await subject.submission(lease, NOTHING_CREATED) is State.UNCERTAIN
    subject.clock.shift(5 * SECOND)
    assert (
        await subject.submission(await subject.claimed("submit", task_id), UNDECIDED)
        is State.FAILED
    )
    assert (await subject.task(task_id))["error"]["code"] == "submission_uncertain"


async def test_of_two_tasks_with_one_id_the_submit_response_wins_over_the_callback(
    subject: Subject,
) -> None:
    """The id goes to the task whose submit response has it. The other task loses it and is not
    queried any more, and operators get an event.
    """
    lease = await subject.submitting()
    robbed = await subject.submitting()
    shared = upstream_id(lease.key)
    assert (
        await subject.callback(robbed.key, Report(shared, Status.COMPLETED, URLS))
    ).verdict == "accepted"
    asked = await subject.claimed("settle", robbed.key)
    assert await subject.submission(lease, accepted(shared)) is State.SUBMITTED
    assert [(await subject.task(key))["upstream_id"] for key in (lease.key, robbed.key)] == [
        shared,
        None,
    ]
    assert await subject.settle(robbed.key, completed(robbed.key, *URLS), lease=asked) is None, (
        "the answer was about the other task"
    )
    assert "callback.conflict" in await subject.types(lease.key)
    assert await subject.submission(robbed, accepted("task-unified-own")) is State.SUBMITTED
    assert (await subject.task(robbed.key))["upstream_id"] == "task-unified-own"


async def test_two_submit_responses_with_one_id_leave_the_second_task_uncertain(
    subject: Subject,
) -> None:
    """An id belongs to one task, so the second submission has no known id."""
    first, second = await subject.submitting(), await subject.submitting()
    assert await subject.submission(first, accepted("task-unified-one")) is State.SUBMITTED
    answer = accepts(Report("task-unified-one", Status.PENDING), SECOND, decide_ms=HOUR)
    assert await subject.submission(second, answer) is State.UNCERTAIN
    assert "callback.conflict" in await subject.types(second.key)
    assert (await subject.task(second.key))["submit_due_at"] == subject.clock.now + HOUR, (
        "time for proof, as for any uncertain task"
    )


# --- by hand ---


async def test_an_uncertain_task_gets_its_id_by_hand(subject: Subject) -> None:
    """The task is submitted, and a query is due at once."""
    task_id = await subject.uncertain()
    assert await subject.write(resolve_tasks, TaskResolution(task_id, "task-unified-found")) is None
    task = await subject.task(task_id)
    assert (task["state"], task["upstream_id"], task["settle_due_at"]) == (
        "submitted",
        "task-unified-found",
        subject.clock.now,
    )
    assert await subject.types(task_id) == ["image.task.submitted"]


async def test_an_id_of_another_task_is_refused_by_hand(subject: Subject) -> None:
    """Two tasks never share an id, also within one batch."""
    other, task_id = await subject.submitted(), await subject.uncertain()
    assert (
        await subject.write(resolve_tasks, TaskResolution(task_id, upstream_id(other))) == "taken"
    )
    assert await subject.state(task_id) is State.UNCERTAIN
    wishes = [
        TaskResolution(key, "task-unified-one") for key in (task_id, await subject.uncertain())
    ]
    assert await subject.batch(resolve_tasks, wishes) == [None, "taken"]


async def test_a_mistyped_id_can_be_corrected_until_the_upstream_confirms_it(
    subject: Subject,
) -> None:
    """The operator may replace an id that only the operator gave, in every state. An answer to a
    query under the wrong id does not count.
    """
    task_id = await subject.uncertain()
    assert (
        await subject.write(resolve_tasks, TaskResolution(task_id, "task-unified-mistyped")) is None
    )
    assert (
        await subject.write(resolve_tasks, TaskResolution(task_id, "task-unified-mistyped")) is None
    )
    wrong = await subject.claimed("settle", task_id)
    assert await subject.write(resolve_tasks, TaskResolution(task_id, resubmit=True)) == "submitted"
    assert await subject.write(resolve_tasks, TaskResolution(task_id, "task-unified-right")) is None
    task = await subject.task(task_id)
    assert (task["state"], task["upstream_id"], task["settle_due_at"]) == (
        "submitted",
        "task-unified-right",
        subject.clock.now,
    )
    assert await subject.settle(task_id, completed(task_id, URLS[0]), lease=wrong) is None
    assert await subject.settle(task_id, processing(task_id)) is State.SUBMITTED
    assert (
        await subject.write(resolve_tasks, TaskResolution(task_id, "task-unified-other"))
        == "submitted"
    )
    assert await subject.types(task_id) == ["image.task.submitted"]


async def test_a_mistyped_id_can_be_corrected_after_the_task_expired_under_it(
    subject: Subject,
) -> None:
    """The upstream did not know the wrong id for a day. Under the right id, the images are a late
    result.
    """
    task_id = await subject.uncertain()
    await subject.write(resolve_tasks, TaskResolution(task_id, "task-unified-mistyped"))
    subject.clock.shift(DAY)
    assert await subject.settle(task_id, None, expires_ms=DAY) is State.EXPIRED
    assert await subject.write(resolve_tasks, TaskResolution(task_id, "task-unified-right")) is None
    assert await subject.settle(task_id, completed(task_id, URLS[0])) is State.EXPIRED
    (image,) = await subject.images(task_id)
    await subject.download(image, stored(image))
    assert (await subject.types(task_id))[-1] == "task.late_result"
    assert (
        await subject.write(resolve_tasks, TaskResolution(task_id, "task-unified-other"))
        == "expired"
    )


async def test_a_refused_task_takes_no_id_by_hand(subject: Subject) -> None:
    """The upstream created nothing, and the outcome was never uncertain."""
    lease = await subject.submitting()
    assert (
        await subject.submission(lease, refuses(400, error_of("invalid_request"))) is State.FAILED
    )
    assert (
        await subject.write(resolve_tasks, TaskResolution(lease.key, "task-unified-1")) == "failed"
    )
    assert (await subject.task(lease.key))["upstream_id"] is None


async def test_a_task_parked_while_submitting_gets_its_id_by_hand(subject: Subject) -> None:
    """Our own defect ended the task while its request was on its way, so the upstream may have
    created it.
    """
    lease = await subject.submitting()
    for _ in range(FAULT_LIMIT):
        await subject.write(record_faults, fault(lease, 0))
        lease = next(iter(await subject.claim("submit")), lease)
    assert (await subject.task(lease.key))["error"]["code"] == "internal_error"
    assert (
        await subject.write(resolve_tasks, TaskResolution(lease.key, upstream_id(lease.key)))
        is None
    )
    assert await subject.settle(lease.key, completed(lease.key, URLS[0])) is State.FAILED
    assert len(await subject.images(lease.key)) == 1


async def test_a_task_parked_while_storing_keeps_its_images(subject: Subject) -> None:
    """No further query is due. The task ends by the outcome of its downloads."""
    task_id = await subject.storing(URLS[0])
    for _ in range(FAULT_LIMIT):
        await subject.write(record_faults, fault(await subject.requeued("settle", task_id), 0))
    assert (await subject.types(task_id))[-1] == "task.parked"
    (image,) = await subject.images(task_id)
    assert await subject.download(image, stored(image)) == "stored"
    assert await subject.state(task_id) is State.COMPLETED


async def test_a_task_that_ended_as_uncertain_gets_its_images_by_hand(subject: Subject) -> None:
    """The end stands, and the paid images are stored as a late result."""
    task_id = await given_up(subject)
    assert await subject.write(resolve_tasks, TaskResolution(task_id, upstream_id(task_id))) is None
    assert await subject.settle(task_id, completed(task_id, URLS[0])) is State.FAILED
    (image,) = await subject.images(task_id)
    await subject.download(image, stored(image))
    assert (await subject.types(task_id))[-1] == "task.late_result"


async def test_an_uncertain_task_is_failed_by_hand(subject: Subject) -> None:
    """It ends as it would have ended at its time limit."""
    task_id = await subject.uncertain()
    assert await subject.write(resolve_tasks, TaskResolution(task_id)) is None
    assert (await subject.task(task_id))["error"]["code"] == "submission_uncertain"
    assert await subject.write(resolve_tasks, TaskResolution(task_id)) == "failed"
    assert await subject.write(resolve_tasks, TaskResolution("task_none")) == "missing"


async def test_an_uncertain_task_is_resubmitted_by_hand(subject: Subject) -> None:
    """It is due at once, and again after outcomes that prove that nothing was created. A second
    uncertain outcome ends the permission.
    """
    task_id = await subject.uncertain(HOUR)
    assert await subject.write(resolve_tasks, TaskResolution(task_id, resubmit=True)) is None
    lease = await subject.claimed("submit", task_id)
    assert await subject.start(lease, resubmit=True) is not None
    assert await subject.submission(lease, NOTHING_CREATED) is State.UNCERTAIN
    assert (await subject.task(task_id))["resubmit"]
    subject.clock.shift(5 * SECOND)
    lease = await subject.claimed("submit", task_id)
    # The time limit decided just as the operator allowed the resubmission.
    assert await subject.submission(lease, UNDECIDED) is State.UNCERTAIN
    lease = await subject.claimed("submit", task_id)
    assert await subject.start(lease, resubmit=True) is not None
    assert await subject.submission(lease, doubts("no answer", HOUR)) is State.UNCERTAIN
    assert not (await subject.task(task_id))["resubmit"]


async def test_a_resubmission_may_be_refused(subject: Subject) -> None:
    """The task fails with the upstream's error. Proof of the first call may still come."""
    task_id = await subject.uncertain(SECOND)
    subject.clock.shift(SECOND)
    lease = await subject.claimed("submit", task_id)
    await subject.start(lease, resubmit=True)
    assert (
        await subject.submission(lease, refuses(400, error_of("invalid_request"))) is State.FAILED
    )
    assert (await subject.callback(task_id, completed(task_id, URLS[0]))).verdict == "accepted"
    assert await subject.settle(task_id, completed(task_id, URLS[0])) is State.FAILED
    assert len(await subject.images(task_id)) == 1


async def test_reconcile_makes_the_query_and_the_downloads_due_now(subject: Subject) -> None:
    """The planned due times do not matter. Without an id, no query is possible."""
    task_id = await subject.storing(URLS[0])
    (image,) = await subject.images(task_id)
    await subject.download(image, Retry("answered 500", HOUR))
    assert await subject.write(reconcile_tasks, task_id) is None
    assert (await subject.task(task_id))["settle_due_at"] == subject.clock.now
    assert (await subject.row(images, image["id"]))["due_at"] == subject.clock.now
    assert await subject.write(reconcile_tasks, await subject.uncertain()) == "unsubmitted"
    assert await subject.write(reconcile_tasks, "task_none") == "missing"


async def test_a_task_reconciled_twice_at_once_is_leased_once(subject: Subject) -> None:
    """Two requests in one transaction take one place for the query and one for the image."""
    task_id = await subject.storing(URLS[0])
    (image,) = await subject.images(task_id)
    await subject.download(image, Retry("answered 500", HOUR))
    subject.places.free = {"settle": 3, "download": 3}
    await subject.batch(reconcile_tasks, [task_id, task_id])
    assert sorted(lease.stage for lease in subject.places.new_leases()) == ["download", "settle"]
    assert subject.places.free == {"settle": 2, "download": 2}


async def test_the_first_uncertain_outcome_allows_one_resubmission_at_any_age(
    subject: Subject,
) -> None:
    """The permission ends after a second uncertain outcome, and when the resubmission created
    nothing.
    """
    lease = await subject.submitting()
    assert (
        await subject.submission(lease, doubts("no answer", SECOND, resend=True)) is State.UNCERTAIN
    )
    assert (await subject.task(lease.key))["resubmit"]
    subject.clock.shift(HOUR)
    again = await subject.claimed("submit", lease.key)
    assert await subject.start(again, resubmit=True) is not None
    assert await subject.submission(again, NOTHING_CREATED) is State.UNCERTAIN
    assert not (await subject.task(lease.key))["resubmit"]
    subject.clock.shift(5 * SECOND)
    last = await subject.claimed("submit", lease.key)
    assert await subject.start(last, resubmit=True) is not None
    assert (
        await subject.submission(last, doubts("no answer", SECOND, resend=True)) is State.UNCERTAIN
    )
    assert not (await subject.task(lease.key))["resubmit"]


# --- at risk ---


async def test_operators_get_one_event_about_an_image_whose_link_expires_soon(
    subject: Subject,
) -> None:
    """`image.at_risk` is emitted at the first failure within the last two hours, once per image."""
    task_id = await subject.storing(URLS[0])
    (image,) = await subject.images(task_id)
    await subject.download(image, Retry("answered 500", DAY - AT_RISK_MS - SECOND))
    assert await subject.rows(events, type="image.at_risk") == []
    for _ in range(2):
        await subject.download(image, Retry("answered 500", SECOND))
    await subject.download(image, Retry("answered 500", SECOND))
    (event,) = await subject.rows(events, type="image.at_risk")
    assert (event["owner"], event["data"]["image_id"], event["data"]["reason"]) == (
        "admin",
        image["id"],
        "answered 500",
    )


async def test_the_third_404_of_a_link_puts_the_image_at_risk(subject: Subject) -> None:
    """Operators get the event long before the tenth 404 is final."""
    task_id = await subject.storing(URLS[0])
    for count in range(3):
        assert len(await subject.rows(events, type="image.at_risk")) == 0, count
        (image,) = await subject.images(task_id)
        await subject.download(image, Retry("answered 404", SECOND, stale=True))
    assert len(await subject.rows(events, type="image.at_risk")) == 1
