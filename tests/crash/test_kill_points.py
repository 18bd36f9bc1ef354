"""The tests kill processes at every checkpoint on both stores and start them again, or pause them
past their leases. No task is lost or doubled.

Many cases run at once, because on PostgreSQL each one waits for a dead process's lease to expire.
"""

import asyncio
import hashlib
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.checkpoints import CHECKPOINTS
from tests.crash.bench import benches
from tests.crash.death import TRUE_AT
from tests.crash.life import PICTURES, TERMINAL, Case, Ended
from tests.crash.lives import live

# On SQLite a start releases the leases of the dead process at once, so one task can survive several
# deaths. The order of the checkpoints ensures that the task reaches each one.
CHAINS = (
    (
        "submission.answered",
        "inbox.committed",
        "settle.claimed",
        "settle.answered",
        "delivery.answered",
    ),
    (
        "submit.checked",
        "submission.claimed",
        "submission.recorded",
        "inbox.received",
        "inbox.waiting",
        "settle.recorded",
    ),
    (
        "submit.inserted",
        "account.held",
        "account.restored",
        "download.saved",
        "download.recorded:2",
        "delivery.recorded",
    ),
    ("download.fetched", "download.recorded"),
    ("submission.started", "delivery.claimed"),
    ("erase.committed",),
)
# an erasure holds no lease
PAUSES = tuple(name for name in CHECKPOINTS if name != "erase.committed")
KILLS = [Case("postgres", (name,)) for name in CHECKPOINTS] + [
    Case("sqlite", chain) for chain in CHAINS
]
EMBEDDED_PAUSES = ("settle.answered", "download.saved", "delivery.answered")
PAUSED = [
    *(Case("postgres", (name,), paused=True) for name in PAUSES),
    *(Case("sqlite", (name,), paused=True) for name in EMBEDDED_PAUSES),
    Case("postgres", ("submission.answered",), paused=True, late=True),
]
AT_ONCE = 16  # cases at a time, so that a slow machine does not make a late result look lost
Lives = dict[Case, Ended | BaseException]

pytestmark = pytest.mark.timeout(480)


@pytest.fixture(scope="module")
async def lives(
    tmp_path_factory: pytest.TempPathFactory, postgres_server: str, postgres_template: str
) -> AsyncIterator[Lives]:
    folder: Path = tmp_path_factory.mktemp("lives")
    cases, places = [*PAUSED, *KILLS], asyncio.Semaphore(AT_ONCE)
    async with benches(folder, postgres_server, postgres_template) as bench:

        async def one(case: Case) -> Ended:
            async with places:
                return await live(case, bench)

        yield dict(
            zip(cases, await asyncio.gather(*map(one, cases), return_exceptions=True), strict=True)
        )


def ended(lives: Lives, case: Case) -> Ended:
    found = lives[case]
    if isinstance(found, BaseException):
        raise found
    return found


def check(found: Ended, case: Case) -> None:
    """Checks the rules that hold for every case, at whichever checkpoint its process died."""
    sent = "submission.started" not in case.points
    completed = sent and not case.late
    (task,) = found.tasks
    assert task["state"] == ("completed" if completed else "failed"), task
    assert task["error"] is None or task["error"]["code"] == "submission_uncertain"
    assert found.posts == [task["id"]] * sent, "submitted once, or never"

    assert [int(event["sequence"]) for event in found.events] == list(
        range(1, len(found.events) + 1)
    )
    of_task = [event for event in found.events if event["subject"] == task["id"]]
    assert sorted(event["type"] for event in of_task) == sorted(
        ["image.task.submitted", "image.task.completed"]
        if completed
        else ["image.task.failed", *["task.late_result"] * case.late]
    )
    told = [event for event in of_task if event["type"].startswith("image.task.")]
    assert told[-1]["type"] in TERMINAL

    assert set(found.received) == {event["id"] for event in told}, (
        "the subscriber got each event at least once, always under the same id"
    )
    assert len(found.received) <= len(told) + len(case.points)
    assert [delivery["state"] for delivery in found.deliveries] == ["delivered"] * len(told)

    wanted = PICTURES if sent else 0
    assert len(set(found.originals)) == wanted
    assert found.served == ([] if case.erased else found.originals)
    assert len(found.files) == wanted
    assert set(found.files) == {
        hashlib.sha256(original).hexdigest() for original in found.originals
    }, "one file for each image"
    assert not found.unfinished or case.store == "postgres", (
        "on PostgreSQL temporary files stay for an hour, as another process may be writing them"
    )
    failures = [line for line in found.log.splitlines() if "worker.failed" in line]
    # The server ends a transaction that is idle for 10 s.
    assert not [line for line in failures if not case.paused or "StoreUnavailable" not in line], (
        failures
    )
    assert "Traceback" not in found.log


@pytest.mark.parametrize("case", KILLS, ids=str)
async def test_a_process_that_is_killed_loses_and_doubles_nothing(lives: Lives, case: Case) -> None:
    """The rules of docs/reliability.md, "killed here": one terminal event after durable images, one
    submission, deliveries under one id, and no leftover files.
    """
    found = ended(lives, case)
    assert found.exits == [-signal.SIGKILL] * len(case.points)
    check(found, case)
    for point, death in zip(case.points, found.deaths, strict=True):
        assert TRUE_AT[point.partition(":")[0]](death), f"{point}: {death}"
        assert {*death.told, *death.tasks} <= {found.tasks[0]["id"]}, (
            "an id that existed at a death is the id of the task at the end"
        )
        again = [id for id in death.delivered if found.received.count(id) > death.heard.count(id)]
        assert again == [], "a delivery recorded as delivered is not sent again"
    if case.points[0].startswith("inbox."):
        known = case.points[0] == "inbox.waiting"
        assert (found.answers[0], found.answers[-1]) == (200 if known else None, 200), (
            "the upstream calls again if it got no answer"
        )
        if known:
            assert (len(found.answers), found.steps.count("callback.received")) == (1, 1)
        if case.points[0] == "inbox.committed":
            assert '"verdict":"duplicate"' in found.log.replace(" ", "")


@pytest.mark.parametrize("case", PAUSED, ids=str)
async def test_a_process_that_was_paused_changes_nothing_it_no_longer_owns(
    lives: Lives, case: Case
) -> None:
    """The process stops by SIGSTOP until its lease has expired, another does the work, and the
    first continues by SIGCONT. Of its own work only the upstream's answer that it holds still
    counts.
    """
    found = ended(lives, case)
    assert found.exits == [0]
    check(found, case)
    assert ("task.submission_uncertain" in found.steps) == (
        case.doubted or case.late or "submission.started" in case.points
    )
    assert found.after == "completed", "it goes on serving"


def test_every_checkpoint_is_tried_on_both_stores() -> None:
    """The cases cover the list of checkpoints exactly."""
    for store in ("sqlite", "postgres"):
        tried = {
            point.partition(":")[0]
            for case in KILLS
            if case.store == store
            for point in case.points
        }
        assert tried == set(CHECKPOINTS) == set(TRUE_AT)
