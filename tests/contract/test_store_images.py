"""Images: pending, provisional until a query agrees, retried, stored or lost, and the end of a task
that is storing (docs/api.md, "Results").
"""

from dataclasses import replace

import pytest

from service.db.paging import Row
from service.db.tables import events, images
from service.images.downloads import (
    Download,
    Lost,
    Refusal,
    Retry,
    host_refused,
    record_downloads,
    retry_refused,
    shown_image,
)
from service.tasks import task_queries
from service.tasks.settlements import Settlement, record_settlements
from service.tasks.state import State
from service.upstreams.base import Report, Status
from tests.contract.subject import (
    DAY,
    HOUR,
    LEASE,
    LOST,
    MINUTE,
    SECOND,
    Subject,
    accept_callbacks,
    callback,
    completed,
    failed,
    stored,
)

URL, OTHER = "https://r.test/0", "https://r.test/other"
BROKEN = Retry("connection lost", 5 * SECOND)
GONE = Retry("answered 404", 5 * SECOND, stale=True)


def wrong(sha: str) -> Retry:
    return Retry("not an image", 5 * SECOND, wrong_sha256=sha)


async def called_back(subject: Subject, *urls: str) -> tuple[str, list[Row]]:
    """A task whose results only a callback has named, and the rows of its images."""
    task_id = await subject.submitted()
    await subject.callback(task_id, completed(task_id, *urls))
    return task_id, await subject.images(task_id)


async def one_image(subject: Subject) -> tuple[str, Row]:
    task_id = await subject.storing(URL)
    (image,) = await subject.images(task_id)
    return task_id, image


async def test_each_result_has_an_image_row_in_the_upstreams_order(subject: Subject) -> None:
    """Each row is due at once and expires with its link."""
    task_id = await subject.storing("https://r.test/b", "https://r.test/a")
    rows = await subject.images(task_id)
    assert [(row["position"], row["source_url"], row["state"]) for row in rows] == [
        (0, "https://r.test/b", "pending"),
        (1, "https://r.test/a", "pending"),
    ]
    assert {(row["due_at"], row["link_dies_at"], row["confirmed"]) for row in rows} == {
        (subject.clock.now, subject.clock.now + DAY, True)
    }


async def test_a_task_is_completed_when_its_last_result_is_stored(subject: Subject) -> None:
    """The event lists every image in the upstream's order, in whichever order they were stored."""
    task_id = await subject.storing(URL, OTHER)
    first, second = await subject.images(task_id)
    assert await subject.download(second, stored(second)) == "stored"
    assert await subject.state(task_id) is State.STORING
    assert await subject.download(first, stored(first)) == "stored"
    task = await subject.task(task_id)
    assert (task["state"], task["progress"], task["terminal_at"]) == (
        "completed",
        100,
        subject.clock.now,
    )
    event = (await subject.events(task_id))[-1]
    assert (event["type"], [image["id"] for image in event["data"]["images"]]) == (
        "image.task.completed",
        [first["id"], second["id"]],
    )


async def test_two_results_stored_in_one_batch_complete_the_task_once(subject: Subject) -> None:
    """The last image of the batch ends the task."""
    task_id = await subject.storing(URL, OTHER)
    claimed = {lease.key: lease for lease in await subject.claim("download", 2)}
    items = [
        Download(claimed[row["id"]], task_id, row["source_url"], stored(row))
        for row in await subject.images(task_id)
    ]
    assert await subject.batch(record_downloads, items) == ["stored", "stored"]
    assert await subject.types(task_id) == ["image.task.submitted", "image.task.completed"]


async def test_a_result_that_a_callback_names_is_downloaded_but_does_not_count(
    subject: Subject,
) -> None:
    """The image is provisional: no client sees it, even when it is stored, until a query agrees.
    Then it counts without a second download.
    """
    task_id, (image,) = await called_back(subject, URL)
    assert (image["confirmed"], image["due_at"]) == (False, subject.clock.now)
    assert await subject.download(image, stored(image)) == "stored"
    assert await subject.state(task_id) is State.SUBMITTED
    found = await subject.store.read(task_queries.task, task_id, None)
    assert found is not None
    assert found[1] == []
    assert await subject.store.read(shown_image, image["id"]) is None
    assert await subject.settle(task_id, completed(task_id, URL)) is State.COMPLETED
    assert await subject.store.read(shown_image, image["id"]) is not None
    assert len((await subject.events(task_id))[-1]["data"]["images"]) == 1


