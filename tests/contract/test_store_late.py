"""Proof that comes after an end of our own making (contract section 3): state and event stand;
credits, pictures and operators get it.
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
    """A task that ended as `submission_uncertain`."""
    task_id = await subject.uncertain(15 * MINUTE)
    subject.clock.shift(15 * MINUTE)
    assert (
        await subject.submission(await subject.claimed("submit", task_id), UNDECIDED)
        is State.FAILED
    )
    return task_id


async def expired(subject: Subject) -> str:
    """A task that the upstream did not know for longer than it keeps one."""
    task_id = await subject.submitted()
    subject.clock.shift(DAY)
    assert await subject.settle(task_id, None, expires_ms=DAY) is State.EXPIRED
    return task_id


async def gone(subject: Subject) -> str:
    """A task that the upstream said was gone."""
    task_id = await subject.submitted()
    assert await subject.settle(task_id, failed(task_id, "resource_not_found")) is State.EXPIRED
    return task_id


async def cancelled(subject: Subject) -> str:
    """A task that its owner cancelled, here alone."""
    task_id = await subject.submitted()
    assert await subject.cancel(task_id) is None
    return task_id


@pytest.mark.parametrize("ending", [given_up, expired, gone])
async def test_pictures_proved_late_are_saved_and_listed(subject: Subject, ending: object) -> None:
    """The task and its one terminal event stay as they were; credits and pictures are recorded,
    operators are told once, at the last.
    """
    task_id = await ending(subject)  # type: ignore[operator]  # the three above
    before, types = await subject.task(task_id), await subject.types(task_id)
    assert (await subject.callback(task_id, completed(task_id, *URLS))).verdict == "accepted"
    assert len(await subject.images(task_id)) == 2  # fetched while the question is asked
    assert await subject.settle(
        task_id, completed(task_id, *URLS, credits_used=2_000_000)
    ) is State(before["state"])
    first, second = await subject.images(task_id)
    assert await subject.download(second, stored(second)) == "stored"
    assert await subject.types(task_id) == types  # not before the last one
    assert await subject.download(first, LOST) == "lost"
    after = await subject.task(task_id)
    assert [after[name] for name in ("state", "error", "terminal_at", "credits_used")] == [
        *(before[name] for name in ("state", "error", "terminal_at")),
        2_000_000,
    ]
    assert await subject.types(task_id) == [*types, "task.late_result"]
    (told,) = await subject.rows(events, type="task.late_result")
    assert told["owner"] == "admin"
    figures = {
        name: told["data"][name]
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


async def test_a_picture_stored_before_the_question_is_answered_is_told_of_by_the_answer(
    subject: Subject,
) -> None:
    """What only a callback named does not count; the agreement makes it count, and is the moment to
    tell.
    """
    task_id = await given_up(subject)
    await subject.callback(task_id, completed(task_id, URLS[0]))
    (image,) = await subject.images(task_id)
    assert await subject.download(image, stored(image)) == "stored"
    assert "task.late_result" not in await subject.types(task_id)
    await subject.settle(task_id, completed(task_id, URLS[0]))
    assert (await subject.types(task_id))[-1] == "task.late_result"


@pytest.mark.parametrize("status", [Status.FAILED, Status.CANCELLED])
async def test_a_task_that_turns_out_to_have_failed_is_told_of(
    subject: Subject, status: Status
) -> None:
    """Operators learn that nothing was made; what a lying callback named is forgotten."""
    task_id = await given_up(subject)
    await subject.callback(task_id, completed(task_id, URLS[0]))
    await subject.settle(
        task_id, Report(upstream_id(task_id), status, (), error_of("service_error"))
    )
    assert (await subject.types(task_id))[-1] == "task.late_result"
    assert await subject.images(task_id) == []


async def test_the_same_word_again_is_no_news(subject: Subject) -> None:
    """That an expired task is gone was said already: no event."""
    task_id = await gone(subject)
    assert (
        await subject.callback(task_id, failed(task_id, "resource_not_found"))
    ).verdict == "accepted"
    assert await subject.settle(task_id, failed(task_id, "resource_not_found")) is State.EXPIRED
    assert "task.late_result" not in await subject.types(task_id)
    assert (await subject.task(task_id))["settle_due_at"] is None


async def test_the_same_word_again_leaves_the_door_open_to_proof(subject: Subject) -> None:
    """That the task is gone settles nothing, however often it is said: pictures that are proved to
    be there at last are saved.
    """
    task_id = await gone(subject)
    await subject.callback(task_id, failed(task_id, "resource_not_found"))
    assert await subject.settle(task_id, failed(task_id, "resource_not_found")) is State.EXPIRED
    assert (await subject.task(task_id))["settled_digest"] is None
    await subject.callback(task_id, completed(task_id, URLS[0]))
    assert await subject.settle(task_id, completed(task_id, URLS[0])) is State.EXPIRED
    (image,) = await subject.images(task_id)
    assert await subject.download(image, stored(image)) == "stored"
    assert (await subject.types(task_id))[-1] == "task.late_result"


async def test_after_a_local_cancel_only_credits_are_recorded(subject: Subject) -> None:
    """We stopped waiting and keep nothing that comes; charges are still recorded."""
    task_id = await cancelled(subject)
    await subject.callback(task_id, completed(task_id, *URLS))
    assert (
        await subject.settle(task_id, completed(task_id, *URLS, credits_used=1_000_000))
        is State.CANCELLED
    )
    assert (await subject.task(task_id))["credits_used"] == 1_000_000
    assert (await subject.images(task_id), "task.late_result" in await subject.types(task_id)) == (
        [],
        False,
    )


async def test_the_upstream_is_asked_until_it_has_ended_the_task_too(subject: Subject) -> None:
    """Late proof is a final word: until then the question is asked again."""
    task_id = await given_up(subject)
    await subject.callback(task_id, completed(task_id, URLS[0]))
    assert await subject.settle(task_id, processing(task_id)) is State.FAILED
    assert (await subject.task(task_id))["settle_due_at"] is not None
    assert "task.late_result" not in await subject.types(task_id)


async def test_a_late_picture_gets_a_fresh_link(subject: Subject) -> None:
    """A dead link is asked for anew after an end of our own making too, and the fresh one is
    fetched.
    """
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


# --- doubt ---


async def test_a_submission_sent_again_after_a_doubtful_one_is_never_taken_for_not_submitted(
    subject: Subject,
) -> None:
    """That the second call created nothing proves nothing of the first: the task stays uncertain,
    and ends so.
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


