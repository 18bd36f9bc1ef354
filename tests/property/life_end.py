"""The rules that hold for every task when no row is due any more."""

from collections.abc import Collection
from typing import Any

from sqlalchemy import Connection, select

from service.db.queues import QUEUES
from service.db.tables import callbacks, events, tasks
from service.tasks.state import TERMINAL, State
from tests.contract.subject import SECOND
from tests.property.life_checks import Snapshot
from tests.property.life_upstream import error
from tests.property.life_work import WorkerScripts


def remains(connection: Connection, erased: Collection[str]) -> list[Any]:
    """Callback bodies of tasks without content, and content in events of erased tasks."""
    gone = (
        select(callbacks.c.body)
        .join(tasks, tasks.c.id == callbacks.c.task_id)
        .where(tasks.c.erased_at.is_not(None))
    )
    emitted = select(events.c.data).where(
        events.c.task_id.in_(erased), events.c.type.startswith("image.task.")
    )
    shown = [
        data for data in connection.execute(emitted).scalars() if data["request"] or data["images"]
    ]
    return [body for body in connection.execute(gone).scalars() if body] + shown


def next_due(snapshot: Snapshot) -> int | None:
    """The time at which the next row may be claimed."""
    times = []
    for queue in QUEUES.values():
        for row in snapshot.table(queue.table).values():
            due, until = row[queue.prefix + "due_at"], row[queue.prefix + "lease_until"]
            times += [] if due is None else [max(due, until or 0)]
    return min(times, default=None)


def check_end(snapshot: Snapshot, workers: WorkerScripts, latest: int) -> None:
    """Every task has ended, and the upstream's outcomes and charges are recorded."""
    assert all(image["state"] != "pending" for image in snapshot.images.values()), (
        "an image is pending for ever"
    )
    assert all(row["state"] != "pending" for row in snapshot.deliveries.values()), (
        "a delivery is pending for ever"
    )
    for queue in QUEUES.values():
        untils = [
            row[queue.prefix + "lease_until"] or 0 for row in snapshot.table(queue.table).values()
        ]
        assert all(until <= latest + 70 * SECOND for until in untils), "leased for ever"
    for task_id, row in snapshot.tasks.items():
        state = State(row["state"])
        assert state in TERMINAL, f"{task_id} is {state} for ever"
        assert not row["settled_digest"] or all(
            image["confirmed"] for image in snapshot.of(task_id)
        ), f"{task_id}: an image that only a callback named is kept"
        real = workers.upstream.reals.get(row["upstream_id"] or "")
        if (
            real is None
            or not real.known
            or task_id in workers.upstream.lied_about
            or "task.parked" in snapshot.types(task_id)
        ):
            continue
        gone = state is State.EXPIRED and real.truth.error == error(
            "resource_not_found"
        )  # proof may still come
        if (
            task_id in workers.proved_late
            and state is not State.CANCELLED
            and row["erased_at"] is None
            and not gone
        ):
            assert row["settled_digest"] is not None, (
                f"{task_id}: a callback after its end was never settled"
            )
        one = (
            workers.confirms or len(workers.upstream.of(task_id)) == 1
        )  # a callback without an id may be about any of the task's upstream tasks
        if (
            one
            and row["settled_digest"]
            and real.truth.results
            and state is not State.CANCELLED
            and row["erased_at"] is None
        ):
            named = [image["position"] for image in snapshot.of(task_id)]
            assert named == list(range(len(real.truth.results))), (
                f"{task_id}: {named} are not all of its images"
            )
        if workers.confirms and state is not State.EXPIRED:
            assert row["credits_used"] == real.truth.credits_used, (
                f"{task_id}: {row['credits_used']} is not the upstream's charge"
            )
