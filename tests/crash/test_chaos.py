"""A short chaos run, and tests of the verdict on faulty runs."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest

from service.upstreams.sandbox.faults import read_faults
from tests.crash.chaos.verdict import Seen, judge
from tests.crash.chaos.weather import TROUBLES, Scale, acts, faults
from tests.environment import run_module
from tests.servers import missing, postgres_binaries

SHORT = ("--tasks", "50", "--kills", "8", "--restarts", "1", "--seconds", "10", "--patience", "240")


@pytest.mark.timeout(840)
def test_a_short_chaos_run_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """The run kills and pauses processes, restarts the server, and takes the upstream and the
    subscriber away for a while. On each store every task ends once, is paid once and has its events
    delivered.
    """
    if postgres_binaries() is None:
        missing("PostgreSQL's binaries", "PATH")

    def run(store: str) -> dict[str, str]:
        options = ("--store", store, *SHORT, "--seed", "7", "--folder", str(tmp_path))
        done = run_module("tests.crash.chaos", *options, limit_s=800)
        assert done.returncode == 0, done.stdout + done.stderr
        return dict(re.findall(r"^\| \**([^|*]+?)\** \| ([^|]+) \|$", done.stdout, re.MULTILINE))

    with ThreadPoolExecutor() as pool:  # both mostly wait
        embedded, shared = pool.map(run, ("sqlite", "postgres"))
    rows = {name: (embedded[name], shared[name]) for name in embedded}
    assert rows["tasks"] == ("50", "50")
    assert rows["kills"] == ("8", "8")
    assert rows["server restarts"] == ("0", "1")
    for kind in ("lost", "doubled terminal events", "submitted twice"):
        assert rows[kind] == ("0", "0"), kind
    assert rows["ledger equals the upstream's record"] == ("yes", "yes")
    credits = rows["credits in the ledger, and in that record"]
    for both, uncertain in zip(credits, rows["credits charged for uncertain tasks"], strict=True):
        booked, charged = map(float, both.split(" and "))
        assert 0 < booked <= charged
        assert float(uncertain) == pytest.approx(charged - booked)
    assert not list(tmp_path.iterdir()), "what went well leaves nothing"


def test_a_seed_draws_the_same_trouble_and_the_sandbox_knows_it() -> None:
    """The seed alone decides the orders' faults and the acts. The sandbox has every fault."""
    scale = Scale(10, 4, 2, 100)
    assert acts(scale, "postgres", Random(3)) == acts(scale, "postgres", Random(3))
    assert [faults(Random(number)) for number in range(50)] == [
        faults(Random(number)) for number in range(50)
    ]
    for _, trouble in TROUBLES:
        assert read_faults(trouble(Random(1)), {})


def call(at: float, status: int | None) -> dict[str, Any]:
    return {"at": at, "status": status, "problem": None}


def world() -> Seen:
    """One completed order, and one that failed as uncertain without any proof."""
    end = {
        "type": "image.task.completed",
        "id": "evt_1",
        "subject": "task_1",
        "time": "1970-01-01T00:01:40.000Z",
    }
    doubt = {
        "type": "image.task.failed",
        "id": "evt_2",
        "subject": "task_2",
        "time": "1970-01-01T00:01:40.000Z",
    }
    return Seen(
        accepted={"1": "task_1", "2": "task_2"},
        tasks=[
            {"id": "task_1", "state": "completed", "error": None, "metadata": {"order": "1"}},
            {
                "id": "task_2",
                "state": "failed",
                "error": {"code": "submission_uncertain"},
                "metadata": {"order": "2"},
                "request": {"sandbox": {}},
            },
        ],
        events=[end, doubt],
        received={
            ("evt_1", "image.task.completed", "task_1"),
            ("evt_2", "image.task.failed", "task_2"),
        },
        made={
            "task_1": [
                {
                    "id": "u1",
                    "status": "completed",
                    "callbacks": [call(97, None), call(98, 200), call(99, 200)],
                }
            ]
        },
        posts=[("1", "task_1", 429), ("1", "task_1", 200), ("2", "task_2", None)],
        pictures={"task_1": (["sum"], ["sum"])},
        ledger={"task_1": 1_500_000},
        charged={"task_1": 1_500_000, "task_2": 1_500_000},
    )


def test_a_verdict_counts_what_is_no_defect() -> None:
    """The verdict counts a refused submission that is sent again, a callback that is answered on
    its second attempt, and a task that stays uncertain. It reports none of them as a defect.
    """
    verdict = judge(world())
    assert (verdict.lost, verdict.doubled, verdict.twice) == ({}, {}, {})
    assert (verdict.uncertain, verdict.refused, verdict.waits) == (1, 1, [2.0])
    assert (verdict.credits, verdict.unreported) == ((1_500_000, 3_000_000), 1_500_000)
    unreadable = world()
    unreadable.tasks[1]["request"]["sandbox"]["garbage_callback"] = True
    proved(unreadable)
    assert judge(unreadable).lost == {}


def still_open(seen: Seen) -> None:
    seen.tasks[0]["state"] = "storing"


def unknown(seen: Seen) -> None:
    del seen.tasks[0]


def eventless(seen: Seen) -> None:
    del seen.events[0]


def untold(seen: Seen) -> None:
    seen.received.pop()


def contradicted(seen: Seen) -> None:
    seen.events[0]["type"] = "image.task.failed"


def other_bytes(seen: Seen) -> None:
    seen.pictures["task_1"][0][0] = "another"


def no_pictures(seen: Seen) -> None:
    seen.pictures["task_1"] = ([], [])


def other_end(seen: Seen) -> None:
    seen.made["task_1"][0]["status"] = "failed"


def proved(seen: Seen) -> None:
    seen.made["task_2"] = [{"id": "u2", "status": "completed", "callbacks": [call(50, 200)]}]


def second_end(seen: Seen) -> None:
    seen.events.append(seen.events[0] | {"id": "evt_3"})
    seen.received.add(("evt_3", "image.task.completed", "task_1"))


def second_delivery(seen: Seen) -> None:
    seen.received.add(("evt_3", "image.task.completed", "task_1"))


def sent_again(seen: Seen) -> None:
    seen.posts.append(("2", "task_2", 200))


def made_again(seen: Seen) -> None:
    seen.made["task_1"] *= 2


def two_tasks(seen: Seen) -> None:
    seen.tasks.append(seen.tasks[0] | {"id": "task_3"})


def uncharged(seen: Seen) -> None:
    del seen.ledger["task_1"]


def overcharged(seen: Seen) -> None:
    seen.ledger["task_1"] += 1


def charged_elsewhere(seen: Seen) -> None:
    seen.charged["task_9"] = 1


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        *(
            (damage, "lost")
            for damage in (
                still_open,
                unknown,
                eventless,
                untold,
                contradicted,
                other_bytes,
                no_pictures,
                other_end,
                proved,
            )
        ),
        *((damage, "doubled") for damage in (second_end, second_delivery)),
        *((damage, "unequal") for damage in (uncharged, overcharged, charged_elsewhere)),
        *((damage, "twice") for damage in (sent_again, made_again, two_tasks)),
    ],
)
def test_a_verdict_names_what_is_wrong(damage: Callable[[Seen], None], kind: str) -> None:
    """The verdict names each task that is lost, doubled or paid twice."""
    seen = world()
    damage(seen)
    assert getattr(judge(seen), kind)
