"""When to try again: arithmetic alone. Waits are seconds, `random` is in [0, 1), attempts and
queries count from 1. docs/settings.md describes the schedules.
"""

from collections.abc import Sequence

JITTER = 0.2


def scheduled_wait(schedule: Sequence[float], attempt: int, random: float) -> float:
    """The wait before a retry, extended by up to 20 %. The last wait of the schedule repeats."""
    if attempt < 1:
        raise ValueError("retries count from 1")
    return schedule[min(attempt, len(schedule)) - 1] * (1 + JITTER * random)


def first_query_wait(
    estimated_time: int | None, with_callback: bool, override: float | None
) -> float:
    """From the submission to the first query of a silent task. `override` (`RECONCILE_AFTER_S`)
    applies to tasks that expect a callback.
    """
    estimated = max(estimated_time or 0, 0)
    if not with_callback:
        return max(3.0, estimated / 2)
    return max(60.0, 2.0 * estimated) if override is None else override


def next_query_wait(
    queries: int, with_callback: bool, override: float | None, random: float
) -> float:
    """After `queries` queries that settled nothing: 60 s, or `override` but at least 3 s, growing
    to 15 min. Without callbacks it is 5 s growing to 60 s.

    The jitter stays within these bounds. It spreads the queries of tasks of the same minute.
    """
    first = 60.0 if override is None else max(3.0, override)
    first, most, factor = (first, 900.0, 2.0) if with_callback else (5.0, 60.0, 1.5)
    return _growing(first, factor, queries, most / (1 + JITTER)) * (1 + JITTER * random)


def confirm_wait(queries: int) -> float:
    """After a query that settled nothing, although a callback says that the task has ended: 1, 2,
    4 … 60 s.
    """
    return _growing(1.0, 2.0, queries, 60.0)


def results_wait(waited: float) -> float:
    """After a query that found a completed task without all of its results, as long as it was
    waited for them so far: 1, 1, 2, 4 … 60 s.
    """
    return min(max(waited, 1.0), 60.0)


def fault_wait(faults: int) -> float:
    """After an unforeseen exception: 1, 2, 4 … 300 s."""
    return _growing(1.0, 2.0, faults, 300.0)


def broker_wait(faults: int, random: float) -> float:
    """After a fault of a broker: up to 0.5, 1, 2 … 16 s, so that its clients do not all return at
    once.
    """
    return _growing(0.5, 2.0, faults, 16.0) * random


def _growing(first: float, factor: float, count: int, most: float) -> float:
    power = min(max(count, 1) - 1, 64)  # past any bound here, far from a float's end
    return min(first * factor**power, most)
