"""The garbage collector of a server process (docs/benchmarks.md, "The garbage collector")."""

import gc
from collections.abc import Iterator

import pytest

from service.ops.garbage import THRESHOLDS, settle


@pytest.fixture
def restored() -> Iterator[None]:
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


@pytest.mark.usefixtures("restored")
def test_what_lives_at_the_end_of_a_start_is_never_looked_at_again() -> None:
    settle()
    assert gc.get_threshold() == THRESHOLDS
    assert gc.get_freeze_count() > 10_000
