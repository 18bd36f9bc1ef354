"""When nothing is due any more: what holds of every task that ever was."""

from collections.abc import Collection
from typing import Any

from sqlalchemy import Connection, select

from service.db.queues import QUEUES
from service.db.tables import callbacks, events, tasks
from service.tasks.state import TERMINAL, State
from tests.contract.subject import SECOND
from tests.property.life_checks import Seen
from tests.property.life_upstream import error
from tests.property.life_work import Workshop


def remains(connection: Connection, erased: Collection[str]) -> list[Any]:
    """What callbacks keep of tasks whose content is gone, and events of those that were erased."""
    gone = (
        select(callbacks.c.body)
        .join(tasks, tasks.c.id == callbacks.c.task_id)
        .where(tasks.c.erased_at.is_not(None))
    )
    told = select(events.c.data).where(
        events.c.task_id.in_(erased), events.c.type.startswith("image.task.")
    )
    shown = [
        data for data in connection.execute(told).scalars() if data["request"] or data["images"]
    ]
    return [body for body in connection.execute(gone).scalars() if body] + shown


def next_due(seen: Seen) -> int | None:
    """When the next row may be claimed."""
    times = []
    for queue in QUEUES.values():
        for row in seen.table(queue.table).values():
            due, until = row[queue.prefix + "due_at"], row[queue.prefix + "lease_until"]
            times += [] if due is None else [max(due, until or 0)]
    return min(times, default=None)


def check_end(seen: Seen, shop: Workshop, latest: int) -> None:
    """When nothing is due any more: everything is decided, and what was said and charged is
    known.
    """
    assert all(image["state"] != "pending" for image in seen.images.values()), (
        "a picture is awaited for ever"
    )
    assert all(row["state"] != "pending" for row in seen.deliveries.values()), (
        "a delivery is pending for ever"
    )
    for queue in QUEUES.values():
        untils = [
            row[queue.prefix + "lease_until"] or 0 for row in seen.table(queue.table).values()
        ]
        assert all(until <= latest + 70 * SECOND for until in untils), "leased for ever"
    for task_id, row in seen.tasks.items():
        state = State(row["state"])
        assert state in TERMINAL, f"{task_id} is {state} for ever"
        assert not row["settled_digest"] or all(image["confirmed"] for image in seen.of(task_id)), (
            f"{task_id}: a picture that only a callback named is kept"
        )
        real = shop.upstream.reals.get(row["upstream_id"] or "")
        if (
            real is None
            or not real.known
            or task_id in shop.upstream.lied_about
            or "task.parked" in seen.types(task_id)
        ):
            continue
        gone = state is State.EXPIRED and real.truth.error == error(
            "resource_not_found"
        )  # which leaves it open to proof
        if (
            task_id in shop.proved_late
            and state is not State.CANCELLED
            and row["erased_at"] is None
            and not gone
        ):
            assert row["settled_digest"] is not None, (
                f"{task_id}: what was called back after its end was never settled"
            )
        one = (
            shop.confirms or len(shop.upstream.of(task_id)) == 1
        )  # what is believed without an id may tell of either of two
        if (
            one
            and row["settled_digest"]
            and real.truth.results
            and state is not State.CANCELLED
            and row["erased_at"] is None
        ):
            named = [image["position"] for image in seen.of(task_id)]
            assert named == list(range(len(real.truth.results))), (
                f"{task_id}: {named} are not all of its pictures"
            )
        if shop.confirms and state is not State.EXPIRED:
            assert row["credits_used"] == real.truth.credits_used, (
                f"{task_id}: {row['credits_used']} is not what it cost"
            )
