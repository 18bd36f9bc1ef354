"""Bounds and growth of every wait."""

from collections.abc import Callable
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.net.responses import retry_after
from service.queue.backoff import (
    confirm_wait,
    fault_wait,
    first_query_wait,
    next_query_wait,
    scheduled_wait,
)

RANDOM = st.floats(0, 1, exclude_max=True)
COUNTS = st.integers(1, 10**6)
SCHEDULES = st.lists(st.floats(0, 86400), min_size=1, max_size=10)


@given(SCHEDULES, COUNTS, RANDOM)
def test_a_wait_lies_between_its_base_and_the_spread(
    schedule: list[float], attempt: int, random: float
) -> None:
    """A wait is at least the scheduled one, and longer by at most 20 %."""
    base = schedule[min(attempt, len(schedule)) - 1]
    assert base <= scheduled_wait(schedule, attempt, random) <= base * 1.2


@given(
    st.text(st.characters(codec=None))
    | st.from_regex(r"[A-Za-z]{3}, [0-9]+ [A-Za-z]{3} [0-9]+ [0-9:]+ [-+0-9A-Z]+"),
    st.floats(0, 1e11),
)
def test_no_header_makes_retry_after_raise(value: str, now: float) -> None:
    """Any header is a wait within the bounds, or None."""
    wait = retry_after(value, now)
    assert wait is None or 0 <= wait <= 3600


@given(st.integers(0, 3600), st.integers(0, 4 * 10**9))
def test_seconds_and_a_date_in_retry_after_mean_the_same_wait(seconds: int, now: int) -> None:
    assert (
        retry_after(formatdate(now + seconds, usegmt=True), now)
        == retry_after(str(seconds), now)
        == seconds
    )


@given(st.none() | st.integers(-(10**6), 10**6), st.booleans())
def test_the_first_query_is_never_early(estimated: int | None, with_callback: bool) -> None:
    """It comes after at least 60 s with a callback and 3 s without, because queries cost the
    upstream work.
    """
    assert first_query_wait(estimated, with_callback, None) >= (60 if with_callback else 3)


@given(COUNTS, st.booleans(), st.none() | st.floats(0, 10**9), RANDOM, RANDOM)
def test_query_waits_stay_within_their_bounds(
    queries: int, with_callback: bool, override: float | None, random: float, other: float
) -> None:
    """They are 60 s to 15 min with callbacks, or 3 s to 15 min with an override, and 5 s to 60 s
    without callbacks, jitter included. With the same random number, a wait is never shorter than
    the previous one.
    """
    low, high = (60 if override is None else 3, 900) if with_callback else (5, 60)
    wait = next_query_wait(queries, with_callback, override, random)
    assert low <= wait <= high + 1e-9
    assert next_query_wait(queries + 1, with_callback, override, random) >= wait
    assert next_query_wait(queries, with_callback, override, other) <= wait * 1.2 + 1e-9


@pytest.mark.parametrize(("wait", "low", "high"), [(confirm_wait, 1, 60), (fault_wait, 1, 300)])
@given(count=COUNTS)
def test_other_waits_grow_within_their_bounds(
    wait: Callable[[int], float], low: float, high: float, count: int
) -> None:
    """They never shrink and never exceed their cap."""
    assert low <= wait(count) <= wait(count + 1) <= high
