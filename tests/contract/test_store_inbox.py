"""The inbox: every row of contract section 4's table that reaches the store."""

import asyncio
from itertools import permutations

import pytest

from service.db.tables import callbacks, tasks
from service.images.downloads import Lost
from service.tasks.callbacks import BODIES, BODY_BYTES, KEPT, accept_callbacks
from service.tasks.state import State
from service.upstreams.base import Report, Status
from tests.contract.subject import (
    FIRST_QUERY,
    LOST,
    SECOND,
    UNDECIDED,
    Subject,
    accepted,
    accepts,
    callback,
    completed,
    digest,
    failed,
    processing,
    upstream_id,
)

URL, OTHER = "https://r.test/0", "https://r.test/other"


async def conflicts(subject: Subject) -> int:
    return (await subject.types()).count("callback.conflict")


async def test_the_first_terminal_callback_is_accepted_and_kept(subject: Subject) -> None:
    """It is written down with its body, and the upstream is asked at once."""
    task_id = await subject.submitted()
    subject.clock.shift(SECOND)
    verdict = await subject.callback(task_id, completed(task_id, URL), b'{"id": 1}')
    assert (verdict.verdict, verdict.owner, verdict.upstream_id) == (
        "accepted",
        "painter",
        upstream_id(task_id),
    )
    (row,) = await subject.rows(callbacks)
    assert (row["id"], row["task_id"], row["owner"], row["body"]) == (
        verdict.callback_id,
        task_id,
        "painter",
        b'{"id": 1}',
    )
    assert (row["first"], row["count"], row["verdict"], row["status"]) == (
        True,
        1,
        "accepted",
        "completed",
    )
    task = await subject.task(task_id)
    assert (task["called_back_at"], task["settle_due_at"], task["settle_requests"]) == (
        subject.clock.now,
        subject.clock.now,
        1,
    )
    assert task["state"] == "submitted", "a callback alone settles nothing"


async def test_a_callback_that_agrees_again_is_counted_and_nothing_else(subject: Subject) -> None:
    """Duplicates raise the counter and the last-seen time of the first; no row, no event, no
    question.
    """
    task_id = await subject.submitted()
    await subject.callback(task_id, completed(task_id, URL))
    before, events = await subject.task(task_id), await subject.types()
    for _ in range(3):
        subject.clock.shift(SECOND)
        assert (
            await subject.callback(task_id, completed(task_id, URL), b"other bytes")
        ).verdict == "duplicate"
    (row,) = await subject.rows(callbacks)
    assert (row["count"], row["received_at"] + 3 * SECOND, row["last_seen_at"]) == (
        4,
        subject.clock.now,
        subject.clock.now,
    )
    assert (row["body"], row["verdict"]) == (b"{}", "accepted")
    assert (await subject.task(task_id), await subject.types()) == (before, events)


@pytest.mark.parametrize("other", ["status", "results"])
async def test_another_outcome_is_a_conflict_and_told_once(subject: Subject, other: str) -> None:
    """Kept, the upstream is asked again, one event for operators however often it comes; what
    stands stands.
    """
    task_id = await subject.submitted()
    await subject.callback(task_id, completed(task_id, URL))
    report = failed(task_id) if other == "status" else completed(task_id, OTHER)
    verdicts = [(await subject.callback(task_id, report)).verdict for _ in range(3)]
    assert verdicts == ["conflict"] * 3
    first, second = await subject.rows(callbacks)
    assert (first["verdict"], first["count"], first["first"]) == ("accepted", 1, True)
    assert (second["verdict"], second["count"], second["first"]) == ("conflict", 3, None)
    (event,) = [event for event in await subject.events() if event["type"] == "callback.conflict"]
    assert (event["owner"], event["task_id"], event["data"]["callback_id"]) == (
        "admin",
        task_id,
        second["id"],
    )
    assert (await subject.task(task_id))["settle_requests"] == 2
    assert [row["source_url"] for row in await subject.images(task_id)] == [URL]


async def test_each_distinct_conflict_is_told_once(subject: Subject) -> None:
    """Three outcomes that contradict the first are three events; `first` never moves."""
    task_id = await subject.submitted()
    await subject.callback(task_id, completed(task_id, URL))
    for report in (
        failed(task_id),
        completed(task_id, OTHER),
        completed(task_id, OTHER, URL),
        failed(task_id),
    ):
        assert (await subject.callback(task_id, report)).verdict == "conflict"
    assert await conflicts(subject) == 3


