"""Waits of requests for the outcome of a task."""

import asyncio
from collections.abc import Awaitable, Callable

from service.errors import ApiError
from service.resources import Resources
from service.tasks import task_queries
from service.tasks.rows import ImageRow, TaskRow
from service.tasks.state import State

LOOK_S = 1.0  # how late a request sees the work of another process


def attempted(row: TaskRow) -> bool:
    """Whether the first submission has an outcome."""
    return row.submit_outcomes > 0 or row.state not in (State.QUEUED, State.SUBMITTING)


def ended(row: TaskRow) -> bool:
    return row.terminal


async def wait_for(
    resources: Resources,
    task_id: str,
    done: Callable[[TaskRow], bool],
    seconds: float,
    gone: Callable[[], Awaitable[bool]],
    *,
    new: bool = False,
) -> tuple[TaskRow, list[ImageRow]]:
    """The task as soon as `done` is true, or its state after the time, when the process stops or
    when the client is `gone`. A `new` task, whose commit has just ended, is not read before its
    first change.
    """
    signals, clock = resources.store.signals, asyncio.get_running_loop().time
    deadline = clock() + seconds
    with signals.listen(task_id) as changed:
        while True:
            if new:
                await signals.wait(changed, min(seconds, LOOK_S))
                new = False
            task, changed.record = _committed(changed.record), None
            changed.clear()
            if task is None:
                task = await resources.store.look_up(task_queries.task, task_id, None)
            if task is None:
                raise ApiError(404, "task_not_found", "the task was deleted meanwhile")
            left = deadline - clock()
            if done(task[0]) or left <= 0 or signals.stopping or await gone():
                return task
            await signals.wait(changed, min(left, LOOK_S))


def _committed(record: object) -> tuple[TaskRow, list[ImageRow]] | None:
    """The task of a commit, unless images belong to it."""
    if isinstance(record, TaskRow) and not task_queries.has_images(record):
        return record, []
    return None