async def test_an_image_that_only_a_callback_named_is_in_no_event(subject: Subject) -> None:
    """The query reports a failure, so the event does not list the image that the callback named."""
    task_id, (image,) = await called_back(subject, URL)
    await subject.download(image, stored(image))
    assert await subject.settle(task_id, failed(task_id)) is State.FAILED
    assert (await subject.events(task_id))[-1]["data"]["images"] == []


async def test_a_link_that_a_query_names_wins(subject: Subject) -> None:
    """It replaces the callback's link, also of a stored image. The worker downloads it anew, with
    the link's own lifetime.
    """
    task_id, (first, second) = await called_back(subject, URL, OTHER)
    await subject.download(first, stored(first))
    await subject.download(second, GONE)
    subject.clock.shift(SECOND)
    assert (
        await subject.settle(task_id, completed(task_id, "https://r.test/1", "https://r.test/2"))
        is State.STORING
    )
    for row in await subject.images(task_id):
        assert (row["state"], row["confirmed"], row["blob"], row["stale_count"]) == (
            "pending",
            True,
            None,
            0,
        )
        assert (row["source_url"][:-1], row["due_at"], row["link_dies_at"]) == (
            "https://r.test/",
            subject.clock.now,
            subject.clock.now + DAY,
        )


async def test_results_that_only_a_callback_named_are_dropped(subject: Subject) -> None:
    """The query names fewer results, so the rest never were results. A download under way finds no
    row to record.
    """
    task_id, (_, invented) = await called_back(subject, URL, OTHER)
    lease = await subject.claimed("download", invented["id"])
    assert await subject.settle(task_id, completed(task_id, URL)) is State.STORING
    assert [row["source_url"] for row in await subject.images(task_id)] == [URL]
    assert await subject.download(invented, stored(invented), lease) is None


async def test_a_later_query_that_names_fewer_results_drops_none(subject: Subject) -> None:
    """A result that a query named once is stored or lost. It never disappears."""
    task_id = await subject.storing(URL, OTHER)
    first, _ = await subject.images(task_id)
    await subject.download(first, stored(first))
    assert (
        await subject.settle(
            task_id, completed(task_id, URL), lease=await subject.requeued("settle", task_id)
        )
        is State.STORING
    )
    assert [row["state"] for row in await subject.images(task_id)] == ["stored", "pending"]


async def test_a_download_of_a_replaced_link_changes_nothing(subject: Subject) -> None:
    """It only releases its lease. The new link is due at once."""
    task_id, (image,) = await called_back(subject, URL)
    lease = await subject.claimed("download", image["id"])
    await subject.settle(task_id, completed(task_id, OTHER))
    assert await subject.download(image, stored(image), lease) is None
    (row,) = await subject.images(task_id)
    assert (row["state"], row["source_url"], row["due_at"], row["lease_until"]) == (
        "pending",
        OTHER,
        subject.clock.now,
        None,
    )
    assert await subject.download(row, stored(row)) == "stored"


async def test_a_download_under_an_expired_lease_changes_nothing(subject: Subject) -> None:
    """The fence lets only the worker that claimed the image last record its outcome."""
    _, image = await one_image(subject)
    late = await subject.claimed("download", image["id"])
    subject.clock.shift(LEASE)
    holder = await subject.claimed("download", image["id"])
    assert await subject.download(image, LOST, late) is None
    assert await subject.download(image, stored(image), holder) == "stored"
    assert await subject.download(image, stored(image), holder) is None, (
        "recorded again after a lost response to the commit"
    )


async def test_downloads_of_a_cancelled_task_record_nothing(subject: Subject) -> None:
    """A cancelled task keeps no image that arrives later."""
    task_id, image = await one_image(subject)
    lease = await subject.claimed("download", image["id"])
    await subject.cancel(task_id)
    assert await subject.download(image, stored(image), lease) is None
    assert await subject.images(task_id) == []


async def test_a_final_failure_loses_the_result_and_lists_the_others(subject: Subject) -> None:
    """The task fails with `results_lost` when no image is left to download. The event lists the
    stored images.
    """
    task_id = await subject.storing(URL, OTHER)
    first, second = await subject.images(task_id)
    assert await subject.download(first, LOST) == "lost"
    assert await subject.state(task_id) is State.STORING
    await subject.download(second, stored(second))
    task = await subject.task(task_id)
    assert (task["state"], task["error"]["code"], task["error"]["message"]) == (
        "failed",
        "results_lost",
        "results could not be saved: 0: answered 451",
    )
    assert [image["id"] for image in (await subject.events(task_id))[-1]["data"]["images"]] == [
        second["id"]
    ]


