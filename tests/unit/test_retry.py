"""The waits between attempts and queries (docs/settings.md)."""

from email.utils import formatdate

import pytest

from service.net.responses import retry_after
from service.queue.backoff import (
    confirm_wait,
    fault_wait,
    first_query_wait,
    next_query_wait,
    results_wait,
    scheduled_wait,
)

NOW = 784_111_777.0  # Sun, 06 Nov 1994 08:49:37 GMT


def test_each_attempt_has_its_wait_of_the_schedule() -> None:
    """The first retry waits for the first entry. The last wait repeats."""
    waits = [scheduled_wait([5, 300, 1800], attempt, 0.0) for attempt in (1, 2, 3, 4, 1000)]
    assert waits == [5, 300, 1800, 1800, 1800]


def test_the_spread_only_lengthens_a_wait() -> None:
    """Retries wait 0 to 20 % longer than the schedule."""
    assert scheduled_wait([100], 1, 0.5) == pytest.approx(110)


@pytest.mark.parametrize("attempt", [0, -1])
def test_retries_count_from_one(attempt: int) -> None:
    """Attempt 0 would select the last wait without an error."""
    with pytest.raises(ValueError, match="from 1"):
        scheduled_wait([1, 2], attempt, 0.0)


@pytest.mark.parametrize(
    ("value", "wait"),
    [
        ("0", 0.0),
        ("120", 120.0),
        (" 7\t", 7.0),
        ("3601", 3600.0),
        ("9" * 5000, 3600.0),
        ("Sun, 06 Nov 1994 08:50:37 GMT", 60.0),
        ("Sunday, 06-Nov-94 08:50:37 GMT", 60.0),
        ("Sun Nov  6 08:50:37 1994", 60.0),
        ("Sun, 06 Nov 1994 08:00:00 GMT", 0.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 3600.0),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str, wait: float) -> None:
    """RFC 9110 allows digits, or a date in three forms. A past date means now, and an hour is the
    maximum.
    """
    assert retry_after(value, NOW) == wait


@pytest.mark.parametrize(
    "value",
    [
        *(None, "", " ", "-5", "1.5", "soon", "1e3", "٣", "²", "\0", "\ud800", "x" * 100_000),
        *(
            "Sun, 99 Nov 1994 08:50:37 GMT",
            "Sun, 06 Nov 99999999999999999999 08:50:37 GMT",
            "Sun, 06 Nov 1994 08:50:37 +999999999",
        ),
    ],
)
def test_a_malformed_retry_after_is_ignored(value: str | None) -> None:
    """The schedule stays as it is."""
    assert retry_after(value, NOW) is None


def test_the_caller_sets_the_limit_of_retry_after() -> None:
    """It holds for both forms."""
    assert retry_after("100", NOW, limit=10) == 10
    assert retry_after(formatdate(NOW + 100, usegmt=True), NOW, limit=10) == 10


@pytest.mark.parametrize(
    ("estimated", "with_callback", "override", "wait"),
    [
        (None, True, None, 60),
        (10, True, None, 60),
        (45, True, None, 90),
        (45, True, 5.0, 5),
        (45, True, 0.0, 0),
        (-5, True, None, 60),
        (None, False, None, 3),
        (4, False, None, 3),
        (45, False, None, 22.5),
        (45, False, 5.0, 22.5),
    ],
)
def test_the_first_query_waits_for_the_callback_or_comes_at_half_time(
    estimated: int | None, with_callback: bool, override: float | None, wait: float
) -> None:
    """With a callback, it waits for max(60, 2 × estimated) or the setting. Without one, it waits
    for max(3, estimated / 2).
    """
    assert first_query_wait(estimated, with_callback, override) == wait


def test_queries_become_rare() -> None:
    """With callbacks, the waits double from 60 s to 15 min. Without them, they grow from 5 s to 60
    s.
    """
    assert [next_query_wait(queries, True, None, 0.0) for queries in (1, 2, 3, 4, 5, 99)] == [
        60,
        120,
        240,
        480,
        750,
        750,
    ]
    assert [next_query_wait(queries, False, 9.0, 0.0) for queries in (1, 2, 3, 99)] == [
        5,
        7.5,
        11.25,
        50,
    ]
    assert next_query_wait(99, True, None, 1.0) == pytest.approx(900)
    assert next_query_wait(99, False, None, 1.0) == pytest.approx(60)


@pytest.mark.parametrize(
    ("override", "waits"), [(5.0, [5, 10, 20, 750]), (0.0, [3, 6, 12, 750]), (3600.0, [750] * 4)]
)
def test_later_waits_grow_from_the_first_one(override: float, waits: list[float]) -> None:
    """They grow from `RECONCILE_AFTER_S`, but from 3 s at least, to 15 min."""
    assert [next_query_wait(queries, True, override, 0.0) for queries in (1, 2, 3, 99)] == waits


def test_a_query_that_confirms_is_retried_soon() -> None:
    """The waits are 1, 2, 4 … and at most 60 s."""
    assert [confirm_wait(queries) for queries in (0, 1, 2, 3, 6, 7, 10_000)] == [
        1,
        1,
        2,
        4,
        32,
        60,
        60,
    ]


def test_late_results_are_asked_for_soon() -> None:
    """Each wait is as long as the time so far, at least 1 and at most 60 s."""
    assert [results_wait(waited) for waited in (0, 1, 2, 4, 59, 64)] == [1, 1, 2, 4, 59, 60]


def test_faults_back_off_to_five_minutes() -> None:
    """The waits are 1, 2, 4 … and at most 300 s."""
    assert [fault_wait(faults) for faults in (0, 1, 2, 3, 9, 10, 10_000)] == [
        1,
        1,
        2,
        4,
        256,
        300,
        300,
    ]
