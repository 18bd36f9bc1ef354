"""When to try again: arithmetic alone. Waits are seconds, `random` is in [0, 1), attempts and
queries count from 1.

Schedules are those of contract section 2.
"""

from collections.abc import Sequence

from service.net.retry_after import retry_after

__all__ = [
    "broker_wait",
    "confirm_wait",
    "fault_wait",
    "first_query_wait",
    "next_query_wait",
    "retry_after",
    "wait_before",
]

JITTER = 0.2


def wait_before(
    schedule: Sequence[float], attempt: int, *, repeat_last: bool, random: float, spread: float
) -> float | None:
    """The wait before the `attempt`-th retry, lengthened by up to `spread` (0.2 is 20 %); None: the
    schedule is exhausted.
    """
    if attempt < 1:
        raise ValueError("retries count from 1")
    if attempt > len(schedule) and not (repeat_last and schedule):
        return None
    return schedule[min(attempt, len(schedule)) - 1] * (1 + spread * random)


def first_query_wait(
    estimated_time: int | None, with_callback: bool, override: float | None
) -> float:
    """From the submission to the first query of a silent task; `override` (`RECONCILE_AFTER_S`) is
    for those that expect a callback.
    """
    estimated = max(estimated_time or 0, 0)
    if not with_callback:
        return max(3.0, estimated / 2)
    return max(60.0, 2.0 * estimated) if override is None else override


def next_query_wait(queries: int, with_callback: bool, random: float) -> float:
    """After `queries` queries that settled nothing: 60 s growing to 15 min; without callbacks,
    which would tell sooner, 5 s to 60 s.

    The jitter lies within these bounds, so that many tasks of one minute are not asked for in one
    minute for ever.
    """
    first, most, factor = (60.0, 900.0, 2.0) if with_callback else (5.0, 60.0, 1.5)
    return _growing(first, factor, queries, most / (1 + JITTER)) * (1 + JITTER * random)


def confirm_wait(queries: int) -> float:
    """A callback says that the task has ended, the upstream still says processing: 2, 4, 8 … 60
    s.
    """
    return _growing(2.0, 2.0, queries, 60.0)


def fault_wait(faults: int) -> float:
    """After an exception that nobody foresaw: 1, 2, 4 … 300 s."""
    return _growing(1.0, 2.0, faults, 300.0)


def broker_wait(faults: int, random: float) -> float:
    """After a broker's fault: anything up to 0.5, 1, 2 … 16 s, so that not all who lost it come
    back at once.
    """
    return _growing(0.5, 2.0, faults, 16.0) * random


def _growing(first: float, factor: float, count: int, most: float) -> float:
    power = min(max(count, 1) - 1, 64)  # past any bound here, far from a float's end
    return min(first * factor**power, most)