async def test_a_lost_image_is_not_downloaded_again(subject: Subject) -> None:
    """A fresh link, which another image of the task asked for, does not revive it."""
    task_id = await subject.storing(URL, OTHER)
    first, second = await subject.images(task_id)
    await subject.download(first, LOST)
    await subject.download(second, GONE)
    await subject.settle(
        task_id, completed(task_id, "https://r.test/0?new", "https://r.test/other?new")
    )
    rows = await subject.images(task_id)
    assert [(row["state"], row["source_url"]) for row in rows] == [
        ("lost", URL),
        ("pending", "https://r.test/other?new"),
    ]


async def test_a_passing_failure_is_retried_while_the_link_lives(subject: Subject) -> None:
    """The worker retries after each wait, any number of times. The first attempt after the link's
    expiry is the last.
    """
    task_id, image = await one_image(subject)
    for _ in range(5):
        assert await subject.download(image, BROKEN) == "pending"
        (row,) = await subject.images(task_id)
        assert (row["due_at"], row["error"]) == (subject.clock.now + 5 * SECOND, "connection lost")
    subject.clock.now = image["link_dies_at"] - 1
    assert await subject.download(image, BROKEN) == "pending"
    assert await subject.download(image, BROKEN) == "lost"
    assert (await subject.task(task_id))["error"]["code"] == "results_lost"
    assert (await subject.images(task_id))[0]["due_at"] is None


async def test_a_stale_link_makes_a_query_due_at_once(subject: Subject) -> None:
    """403, 404 or 410: a query asks for a fresh link. The next attempt keeps its due time and uses
    the fresh link, which has its own lifetime.
    """
    task_id, image = await one_image(subject)
    subject.clock.shift(HOUR)
    assert await subject.download(image, GONE) == "pending"
    planned = (await subject.images(task_id))[0]["due_at"]
    assert planned > subject.clock.now
    assert (await subject.task(task_id))["settle_due_at"] == subject.clock.now
    assert await subject.settle(task_id, completed(task_id, OTHER)) is State.STORING
    (row,) = await subject.images(task_id)
    assert (row["source_url"], row["due_at"], row["stale_count"]) == (OTHER, planned, 1)
    assert row["link_dies_at"] == subject.clock.now + DAY


async def test_an_image_is_downloaded_as_long_as_its_fresh_link_lives(subject: Subject) -> None:
    """A passing failure is final at the expiry of the fresh link, not of the first one. The same
    link again does not extend it.
    """
    task_id, image = await one_image(subject)
    subject.clock.now = image["link_dies_at"] - HOUR
    assert await subject.download(image, GONE) == "pending"
    subject.clock.shift(MINUTE)
    await subject.settle(task_id, completed(task_id, OTHER))
    (fresh,) = await subject.images(task_id)
    subject.clock.now = image["link_dies_at"]
    assert await subject.download(fresh, BROKEN) == "pending"
    await subject.settle(
        task_id, completed(task_id, OTHER), lease=await subject.requeued("settle", task_id)
    )
    assert (await subject.images(task_id))[0]["link_dies_at"] == fresh["link_dies_at"]
    subject.clock.now = fresh["link_dies_at"]
    assert await subject.download(fresh, BROKEN) == "lost"


async def test_an_upstream_that_renews_links_for_ever_keeps_no_task_alive(subject: Subject) -> None:
    """The last link's lifetime ends at most two lifetimes after the submission."""
    task_id, image = await one_image(subject)
    submitted_at = (await subject.task(task_id))["submitted_at"]
    for number in range(9):
        subject.clock.shift(12 * HOUR)
        await subject.settle(
            task_id,
            completed(task_id, f"{OTHER}?{number}"),
            lease=await subject.requeued("settle", task_id),
        )
        (image,) = await subject.images(task_id)
        assert image["link_dies_at"] == min(subject.clock.now, submitted_at + DAY) + DAY
    assert await subject.download(image, BROKEN) == "lost"


