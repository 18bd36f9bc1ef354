"""The embedded store's clock, on a machine whose own clock jumps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.db.clock import SLEW, SteadyClock

START = 1_757_165_031_000
SECOND, HOUR = 1_000_000_000, 3_600_000_000_000  # nanoseconds


class Machine:
    """A machine's wall clock and steady clock."""

    def __init__(self) -> None:
        self.wall, self.steady = START * 1_000_000, 77
        self.clock = SteadyClock(lambda: self.wall, lambda: self.steady)

    def passes(self, ns: int) -> None:
        self.wall += ns
        self.steady += ns


@pytest.mark.parametrize("jump", [HOUR, -HOUR])
def test_a_jump_that_is_undone_has_no_lasting_effect(jump: int) -> None:
    """In between, the clock is at most a tenth faster or slower. Afterwards it is right again
    within the same time.
    """
    machine = Machine()
    machine.wall += jump
    for _ in range(60):
        machine.passes(SECOND)
        machine.clock()
    assert abs(machine.clock() - START - 60_000) <= 60_000 / SLEW
    machine.wall -= jump
    for _ in range(66):
        machine.passes(SECOND)
        machine.clock()
    assert machine.clock() == START + 126_000


def test_the_clock_catches_up_with_a_jump_that_lasts() -> None:
    """It makes up one hour in ten."""
    machine = Machine()
    machine.wall += HOUR
    for _ in range(10 * 3600):
        machine.passes(SECOND)
        machine.clock()
    assert machine.clock() == machine.wall // 1_000_000


@given(
    st.lists(st.tuples(st.integers(0, 10 * SECOND), st.integers(-2 * HOUR, 2 * HOUR)), max_size=50)
)
def test_the_clock_never_goes_back_and_stays_close_to_the_passed_time(
    moves: list[tuple[int, int]],
) -> None:
    """Its error is at most a tenth of the time that really passed, whatever the machine's clock
    does.
    """
    machine, passed, before = Machine(), 0, START
    for ns, jump in moves:
        machine.passes(ns)
        machine.wall += jump
        passed += ns
        now = machine.clock()
        assert now >= before
        assert abs(now - START - passed / 1_000_000) <= passed / 1_000_000 / SLEW + 1
        before = now
