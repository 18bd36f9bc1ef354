"""Bounds and growth of every wait."""

from collections.abc import Callable
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.net.retry_after import retry_after
from service.queue.backoff import (
    confirm_wait,
    fault_wait,
    first_query_wait,
    next_query_wait,
    wait_before,
)

RANDOM = st.floats(0, 1, exclude_max=True)
COUNTS = st.integers(1, 10**6)
SCHEDULES = st.lists(st.floats(0, 86400), max_size=10)


@given(SCHEDULES, COUNTS, st.booleans(), RANDOM, st.floats(0, 1))
def test_a_wait_lies_between_its_base_and_the_spread(
    schedule: list[float], attempt: int, repeat_last: bool, random: float, spread: float
) -> None:
    """Never shorter than the schedule says, never longer than by the spread; None exactly when it
    is exhausted.
    """
    wait = wait_before(schedule, attempt, repeat_last=repeat_last, random=random, spread=spread)
    if attempt > len(schedule) and not (repeat_last and schedule):
        assert wait is None
    else:
        base = schedule[min(attempt, len(schedule)) - 1]
        assert wait is not None
        assert base <= wait <= base * (1 + spread)


@given(
    st.text(st.characters(codec=None))
    | st.from_regex(r"[A-Za-z]{3}, [0-9]+ [A-Za-z]{3} [0-9]+ [0-9:]+ [-+0-9A-Z]+"),
    st.floats(0, 1e11),
)
def test_no_header_makes_retry_after_raise(value: str, now: float) -> None:
    """Whatever the other side sends is a wait within the bounds, or nothing."""
    wait = retry_after(value, now)
    assert wait is None or 0 <= wait <= 3600


@given(st.integers(0, 3600), st.integers(0, 4 * 10**9))
def test_both_forms_say_the_same(seconds: int, now: int) -> None:
    """A date in n seconds and n seconds are the same wait."""
    assert (
        retry_after(formatdate(now + seconds, usegmt=True), now)
        == retry_after(str(seconds), now)
        == seconds
    )


@given(st.none() | st.integers(-(10**6), 10**6), st.booleans())
def test_the_first_query_is_never_early(estimated: int | None, with_callback: bool) -> None:
    """At least a minute with a callback, at least 3 s without: queries cost the upstream work."""
    assert first_query_wait(estimated, with_callback, None) >= (60 if with_callback else 3)


@given(COUNTS, st.booleans(), RANDOM, RANDOM)
def test_query_waits_stay_within_their_bounds(
    queries: int, with_callback: bool, random: float, other: float
) -> None:
    """60 s to 15 min with callbacks, 5 s to 60 s without, jitter included; with the same luck never
    shorter than the one before.
    """
    low, high = (60, 900) if with_callback else (5, 60)
    wait = next_query_wait(queries, with_callback, random)
    assert low <= wait <= high + 1e-9
    assert next_query_wait(queries + 1, with_callback, random) >= wait
    assert next_query_wait(queries, with_callback, other) <= wait * 1.2 + 1e-9


@pytest.mark.parametrize(("wait", "low", "high"), [(confirm_wait, 2, 60), (fault_wait, 1, 300)])
@given(count=COUNTS)
def test_other_waits_grow_within_their_bounds(
    wait: Callable[[int], float], low: float, high: float, count: int
) -> None:
    """They never shrink and never pass their cap."""
    assert low <= wait(count) <= wait(count + 1) <= high