async def test_a_fresh_link_never_shortens_the_lifetime(subject: Subject) -> None:
    """Results that are first named late have a link's full lifetime at any age of the task, and
    keep it.
    """
    task_id = await subject.submitted()
    subject.clock.shift(DAY + HOUR)
    await subject.settle(task_id, completed(task_id, URL))
    (first,) = await subject.images(task_id)
    await subject.settle(
        task_id, completed(task_id, OTHER), lease=await subject.requeued("settle", task_id)
    )
    (fresh,) = await subject.images(task_id)
    assert (fresh["source_url"], fresh["link_dies_at"]) == (OTHER, first["link_dies_at"])


async def test_a_link_that_expired_during_an_absence_gets_a_fresh_one(subject: Subject) -> None:
    """A 404 after the link's expiry makes a query due, as before it. Only the number of stale
    answers is final.
    """
    task_id, image = await one_image(subject)
    subject.clock.now = image["link_dies_at"] + HOUR
    assert await subject.download(image, GONE) == "pending"
    await subject.settle(task_id, completed(task_id, OTHER))
    (fresh,) = await subject.images(task_id)
    assert await subject.download(fresh, stored(fresh)) == "stored"
    assert await subject.state(task_id) is State.COMPLETED


async def test_the_same_link_again_keeps_the_schedule(subject: Subject) -> None:
    """The upstream has no fresh link, so the next attempt comes no sooner."""
    task_id, image = await one_image(subject)
    await subject.download(image, GONE)
    due = (await subject.images(task_id))[0]["due_at"]
    await subject.settle(task_id, completed(task_id, URL))
    assert (await subject.images(task_id))[0]["due_at"] == due


async def test_stale_links_are_final_after_ten_answers_over_half_an_hour(subject: Subject) -> None:
    """Ten stale answers within half an hour are not enough, and half an hour with fewer is not
    either.
    """
    slow, image = await one_image(subject)
    start = subject.clock.now
    for _ in range(2):
        assert await subject.download(image, GONE) == "pending"
        subject.clock.shift(31 * MINUTE)
    assert (subject.clock.now - start) > 30 * MINUTE
    assert await subject.state(slow) is State.STORING
    quick, image = await one_image(subject)
    start = subject.clock.now
    for _ in range(12):
        assert await subject.download(image, GONE) == "pending"
    subject.clock.now = start + 30 * MINUTE - 1
    assert await subject.download(image, GONE) == "pending"
    subject.clock.now = start + 30 * MINUTE + 4 * SECOND
    assert await subject.download(image, GONE) == "lost"
    assert await subject.state(quick) is State.FAILED


async def test_the_tenth_stale_answer_is_final(subject: Subject) -> None:
    """The ninth after half an hour is not."""
    _, image = await one_image(subject)
    assert await subject.download(image, GONE) == "pending"
    subject.clock.shift(30 * MINUTE)
    assert [await subject.download(image, GONE) for _ in range(9)] == ["pending"] * 8 + ["lost"]


async def test_a_stale_link_of_a_provisional_image_makes_no_query_due(subject: Subject) -> None:
    """The query that confirms the callback is planned already, and it brings the links."""
    task_id, (image,) = await called_back(subject, URL)
    asked = (await subject.task(task_id))["settle_due_at"]
    subject.clock.shift(SECOND)
    await subject.download(image, GONE)
    assert (await subject.task(task_id))["settle_due_at"] == asked


async def test_the_same_wrong_bytes_are_final_three_times_over_ten_minutes(
    subject: Subject,
) -> None:
    """They must come in a row: different wrong bytes start count and time anew, and a broken
    connection in between does not count. The third time tells operators.
    """
    task_id, image = await one_image(subject)
    subject.clock.shift(10 * MINUTE)
    for outcome in (wrong("a"), wrong("a"), wrong("b"), wrong("b"), BROKEN):
        assert await subject.download(image, outcome) == "pending"
    assert await subject.rows(events, task_id=task_id, type="image.at_risk") == []
    assert [await subject.download(image, wrong("b")) for _ in range(4)] == ["pending"] * 4
    (event,) = await subject.rows(events, task_id=task_id, type="image.at_risk")
    assert (event["data"]["host"], event["data"]["setting"]) == (None, None)
    subject.clock.shift(9 * MINUTE)
    assert await subject.download(image, wrong("b")) == "pending"
    subject.clock.shift(MINUTE)
    assert await subject.download(image, wrong("b")) == "lost"


async def test_two_wrong_bodies_far_apart_are_not_final(subject: Subject) -> None:
    _, image = await one_image(subject)
    for _ in range(2):
        assert await subject.download(image, wrong("a")) == "pending"
        subject.clock.shift(HOUR)
    assert await subject.download(image, wrong("a")) == "lost"


