"""The life of tasks on both stores, in any order of actions (see `life`).

A run makes 1,500 steps by default and always the same ones, so a change fails only for what it
broke. DARKROOM_TEST_STEPS sets another number of steps with a random seed, which finds new
failures. DARKROOM_TEST_SEED sets the first seed. Each run prints its seeds.
"""

import asyncio
import itertools
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from service.images import downloads
from service.queue import crashes
from service.tasks import callbacks
from tests.contract.subject import Clock, new_id
from tests.property.life import TaskLife
from tests.property.life_bench import Bench
from tests.servers import execute, postgres_database
from tests.stores import open_postgres, open_sqlite

STEPS = int(os.environ.get("DARKROOM_TEST_STEPS", "1500"))
RANDOM = "DARKROOM_TEST_STEPS" in os.environ
SEED = int(
    os.environ.get("DARKROOM_TEST_SEED")
    or (random.SystemRandom().randrange(10**9) if RANDOM else 1)
)
LENGTH = 80  # steps of one life
TRACED = 600
# Shrinking a failure takes minutes. The steps themselves take less than one.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900 + STEPS // 20)]
QUICK = settings(
    max_examples=20,
    stateful_step_count=LENGTH,
    deadline=None,
    database=None,  # the seed repeats a run
    print_blob=False,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate, Phase.shrink],
)


@contextmanager
def on_sqlite() -> Iterator[Bench]:
    clock = Clock()
    with tempfile.TemporaryDirectory(prefix="darkroom-life-") as folder:
        path = Path(folder) / "darkroom.db"
        opener = partial(open_sqlite, path, process="one", new_id=new_id, clock=lambda: clock.now)
        with Bench([opener], clock, exclusive=True).opened() as bench:
            yield bench


@contextmanager
def on_postgres(server: str) -> Iterator[Bench]:
    """Two processes on one database, whose commits need not survive the server."""
    clock = Clock()
    with postgres_database(server) as url:
        asyncio.run(
            execute(url, f'ALTER DATABASE "{urlsplit(url).path[1:]}" SET synchronous_commit = off')
        )
        openers = [
            partial(open_postgres, url, process=name, new_id=new_id, clock=lambda _now: clock.now)
            for name in ("one", "two")
        ]
        with Bench(openers, clock, exclusive=False).opened() as bench:
            yield bench


@contextmanager
def untraced() -> Iterator[None]:
    """Stops the coverage tracer. The first steps reach all lines, and tracing the rest costs more
    than running them.
    """
    tracer = sys.gettrace()
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(tracer)


def live(bench: Bench, steps: int) -> None:
    """Runs this number of steps in lives of 80. A failure ends with the shortest life that shows it
    and its seed.
    """
    machine = type("TaskLife", (TaskLife,), {"bench": bench})
    numbers = itertools.count(SEED)

    def until(wanted: int) -> None:
        while bench.steps < wanted:
            number = next(numbers)
            print(
                f"DARKROOM_TEST_SEED={number} DARKROOM_TEST_STEPS={STEPS}, {bench.steps} steps so"
                " far"
            )
            examples = min(100, (wanted - bench.steps) // LENGTH + 1)
            run_state_machine_as_test(
                seed(number)(machine), settings=settings(QUICK, max_examples=examples)
            )

    until(TRACED)
    with untraced():
        until(steps)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that a short life reaches."""
    monkeypatch.setattr(crashes, "FAULT_LIMIT", 2)
    monkeypatch.setattr(crashes, "CRASH_LIMIT", 4)
    monkeypatch.setattr(callbacks, "KEPT", 4)
    monkeypatch.setattr(downloads, "STALE_LIMIT", 3)


def test_no_life_breaks_the_rules_on_sqlite() -> None:
    """A task has one terminal event, never before its images are stored. No move is outside the
    table, no task is submitted twice, and no row is due for ever.
    """
    with on_sqlite() as bench:
        live(bench, STEPS * 13 // 20)


def test_no_life_breaks_the_rules_with_two_processes_on_postgres(postgres_server: str) -> None:
    """Each of the two processes also goes on where the other one crashed or paused."""
    with on_postgres(postgres_server) as bench:
        live(bench, STEPS * 7 // 20)