async def test_two_tasks_with_one_id_the_answer_wins_over_the_callback(subject: Subject) -> None:
    """The id goes to the task whose submit answer has it; the other loses it, is asked about no
    more, and operators are told.
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
        "that was said of the other"
    )
    assert "callback.conflict" in await subject.types(lease.key)
    assert await subject.submission(robbed, accepted("task-unified-own")) is State.SUBMITTED
    assert (await subject.task(robbed.key))["upstream_id"] == "task-unified-own"


async def test_two_answers_with_one_id_leave_the_second_uncertain(subject: Subject) -> None:
    """An id belongs to one task; what was created for the other is not known."""
    first, second = await subject.submitting(), await subject.submitting()
    assert await subject.submission(first, accepted("task-unified-one")) is State.SUBMITTED
    answer = accepts(Report("task-unified-one", Status.PENDING), SECOND, decide_ms=HOUR)
    assert await subject.submission(second, answer) is State.UNCERTAIN
    assert "callback.conflict" in await subject.types(second.key)
    assert (await subject.task(second.key))["submit_due_at"] == subject.clock.now + HOUR, (
        "time for proof, as after any doubt"
    )


# --- by hand ---


async def test_an_uncertain_task_gets_its_id_by_hand(subject: Subject) -> None:
    """It is submitted, and the upstream is asked at once."""
    task_id = await subject.uncertain()
    assert await subject.write(resolve_tasks, TaskResolution(task_id, "task-unified-found")) is None
    task = await subject.task(task_id)
    assert (task["state"], task["upstream_id"], task["settle_due_at"]) == (
        "submitted",
        "task-unified-found",
        subject.clock.now,
    )
    assert await subject.types(task_id) == ["image.task.submitted"]


async def test_an_id_of_another_task_is_taken(subject: Subject) -> None:
    """Two tasks never share an id, whoever says so."""
    other, task_id = await subject.submitted(), await subject.uncertain()
    assert (
        await subject.write(resolve_tasks, TaskResolution(task_id, upstream_id(other))) == "taken"
    )
    assert await subject.state(task_id) is State.UNCERTAIN
    wishes = [
        TaskResolution(key, "task-unified-one") for key in (task_id, await subject.uncertain())
    ]
    assert await subject.batch(resolve_tasks, wishes) == [None, "taken"]


async def test_a_mistyped_id_is_corrected_until_the_upstream_answers_to_it(
    subject: Subject,
) -> None:
    """What nobody but the operator said is the operator's to take back, in every state; what is
    asked under the wrong id counts no more.
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