async def test_a_callback_is_compared_with_what_is_settled(subject: Subject) -> None:
    """Settled without a callback: who agrees is a duplicate, who does not is a conflict, and the
    task stays as it is.
    """
    task_id = await subject.submitted()
    assert await subject.settle(task_id, failed(task_id)) is State.FAILED
    assert (
        await subject.callback(task_id, failed(task_id, "service_error"))
    ).verdict == "duplicate"
    assert (await subject.callback(task_id, completed(task_id, URL))).verdict == "conflict"
    assert await subject.state(task_id) is State.FAILED
    assert await subject.types(task_id) == [
        "image.task.submitted",
        "image.task.failed",
        "callback.conflict",
    ]


async def test_the_first_callback_turns_into_a_conflict_when_the_query_said_otherwise(
    subject: Subject,
) -> None:
    """The query is the truth: the first callback's repetition contradicts it, which is told once,
    on the row that is there.
    """
    task_id = await subject.submitted()
    await subject.callback(task_id, failed(task_id))
    assert await subject.settle(task_id, completed(task_id, URL)) is State.STORING
    assert [(await subject.callback(task_id, failed(task_id))).verdict for _ in range(2)] == [
        "conflict",
        "conflict",
    ]
    (row,) = await subject.rows(callbacks)
    assert (row["verdict"], row["count"], await conflicts(subject)) == ("conflict", 3, 1)


async def test_links_that_a_query_renewed_make_no_conflict(subject: Subject) -> None:
    """The first callback still agrees in status when the query only named other links; a third set
    of links does not.
    """
    task_id = await subject.submitted()
    await subject.callback(task_id, completed(task_id, URL))
    assert await subject.settle(task_id, completed(task_id, OTHER)) is State.STORING
    assert (await subject.callback(task_id, completed(task_id, URL))).verdict == "duplicate"
    assert (await subject.callback(task_id, completed(task_id, OTHER))).verdict == "duplicate"
    assert (
        await subject.callback(task_id, completed(task_id, "https://r.test/third"))
    ).verdict == "conflict"


async def test_a_lost_result_still_agrees_with_the_callback(subject: Subject) -> None:
    """The comparison is with the upstream's word: our own failure to save is no contradiction."""
    task_id = await subject.storing(URL)
    (image,) = await subject.images(task_id)
    await subject.download(image, LOST)
    assert await subject.state(task_id) is State.FAILED
    assert (await subject.callback(task_id, completed(task_id, URL))).verdict == "duplicate"


async def test_processing_is_progress_and_never_moves_a_task_back(subject: Subject) -> None:
    """Accepted at any time: before the end it shows, after a terminal callback or the end it
    changes nothing that counts.
    """
    task_id = await subject.submitted()
    assert (await subject.callback(task_id, processing(task_id, progress=40))).verdict == "accepted"
    task = await subject.task(task_id)
    assert (task["upstream_status"], task["progress"], task["called_back_at"]) == (
        "processing",
        40,
        None,
    )
    await subject.callback(task_id, processing(task_id, progress=20))
    assert (await subject.task(task_id))["progress"] == 40
    await subject.callback(task_id, completed(task_id, URL))
    assert await subject.settle(task_id, completed(task_id, URL)) is State.STORING
    assert (await subject.callback(task_id, processing(task_id, progress=60))).verdict == "accepted"
    assert (await subject.task(task_id))["state"] == "storing"
    (image,) = await subject.images(task_id)
    assert await subject.download(image, Lost("gone")) == "lost"
    assert await subject.state(task_id) is State.FAILED
    before = await subject.task(task_id)
    assert (await subject.callback(task_id, processing(task_id, progress=80))).verdict == "accepted"
    assert await subject.task(task_id) == before


async def test_an_undocumented_status_is_kept_and_not_terminal(subject: Subject) -> None:
    """A status that nobody documented is progress at most."""
    task_id = await subject.submitted()
    assert (await subject.callback(task_id, Report(upstream_id(task_id)))).verdict == "accepted"
    (row,) = await subject.rows(callbacks)
    assert (row["status"], row["first"]) == (None, None)


async def test_an_unreadable_callback_is_kept_and_the_upstream_asked(subject: Subject) -> None:
    """The token proves who calls: asked at once, the same bytes once, others again, and never taken
    for the first terminal one.
    """
    task_id = await subject.submitted()
    for body in (b"<html>", b"<html>", b"\x00"):
        assert (await subject.callback(task_id, None, body)).verdict == "unreadable"
    assert {row["body"]: row["count"] for row in await subject.rows(callbacks)} == {
        b"<html>": 2,
        b"\x00": 1,
    }
    task = await subject.task(task_id)
    assert (task["settle_due_at"], task["settle_requests"], task["called_back_at"]) == (
        subject.clock.now,
        2,
        None,
    )
    assert (await subject.callback(task_id, completed(task_id, URL))).verdict == "accepted"


