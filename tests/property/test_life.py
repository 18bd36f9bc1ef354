"""The whole life of a task on both stores, in any order of whatever may happen (see `life`).

A run of its own: DARKROOM_TEST_STEPS says how many steps in all, without it nothing runs.
DARKROOM_TEST_SEED: begins with this seed, as a failure prints it.
"""

import asyncio
import itertools
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from service.store.operations import faults, images, inbox
from service.store.postgres import open_postgres
from service.store.sqlite import open_sqlite
from tests.contract.subject import Clock, new_id
from tests.property.life import TaskLife
from tests.property.life_bench import Bench
from tests.servers import execute, postgres_database

STEPS = int(os.environ.get("DARKROOM_TEST_STEPS", "0"))
SEED = int(os.environ.get("DARKROOM_TEST_SEED") or random.SystemRandom().randrange(10**9))
LENGTH = 80  # steps of one example
pytestmark = pytest.mark.skipif(not STEPS, reason="a run of its own, by DARKROOM_TEST_STEPS")
QUICK = settings(
    max_examples=20,
    stateful_step_count=LENGTH,
    deadline=None,
    database=None,  # the seed says it all
    print_blob=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate, Phase.shrink],
)


@contextmanager
def on_sqlite() -> Iterator[Bench]:
    memory = Path("/dev/shm")  # no power is cut here, so no disk need be waited for
    folder = Path(tempfile.mkdtemp(prefix="darkroom-life-", dir=memory if os.access(memory, os.W_OK) else None))
    clock = Clock()
    opener = partial(open_sqlite, folder / "darkroom.db", process="one", new_id=new_id, clock=lambda: clock.now)
    try:
        with Bench([opener], clock, exclusive=True).opened() as bench:
            yield bench
    finally:
        shutil.rmtree(folder)


@contextmanager
def on_postgres(server: str) -> Iterator[Bench]:
    """Two processes on one database, whose commits need not outlive the server."""
    clock = Clock()
    with postgres_database(server) as url:
        asyncio.run(execute(url, f'ALTER DATABASE "{urlsplit(url).path[1:]}" SET synchronous_commit = off'))
        openers = [partial(open_postgres, url, process=name, new_id=new_id, clock=lambda _now: clock.now) for name in ("one", "two")]
        with Bench(openers, clock, exclusive=False).opened() as bench:
            yield bench


def live(bench: Bench, steps: int) -> None:
    """So many steps, in lives of 80; a failure ends with the shortest life that shows it, and the seed that leads there."""
    machine = type("TaskLife", (TaskLife,), {"bench": bench})
    for number in itertools.count(SEED):
        wanted = steps - bench.steps
        if wanted <= 0:
            break
        print(f"DARKROOM_TEST_SEED={number} DARKROOM_TEST_STEPS={STEPS}, {bench.steps} steps so far")
        run_state_machine_as_test(seed(number)(machine), settings=settings(QUICK, max_examples=wanted // LENGTH + 1))
    assert bench.steps >= steps


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that a short life reaches."""
    monkeypatch.setattr(faults, "FAULT_LIMIT", 2)
    monkeypatch.setattr(faults, "DEATH_LIMIT", 4)
    monkeypatch.setattr(inbox, "KEPT", 4)
    monkeypatch.setattr(images, "STALE_LIMIT", 3)


@pytest.mark.timeout(0)
def test_no_life_breaks_the_rules_on_sqlite() -> None:
    """One terminal event, never before its pictures; no move outside the table; nothing sent twice; nothing due for ever."""
    with on_sqlite() as bench:
        live(bench, STEPS * 3 // 5)


@pytest.mark.timeout(0)
def test_no_life_breaks_the_rules_with_two_processes_on_postgres(postgres_server: str) -> None:
    """The same, while each of two processes goes on where the other died or was paused."""
    with on_postgres(postgres_server) as bench:
        live(bench, STEPS * 2 // 5)