async def test_a_mistyped_id_is_corrected_when_the_task_has_expired_under_it(
    subject: Subject,
) -> None:
    """The upstream knew nothing of it for a day: under the right id its pictures are a late
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


async def test_what_was_refused_takes_no_id(subject: Subject) -> None:
    """Nothing was created and nothing was ever in doubt: there is no task to name."""
    lease = await subject.submitting()
    assert (
        await subject.submission(lease, refuses(400, error_of("invalid_request"))) is State.FAILED
    )
    assert (
        await subject.write(resolve_tasks, TaskResolution(lease.key, "task-unified-1")) == "failed"
    )
    assert (await subject.task(lease.key))["upstream_id"] is None


async def test_a_task_parked_while_submitting_gets_its_id_by_hand(subject: Subject) -> None:
    """A defect of ours ended it while its request was on its way: it may have been created."""
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


async def test_a_task_parked_while_storing_keeps_its_pictures(subject: Subject) -> None:
    """It is asked about no more, and ends by what becomes of the links that are known."""
    task_id = await subject.storing(URLS[0])
    for _ in range(FAULT_LIMIT):
        await subject.write(record_faults, fault(await subject.requeued("settle", task_id), 0))
    assert (await subject.types(task_id))[-1] == "task.parked"
    (image,) = await subject.images(task_id)
    assert await subject.download(image, stored(image)) == "stored"
    assert await subject.state(task_id) is State.COMPLETED


async def test_a_task_given_up_gets_its_id_by_hand_for_its_pictures(subject: Subject) -> None:
    """The end stands; what was paid for is saved as a late result."""
    task_id = await given_up(subject)
    assert await subject.write(resolve_tasks, TaskResolution(task_id, upstream_id(task_id))) is None
    assert await subject.settle(task_id, completed(task_id, URLS[0])) is State.FAILED
    (image,) = await subject.images(task_id)
    await subject.download(image, stored(image))
    assert (await subject.types(task_id))[-1] == "task.late_result"


async def test_an_uncertain_task_is_failed_by_hand(subject: Subject) -> None:
    """It ends as the time would have ended it."""
    task_id = await subject.uncertain()
    assert await subject.write(resolve_tasks, TaskResolution(task_id)) is None
    assert (await subject.task(task_id))["error"]["code"] == "submission_uncertain"
    assert await subject.write(resolve_tasks, TaskResolution(task_id)) == "failed"
    assert await subject.write(resolve_tasks, TaskResolution("task_none")) == "missing"


async def test_an_uncertain_task_is_sent_again_by_hand(subject: Subject) -> None:
    """It is due at once and stays so through refusals that create nothing; a second doubt ends the
    permission.
    """
    task_id = await subject.uncertain(HOUR)
    assert await subject.write(resolve_tasks, TaskResolution(task_id, resubmit=True)) is None
    lease = await subject.claimed("submit", task_id)
    assert await subject.start(lease, resubmit=True) is not None
    assert await subject.submission(lease, NOTHING_CREATED) is State.UNCERTAIN
    assert (await subject.task(task_id))["resubmit"]
    subject.clock.shift(5 * SECOND)
    lease = await subject.claimed("submit", task_id)
    assert (
        await subject.submission(lease, UNDECIDED) is State.UNCERTAIN
    )  # a verdict by time that met the operator's word
    lease = await subject.claimed("submit", task_id)
    assert await subject.start(lease, resubmit=True) is not None
    assert await subject.submission(lease, doubts("no answer", HOUR)) is State.UNCERTAIN
    assert not (await subject.task(task_id))["resubmit"]


async def test_a_resubmission_may_be_refused(subject: Subject) -> None:
    """Then the task has failed with the upstream's error; proof of the first call may still
    come.
    """
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


async def test_reconcile_asks_now_and_fetches_now(subject: Subject) -> None:
    """Both are due at once, whatever was planned; without an id there is nothing to ask for."""
    task_id = await subject.storing(URLS[0])
    (image,) = await subject.images(task_id)
    await subject.download(image, Retry("answered 500", HOUR))
    assert await subject.write(reconcile_tasks, task_id) is None
    assert (await subject.task(task_id))["settle_due_at"] == subject.clock.now
    assert (await subject.row(images, image["id"]))["due_at"] == subject.clock.now
    assert await subject.write(reconcile_tasks, await subject.uncertain()) == "unsubmitted"
    assert await subject.write(reconcile_tasks, "task_none") == "missing"


async def test_a_task_reconciled_twice_at_once_is_granted_once(subject: Subject) -> None:
    """Two requests in one transaction do not take two places for one picture."""
    task_id = await subject.storing(URLS[0])
    (image,) = await subject.images(task_id)
    await subject.download(image, Retry("answered 500", HOUR))
    subject.places.free = {"settle": 3, "download": 3}
    await subject.batch(reconcile_tasks, [task_id, task_id])
    assert sorted(lease.stage for lease in subject.places.new_leases()) == ["download", "settle"]
    assert subject.places.free == {"settle": 2, "download": 2}


async def test_the_first_doubt_may_be_sent_again_however_old_the_task_is(subject: Subject) -> None:
    """Once: after a second doubt, or when nothing was created of what was too old to be sent, the
    permission is used up.
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