async def test_an_unreadable_callback_after_the_end_asks_once_more(subject: Subject) -> None:
    """The token proves who calls: it is kept and the upstream is asked, and what is settled
    stands.
    """
    task_id = await subject.completed()
    assert (await subject.callback(task_id, None, b"<html>")).verdict == "unreadable"
    assert await subject.settle(task_id, completed(task_id, "https://r.test/0")) is State.COMPLETED
    assert (await subject.task(task_id))["settle_due_at"] is None


async def test_an_unreadable_callback_before_the_id_is_known_has_nothing_to_ask_for(
    subject: Subject,
) -> None:
    """It is kept; the question waits for an id."""
    lease = await subject.submitting()
    assert (await subject.callback(lease.key, None, b"<html>")).verdict == "unreadable"
    assert (await subject.task(lease.key))["settle_due_at"] is None


async def test_a_foreign_upstream_id_is_a_conflict(subject: Subject) -> None:
    """Another id than the known one: kept, told once, the upstream is asked about the known one;
    nothing is fetched.
    """
    task_id = await subject.submitted()
    foreign = Report("task-unified-foreign", Status.COMPLETED, (URL,))
    assert [(await subject.callback(task_id, foreign)).verdict for _ in range(2)] == [
        "conflict",
        "conflict",
    ]
    task = await subject.task(task_id)
    assert (task["upstream_id"], task["settle_requests"], task["called_back_at"]) == (
        upstream_id(task_id),
        1,
        None,
    )
    assert (await subject.images(task_id), await conflicts(subject)) == ([], 1)
    assert (await subject.callback(task_id, completed(task_id, URL))).verdict == "accepted", (
        "the right one still counts as first"
    )


async def test_the_id_of_another_task_of_ours_is_a_conflict(subject: Subject) -> None:
    """A callback cannot bind an id that another task has, known before or bound by its neighbour in
    the batch.
    """
    taken = upstream_id(await subject.submitted())
    claimed = [await subject.submitting() for _ in range(3)]
    reports = [
        Report(name, Status.COMPLETED, (URL,))
        for name in (taken, "task-unified-new", "task-unified-new")
    ]
    verdicts = await subject.batch(
        accept_callbacks,
        [callback(lease.key, report) for lease, report in zip(claimed, reports, strict=True)],
    )
    assert [verdict.verdict for verdict in verdicts] == ["conflict", "accepted", "conflict"]
    rows = [await subject.task(lease.key) for lease in claimed]
    assert [(row["state"], row["upstream_id"]) for row in rows] == [
        ("submitting", None),
        ("submitted", "task-unified-new"),
        ("submitting", None),
    ]


async def test_a_callback_before_the_submit_answer_binds_the_id(subject: Subject) -> None:
    """It is never refused for coming early: the task is submitted by it, and the answer that
    follows changes nothing.
    """
    lease = await subject.submitting()
    assert (await subject.callback(lease.key, completed(lease.key, URL))).verdict == "accepted"
    task = await subject.task(lease.key)
    assert (task["state"], task["upstream_id"], task["upstream_id_from"]) == (
        "submitted",
        upstream_id(lease.key),
        "callback",
    )
    assert task["settle_due_at"] == subject.clock.now
    assert await subject.submission(lease, accepted(upstream_id(lease.key))) is State.SUBMITTED
    assert (await subject.task(lease.key))["settle_due_at"] == subject.clock.now
    assert await subject.types(lease.key) == ["image.task.submitted"]
    assert await subject.settle(lease.key, completed(lease.key, URL)) is State.STORING


async def test_progress_before_the_submit_answer_gets_the_task_asked_about(
    subject: Subject,
) -> None:
    """The answer that would have planned the first question may never come: nothing else would ever
    ask.
    """
    lease = await subject.submitting()
    assert (await subject.callback(lease.key, processing(lease.key))).verdict == "accepted"
    assert (await subject.task(lease.key))["settle_due_at"] == subject.clock.now
    assert (await subject.task(lease.key))["upstream_status"] == "processing"


async def test_a_callback_without_an_id_waits_for_the_answer(subject: Subject) -> None:
    """There is nothing to ask for yet; the answer's id gets the task settled at once."""
    lease = await subject.submitting()
    assert (
        await subject.callback(lease.key, Report(None, Status.COMPLETED, (URL,)))
    ).verdict == "accepted"
    assert (await subject.task(lease.key))["settle_due_at"] is None
    assert await subject.submission(lease, accepted(upstream_id(lease.key))) is State.SUBMITTED
    assert (await subject.task(lease.key))["settle_due_at"] == subject.clock.now


