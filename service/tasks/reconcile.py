"""When a task that says nothing is asked about: the same plan whether callbacks are expected or not
(contract section 2).

Whatever was silent too long is simply due for `settle`; there is no second way to an outcome.
"""

from collections.abc import Callable
from dataclasses import dataclass

from service.queue.backoff import confirm_wait, first_query_wait, next_query_wait


@dataclass(frozen=True, slots=True)
class Plan:
    """`with_callback`: a callback_url was sent. `after` is `RECONCILE_AFTER_S`. Waits are
    milliseconds.
    """

    with_callback: bool
    after: float | None
    random: Callable[[], float]

    def first(self, estimated_time: int | None) -> int:
        """From the submission to the first question."""
        return round(first_query_wait(estimated_time, self.with_callback, self.after) * 1000)

    def again(self, attempt: int, *, called_back: bool, retry_after: float | None = None) -> int:
        """After a question that settled nothing; soon, when a callback said that the task has
        ended.
        """
        wait = (
            confirm_wait(attempt)
            if called_back
            else next_query_wait(attempt, self.with_callback, self.random())
        )
        return round(max(wait, retry_after or 0) * 1000)