async def test_operators_are_told_once_of_a_picture_whose_link_dies_soon(subject: Subject) -> None:
    """`image.at_risk` comes with the first failure inside the last two hours, and never again for
    that picture.
    """
    task_id = await subject.storing(URLS[0])
    (image,) = await subject.images(task_id)
    await subject.download(image, Retry("answered 500", DAY - AT_RISK_MS - SECOND))
    assert await subject.rows(events, type="image.at_risk") == []
    for _ in range(2):
        await subject.download(image, Retry("answered 500", SECOND))
    await subject.download(image, Retry("answered 500", SECOND))
    (told,) = await subject.rows(events, type="image.at_risk")
    assert (told["owner"], told["data"]["image_id"], told["data"]["reason"]) == (
        "admin",
        image["id"],
        "answered 500",
    )


async def test_a_dead_link_is_a_risk_before_its_time(subject: Subject) -> None:
    """The third 404 tells operators, long before the tenth ends it."""
    task_id = await subject.storing(URLS[0])
    for count in range(3):
        assert len(await subject.rows(events, type="image.at_risk")) == 0, count
        (image,) = await subject.images(task_id)
        await subject.download(image, Retry("answered 404", SECOND, stale=True))
    assert len(await subject.rows(events, type="image.at_risk")) == 1