async def test_a_callback_proves_what_looked_as_if_nothing_was_created(subject: Subject) -> None:
    """Queued again, and called back: submitted, and not sent once more."""
    task_id = await subject.queued()
    await subject.callback(task_id, completed(task_id, URL))
    assert await subject.state(task_id) is State.SUBMITTED
    assert await subject.claim("submit") == []


async def test_a_task_no_longer_known_is_unknown(subject: Subject) -> None:
    """200 `unknown`: nothing is kept."""
    verdict = await subject.callback("task_gone", completed("task_gone", URL))
    assert (verdict.verdict, verdict.callback_id, verdict.owner) == ("unknown", None, None)
    assert await subject.rows(callbacks) == []


async def test_a_callback_after_a_local_cancel_only_gets_the_charge_recorded(
    subject: Subject,
) -> None:
    """Nothing is fetched, state and event stand; the upstream is asked for the credits."""
    task_id = await subject.submitted()
    await subject.cancel(task_id)
    assert (await subject.callback(task_id, completed(task_id, URL))).verdict == "accepted"
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
    assert await subject.types(task_id) == ["image.task.submitted", "image.task.cancelled"]


async def test_a_callback_after_an_end_of_our_own_making_is_kept_and_asked_about(
    subject: Subject,
) -> None:
    """Proof that comes after `submission_uncertain`: state and event stand, id and credits are
    recorded.
    """
    task_id = await subject.uncertain(decide_ms=0)
    assert (
        await subject.submission(await subject.claimed("submit", task_id), UNDECIDED)
        is State.FAILED
    )
    assert (await subject.callback(task_id, completed(task_id, URL))).verdict == "accepted"
    assert (
        await subject.settle(task_id, completed(task_id, URL, credits_used=1_000_000))
        is State.FAILED
    )
    task = await subject.task(task_id)
    assert (task["upstream_id"], task["credits_used"], task["error"]["code"]) == (
        upstream_id(task_id),
        1_000_000,
        "submission_uncertain",
    )
    assert await subject.types(task_id) == ["image.task.failed"]


async def test_every_verdict_at_once_in_one_batch(subject: Subject) -> None:
    """A batch judges each item as if it had come alone, the later ones of a task after the
    earlier.
    """
    one, two, three = [await subject.submitted() for _ in range(3)]
    items = [
        callback(one, completed(one, URL)),
        callback(two, processing(two)),
        callback("task_gone", failed("task_gone")),
        callback(one, completed(one, URL)),
        callback(one, failed(one)),
        callback(three, None, b"<html>"),
        callback(two, failed(two)),
        callback(three, Report("task-unified-foreign", Status.FAILED)),
        callback(one, failed(one)),
    ]
    verdicts = [verdict.verdict for verdict in await subject.batch(accept_callbacks, items)]
    assert verdicts == [
        "accepted",
        "accepted",
        "unknown",
        "duplicate",
        "conflict",
        "unreadable",
        "accepted",
        "conflict",
        "conflict",
    ]
    assert [
        (row["task_id"], row["verdict"], row["count"], row["first"])
        for row in await subject.rows(callbacks)
    ] == [
        (one, "accepted", 2, True),
        (two, "accepted", 1, None),
        (one, "conflict", 2, None),
        (three, "unreadable", 1, None),
        (two, "accepted", 1, True),
        (three, "conflict", 1, None),
    ]


async def test_any_order_of_three_callbacks_keeps_one_first(subject: Subject) -> None:
    """Whatever comes first stands; the others are judged by it."""
    for order in permutations(("completed", "failed", "processing")):
        task_id = await subject.submitted()
        reports = {
            "completed": completed(task_id, URL),
            "failed": failed(task_id),
            "processing": processing(task_id),
        }
        verdicts = {
            name: (await subject.callback(task_id, reports[name])).verdict for name in order
        }
        first, second = (name for name in order if name != "processing")
        assert verdicts == {"processing": "accepted", first: "accepted", second: "conflict"}
        assert [
            row["digest"] for row in await subject.rows(callbacks, task_id=task_id, first=True)
        ] == [digest(reports[first])]


