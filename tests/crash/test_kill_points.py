"""Processes are killed at every checkpoint, on both stores, and started again; or paused past their
leases. Nothing is lost or doubled.

Many lives go on at once: on PostgreSQL the work of the dead is free when its lease ends, which is
waited for.
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

# On SQLite a start frees what the dead held, so one task outlives several deaths; in an order in
# which none can be passed unnoticed.
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
PAUSES = tuple(name for name in CHECKPOINTS if name != "erase.committed")  # which holds no lease
KILLS = [Case("postgres", (name,)) for name in CHECKPOINTS] + [
    Case("sqlite", chain) for chain in CHAINS
]
EMBEDDED_PAUSES = ("settle.answered", "download.saved", "delivery.answered")
PAUSED = [
    *(Case("postgres", (name,), paused=True) for name in PAUSES),
    *(Case("sqlite", (name,), paused=True) for name in EMBEDDED_PAUSES),
    Case("postgres", ("submission.answered",), paused=True, late=True),
]
AT_ONCE = 16  # lives: a slow machine is not to take for lost what is only late
Lives = dict[Case, Ended | BaseException]

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
async def lives(
    tmp_path_factory: pytest.TempPathFactory, postgres_server: str
) -> AsyncIterator[Lives]:
    folder: Path = tmp_path_factory.mktemp("lives")
    cases, places = [*PAUSED, *KILLS], asyncio.Semaphore(AT_ONCE)
    async with benches(folder, postgres_server) as bench:

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
    """What holds of every life, wherever it was broken off."""
    sent = "submission.started" not in case.points
    completed = sent and not case.late
    (task,) = found.tasks
    assert task["state"] == ("completed" if completed else "failed"), task
    assert task["error"] is None or task["error"]["code"] == "submission_uncertain"
    assert found.posts == [task["id"]] * sent, "submitted once, or never"

    assert [int(event["sequence"]) for event in found.events] == list(
        range(1, len(found.events) + 1)
    )
    assert sorted(event["type"] for event in found.events) == sorted(
        ["image.task.submitted", "image.task.completed"]
        if completed
        else ["image.task.failed", *["task.late_result"] * case.late]
    )
    told = [
        event for event in found.events if event["type"] != "task.late_result"
    ]  # which is the operators'
    assert told[-1]["type"] in TERMINAL
    assert {event["subject"] for event in told} == {task["id"]}

    assert set(found.received) == {event["id"] for event in told}, (
        "each at least once, always under the same id"
    )
    assert len(found.received) <= len(told) + len(case.points)
    assert [delivery["state"] for delivery in found.deliveries] == ["delivered"] * len(told)

    wanted = PICTURES if sent else 0
    assert len(set(found.originals)) == wanted
    assert found.served == ([] if case.erased else found.originals)
    assert len(found.files) == wanted
    assert set(found.files) == {
        hashlib.sha256(original).hexdigest() for original in found.originals
    }, "no more and no fewer files"
    assert not found.unfinished or case.store == "postgres", (
        "others may be at work there: not removed within the hour"
    )
    failures = [line for line in found.log.splitlines() if "worker.failed" in line]
    # The server ends a transaction that stood still for 10 s.
    assert not [line for line in failures if not case.paused or "StoreUnavailable" not in line], (
        failures
    )
    assert "Traceback" not in found.log


@pytest.mark.parametrize("case", KILLS, ids=str)
async def test_a_process_that_is_killed_loses_and_doubles_nothing(lives: Lives, case: Case) -> None:
    """docs/reliability.md, "killed here": one terminal event after durable images, submitted once,
    delivered under one id, nothing left over.
    """
    found = ended(lives, case)
    assert found.exits == [-signal.SIGKILL] * len(case.points)
    check(found, case)
    for point, death in zip(case.points, found.deaths, strict=True):
        assert TRUE_AT[point.partition(":")[0]](death), f"{point}: {death}"
        assert {*death.told, *death.tasks} <= {found.tasks[0]["id"]}, (
            "what was promised is what is there at the end"
        )
        again = [id for id in death.delivered if found.received.count(id) > death.heard.count(id)]
        assert again == [], "what is known to be delivered is not sent again"
    if case.points[0].startswith("inbox."):
        assert (found.answers[0], found.answers[-1]) == (None, 200), (
            "the upstream is not answered, and calls again"
        )
        assert ('"verdict":"duplicate"' in found.log.replace(" ", "")) == (
            case.points[0] == "inbox.committed"
        )


@pytest.mark.parametrize("case", PAUSED, ids=str)
async def test_a_process_that_was_paused_changes_nothing_it_no_longer_owns(
    lives: Lives, case: Case
) -> None:
    """SIGSTOP past its lease, another does the work, SIGCONT: only the upstream's answer in its
    hand still counts.
    """
    found = ended(lives, case)
    assert found.exits == [0]
    check(found, case)
    assert ("task.submission_uncertain" in found.steps) == (
        case.doubted or case.late or "submission.started" in case.points
    )
    assert found.after == "completed", "it goes on serving"


def test_every_checkpoint_is_tried_on_both_stores() -> None:
    """The list of kills is the list of checkpoints."""
    for store in ("sqlite", "postgres"):
        tried = {
            point.partition(":")[0]
            for case in KILLS
            if case.store == store
            for point in case.points
        }
        assert tried == set(CHECKPOINTS) == set(TRUE_AT)
