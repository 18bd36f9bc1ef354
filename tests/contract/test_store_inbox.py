"""The inbox: each verdict on a callback that reaches the store (docs/callbacks.md)."""

import asyncio

import pytest

from service.db.tables import callbacks, tasks
from service.images.downloads import Lost
from service.tasks.callbacks import BODIES, BODY_BYTES, KEPT
from service.tasks.state import State
from service.upstreams.base import Report, Status
from tests.contract.subject import (
    FIRST_QUERY,
    LOST,
    SECOND,
    Subject,
    accept_callbacks,
    accepted,
    accepts,
    callback,
    completed,
    failed,
    processing,
    upstream_id,
)

URL, OTHER = "https://r.test/0", "https://r.test/other"


async def conflicts(subject: Subject) -> int:
    return (await subject.types()).count("callback.conflict")


async def test_the_first_terminal_callback_is_accepted_and_kept(subject: Subject) -> None:
    """The store keeps its body, and a query is due at once."""
    task_id = await subject.submitted()
    subject.clock.shift(SECOND)
    verdict = await subject.callback(task_id, completed(task_id, URL), b'{"id": 1}')
    assert (verdict.verdict, verdict.owner, verdict.origin.upstream_id) == (
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


async def test_a_repeated_callback_is_only_counted(subject: Subject) -> None:
    """A duplicate raises the count and the last-seen time of the first callback. It causes no row,
    no event and no query.
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
async def test_another_outcome_is_a_conflict_and_emits_one_event(
    subject: Subject, other: str
) -> None:
    """The callback is kept, a query is due again, and operators get one event however often it
    comes. The task and its images stay as they are.
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


async def test_each_distinct_conflict_emits_one_event(subject: Subject) -> None:
    """Three outcomes contradict the first callback and emit three events. `first` never moves."""
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


async def test_a_callback_is_compared_with_the_settled_outcome(subject: Subject) -> None:
    """The task was settled without a callback. A callback that agrees is a duplicate, any other is
    a conflict, and the task stays as it is.
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


async def test_the_first_callback_becomes_a_conflict_when_the_query_disagrees(
    subject: Subject,
) -> None:
    """The query decides. A repetition of the first callback contradicts it, so the callback's row
    becomes a conflict, with one event.
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
    """A callback with the first links still agrees when a query named fresh ones. A third set of
    links is a conflict.
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
    """The comparison is with the upstream's outcome. Our own failure to store is no
    contradiction.
    """
    task_id = await subject.storing(URL)
    (image,) = await subject.images(task_id)
    await subject.download(image, LOST)
    assert await subject.state(task_id) is State.FAILED
    assert (await subject.callback(task_id, completed(task_id, URL))).verdict == "duplicate"


async def test_processing_is_progress_and_never_moves_a_task_back(subject: Subject) -> None:
    """The store always accepts it. Before the end it updates the progress. After a terminal
    callback it does not change the state, and after the end it changes nothing.
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
    """The callback counts as progress at most."""
    task_id = await subject.submitted()
    assert (await subject.callback(task_id, Report(upstream_id(task_id)))).verdict == "accepted"
    (row,) = await subject.rows(callbacks)
    assert (row["status"], row["first"]) == (None, None)


async def test_an_unreadable_callback_is_kept_and_makes_a_query_due(subject: Subject) -> None:
    """The token proves the caller. Each distinct body makes a query due once, and none counts as
    the first terminal callback.
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


async def test_an_unreadable_callback_after_the_end_makes_one_query_due(subject: Subject) -> None:
    """The token proves the caller, so the callback is kept. The settled outcome stands."""
    task_id = await subject.completed()
    assert (await subject.callback(task_id, None, b"<html>")).verdict == "unreadable"
    assert await subject.settle(task_id, completed(task_id, "https://r.test/0")) is State.COMPLETED
    assert (await subject.task(task_id))["settle_due_at"] is None


async def test_a_foreign_upstream_id_is_a_conflict(subject: Subject) -> None:
    """The callback names another id than the known one. It is kept and emits one event, a query for
    the known id is due, and no image is downloaded.
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
    """A callback cannot bind an id that another task has. That task had it before, or got it in the
    same batch.
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


async def test_a_callback_before_the_submit_response_binds_the_id(subject: Subject) -> None:
    """The callback makes the task submitted. The response that follows changes nothing."""
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


async def test_progress_before_the_submit_response_makes_a_query_due(subject: Subject) -> None:
    """The submit response, which would have planned the first query, may never come."""
    lease = await subject.submitting()
    assert (await subject.callback(lease.key, processing(lease.key))).verdict == "accepted"
    assert (await subject.task(lease.key))["settle_due_at"] == subject.clock.now
    assert (await subject.task(lease.key))["upstream_status"] == "processing"


async def test_a_callback_without_an_id_waits_for_the_submit_response(subject: Subject) -> None:
    """No query is possible yet. The response brings the id, and the query is due at once."""
    lease = await subject.submitting()
    assert (
        await subject.callback(lease.key, Report(None, Status.COMPLETED, (URL,)))
    ).verdict == "accepted"
    assert (await subject.task(lease.key))["settle_due_at"] is None
    assert await subject.submission(lease, accepted(upstream_id(lease.key))) is State.SUBMITTED
    assert (await subject.task(lease.key))["settle_due_at"] == subject.clock.now


async def test_a_callback_proves_a_task_that_was_queued_again(subject: Subject) -> None:
    """The task becomes submitted, and no worker submits it once more."""
    task_id = await subject.queued()
    await subject.callback(task_id, completed(task_id, URL))
    assert await subject.state(task_id) is State.SUBMITTED
    assert await subject.claim("submit") == []


async def test_a_callback_for_a_missing_task_is_unknown(subject: Subject) -> None:
    """The store keeps nothing of it."""
    verdict = await subject.callback("task_gone", completed("task_gone", URL))
    assert (verdict.verdict, verdict.callback_id, verdict.owner) == ("unknown", None, None)
    assert await subject.rows(callbacks) == []


async def test_a_callback_after_a_local_cancel_only_records_the_charge(subject: Subject) -> None:
    """A query asks for the credits. No image is downloaded, and state and event stand."""
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


async def test_every_verdict_at_once_in_one_batch(subject: Subject) -> None:
    """A batch gives each callback the verdict that it would get alone, in order."""
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


async def test_a_callback_recorded_again_is_not_counted_again(subject: Subject) -> None:
    """After a lost response to the commit, the same call returns the same verdict and counts no
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
    """Beyond the bound, the last row counts the further callbacks. The first terminal one is kept
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


async def test_two_processes_record_one_tasks_callbacks_one_after_another(
    two: tuple[Subject, Subject],
) -> None:
    """Callbacks arrive in both processes at once. One is the first, its row counts the equal ones,
    and the conflict emits one event.
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
    """The unique constraint decides. The losing callback is a conflict, not an error."""
    for number in range(5):
        claimed = [await place.submitting() for place in two]
        report = Report(f"task-unified-{number}", Status.COMPLETED, (URL,))
        verdicts = await asyncio.gather(
            *(place.callback(lease.key, report) for place, lease in zip(two, claimed, strict=True))
        )
        assert sorted(verdict.verdict for verdict in verdicts) == ["accepted", "conflict"]
        assert len(await two[0].rows(tasks, upstream_id=report.upstream_id)) == 1


async def test_a_callback_and_a_submit_response_at_once_agree(two: tuple[Subject, Subject]) -> None:
    """Two processes commit them in any order. The task is submitted once with one event, and the
    first query is due at once.
    """
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
