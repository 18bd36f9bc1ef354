"""The garbage collector after the start of a server."""

import gc
from collections.abc import Iterator

import pytest

from service.ops import garbage


@pytest.fixture
def settled() -> Iterator[None]:
    before = gc.get_threshold()
    garbage.settle()
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


@pytest.mark.usefixtures("settled")
def test_what_a_start_made_is_never_looked_at_again_and_later_cycles_are_collected() -> None:
    assert gc.get_freeze_count() > 1000
    cycles: list[list[object]] = [[] for _ in range(100)]
    for cycle in cycles:
        cycle.append(cycle)
    del cycle
    cycles.clear()
    assert gc.collect() >= 100