REFUSED = Retry("files.test: not listed", SECOND, refused=Refusal("files.test", "HOSTS"))


async def test_a_refusal_for_now_is_never_final_while_the_link_lives(subject: Subject) -> None:
    """Operators get one event, which names host and setting. The first attempt after the link's
    expiry is the last.
    """
    task_id, image = await one_image(subject)
    for _ in range(12):
        assert await subject.download(image, REFUSED) == "pending"
        subject.clock.shift(HOUR)
    (event,) = await subject.rows(events, task_id=task_id, type="image.at_risk")
    named = {name: event["data"][name] for name in ("host", "setting", "reason")}
    assert named == {"host": "files.test", "setting": "HOSTS", "reason": "files.test: not listed"}
    assert await subject.store.read(host_refused)
    subject.clock.now = image["link_dies_at"]
    assert await subject.download(image, REFUSED) == "lost"
    assert not await subject.store.read(host_refused)
    assert (await subject.task(task_id))["error"]["code"] == "results_lost"


@pytest.mark.parametrize("outcome", [BROKEN, LOST, None])
async def test_a_host_counts_as_refused_until_the_next_outcome(
    subject: Subject, outcome: Retry | Lost | None
) -> None:
    _, image = await one_image(subject)
    await subject.download(image, REFUSED)
    assert await subject.store.read(host_refused)
    await subject.download(image, outcome or stored(image))
    assert not await subject.store.read(host_refused)


async def test_a_start_makes_refused_downloads_due_and_no_others(subject: Subject) -> None:
    """The settings may have changed. Other failures keep their schedule."""
    _, refused = await one_image(subject)
    _, broken = await one_image(subject)
    await subject.download(refused, replace(REFUSED, wait_ms=HOUR))
    await subject.download(broken, replace(BROKEN, wait_ms=HOUR))
    await subject.write(retry_refused, None)
    rows = {row["id"]: row for row in await subject.rows(images)}
    assert (rows[refused["id"]]["due_at"], rows[refused["id"]]["attempts"]) == (
        subject.clock.now,
        0,
    )
    assert rows[broken["id"]]["due_at"] > subject.clock.now


@pytest.mark.parametrize("outcome", [LOST, Lost("refused by the guard")])
async def test_a_provisional_failure_that_is_final_counts_once_the_query_agrees(
    subject: Subject, outcome: Lost
) -> None:
    """Another download of the same link would fail too. The task fails as soon as the query
    confirms it.
    """
    task_id, (image,) = await called_back(subject, URL)
    assert await subject.download(image, outcome) == "lost"
    assert await subject.state(task_id) is State.SUBMITTED
    assert await subject.settle(task_id, completed(task_id, URL)) is State.FAILED
    assert (await subject.task(task_id))["error"]["code"] == "results_lost"


async def test_a_callback_after_a_query_without_all_links_names_the_others(
    subject: Subject,
) -> None:
    """The first callback is late. The query's links stand, and the callback adds others."""
    task_id = await subject.submitted()
    lease, report = await subject.asking(task_id), completed(task_id, "", OTHER)
    settlement = Settlement(lease, report, 0, SECOND, DAY, patience_ms=10 * MINUTE)
    assert await subject.write(record_settlements, settlement) is State.SUBMITTED
    assert [row["position"] for row in await subject.images(task_id)] == [1]
    await subject.callback(task_id, completed(task_id, URL, OTHER))
    rows = await subject.images(task_id)
    assert [(row["source_url"], row["confirmed"]) for row in rows] == [(URL, False), (OTHER, True)]


async def test_only_a_completed_callback_starts_downloads(subject: Subject) -> None:
    """The store ignores results beside any other status."""
    task_id = await subject.submitted()
    await subject.callback(task_id, Report(status=Status.FAILED, results=(URL,)))
    assert await subject.images(task_id) == []


async def test_downloads_go_by_the_time_their_links_have_left(subject: Subject) -> None:
    """The link that expires first goes first, not the one that arrived first."""
    early, late = [await subject.submitted() for _ in range(2)]
    for task_id, ttl in [(late, DAY), (early, DAY - 1)]:
        await subject.write(
            accept_callbacks, replace(callback(task_id, completed(task_id, URL)), result_ttl_ms=ttl)
        )
    taken = [(await subject.claim("download"))[0].key for _ in range(2)]
    assert taken == [(await subject.images(task_id))[0]["id"] for task_id in (early, late)]