async def test_a_callback_run_again_is_not_counted_again(subject: Subject) -> None:
    """After a commit whose answer was lost, the same call gives the same verdict and no
    duplicate.
    """
    task_id = await subject.submitted()
    for report, verdict in [
        (completed(task_id, URL), "accepted"),
        (failed(task_id), "conflict"),
        (None, "unreadable"),
    ]:
        item = callback(task_id, report, b"body")
        assert {(await subject.write(accept_callbacks, item)).verdict for _ in range(2)} == {
            verdict
        }
    assert [row["count"] for row in await subject.rows(callbacks)] == [1, 1, 1]
    assert await conflicts(subject) == 1


async def test_a_flood_of_distinct_callbacks_is_kept_in_bounds(subject: Subject) -> None:
    """Beyond the bound they are answered and counted on the last; the first terminal one is kept
    all the same.
    """
    task_id = await subject.submitted()
    for number in range(KEPT + 5):
        assert (await subject.callback(task_id, None, b"%d" % number)).verdict == "unreadable"
        subject.clock.shift(1)
    kept = await subject.rows(callbacks)
    assert [row["count"] for row in kept] == [1] * (KEPT - 1) + [6]
    assert (await subject.callback(task_id, completed(task_id, URL))).verdict == "accepted"
    assert (await subject.callback(task_id, completed(task_id, URL))).verdict == "duplicate"
    assert (await subject.callback(task_id, failed(task_id))).verdict == "conflict"
    assert len(await subject.rows(callbacks)) == KEPT + 1
    assert [row["count"] for row in await subject.rows(callbacks, first=True)] == [3]


async def test_few_bodies_are_kept_and_the_first_terminal_one_whole(subject: Subject) -> None:
    """The row of each callback stays. Only the first terminal body is ever read again."""
    task_id = await subject.submitted()
    for number in range(BODIES + 2):
        await subject.callback(task_id, None, b"%d" % number * (BODY_BYTES + 1))
        subject.clock.shift(1)
    large = b"x" * (BODY_BYTES + 1)
    await subject.callback(task_id, completed(task_id, URL), large)
    *rows, first = await subject.rows(callbacks)
    assert [len(row["body"]) for row in rows] == [BODY_BYTES] * BODIES + [0] * 2
    assert (first["first"], first["body"]) == (True, large)


async def test_two_processes_judge_one_tasks_callbacks_one_after_another(
    two: tuple[Subject, Subject],
) -> None:
    """However many arrive at once in both: one is the first, the equal ones are counted on it, the
    others told once.
    """
    for _ in range(5):
        task_id = await two[0].submitted()
        reports = [
            completed(task_id, URL),
            failed(task_id),
            completed(task_id, URL),
            failed(task_id),
        ] * 3
        verdicts = await asyncio.gather(
            *(two[n // 2 % 2].callback(task_id, report) for n, report in enumerate(reports))
        )
        kept = await two[0].rows(callbacks, task_id=task_id)
        assert sorted((row["count"], row["verdict"]) for row in kept) == [
            (6, "accepted"),
            (6, "conflict"),
        ]
        assert (
            sorted(verdict.verdict for verdict in verdicts)
            == ["accepted"] + ["conflict"] * 6 + ["duplicate"] * 5
        )
        assert (await two[0].types(task_id)).count("callback.conflict") == 1


async def test_two_processes_cannot_bind_one_id_to_two_tasks(two: tuple[Subject, Subject]) -> None:
    """The constraint decides who was first; the other is a conflict, not an error."""
    for number in range(5):
        claimed = [await place.submitting() for place in two]
        report = Report(f"task-unified-{number}", Status.COMPLETED, (URL,))
        verdicts = await asyncio.gather(
            *(place.callback(lease.key, report) for place, lease in zip(two, claimed, strict=True))
        )
        assert sorted(verdict.verdict for verdict in verdicts) == ["accepted", "conflict"]
        assert len(await two[0].rows(tasks, upstream_id=report.upstream_id)) == 1


async def test_callback_and_answer_at_once_from_two_processes_agree(
    two: tuple[Subject, Subject],
) -> None:
    """Whichever is first: submitted once, told once, the first question planned."""
    for _ in range(5):
        lease = await two[0].submitting()
        report = Report(upstream_id(lease.key), Status.PENDING, estimated_time=45)
        await asyncio.gather(
            two[0].submission(lease, accepts(report, FIRST_QUERY)),
            two[1].callback(lease.key, completed(lease.key, URL)),
        )
        task = await two[0].task(lease.key)
        assert (task["state"], task["upstream_id"], task["estimated_time"]) == (
            "submitted",
            upstream_id(lease.key),
            45,
        )
        assert task["settle_due_at"] == two[0].clock.now
        assert await two[0].types(lease.key) == ["image.task.submitted"]
