"""The queues: which rows of which table are work, and in which order.

A row is work while its `due_at` is set. It carries `due_at`, `attempts`, `lease_until`,
`lease_owner`, `fence`, `deaths` and `faults`; `service/queue/leases.py` writes them.

Migrations make the indexes. Each queue has one of its own, so that a claim in one does not read
thousands of due rows of another. The index of `submit` begins with the order, because owners take
turns. A claim of deliveries may pass over owners that use their whole share, by an index that ends
with the owner.
"""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Column, ColumnElement, Connection, Table, and_, or_, update

from service.db.tables import ZERO, deliveries, images, replays, sinks, tasks


@dataclass(frozen=True, slots=True)
class Queue:
    """One kind of work: its rows, their order, and the prefix of their lease columns."""

    stage: str
    table: Table
    prefix: str
    order: ColumnElement[Any]
    where: ColumnElement[bool] | None = None

    def column(self, name: str) -> Column[Any]:
        return self.table.c[self.prefix + name]


# Two pairs of queues share the columns of one table, so that unsolicited work never delays other
# work: reconciling never delays a requested query, and retries and replays never delay a first
# attempt.
_first_attempt = and_(deliveries.c.attempts == ZERO, deliveries.c.replay_id.is_(None))
_later_attempt = or_(deliveries.c.attempts > ZERO, deliveries.c.replay_id.is_not(None))
_settle_at, _requests = tasks.c.settle_due_at, tasks.c.settle_requests
QUEUES = {
    queue.stage: queue
    for queue in (
        Queue("submit", tasks, "submit_", tasks.c.submit_turn),
        Queue("settle", tasks, "settle_", _settle_at, _requests > ZERO),
        Queue("reconcile", tasks, "settle_", _settle_at, _requests == ZERO),
        Queue("download", images, "", images.c.link_dies_at),
        Queue("deliver", deliveries, "", deliveries.c.due_at, _first_attempt),
        Queue("redeliver", deliveries, "", deliveries.c.due_at, _later_attempt),
        Queue("replay", replays, "", replays.c.due_at),
    )
}


def release_all(connection: Connection) -> None:
    """Ends the lease of every due row and counts it as a crash. Only for a store whose lock proves
    that no other process uses it (SQLite, at the start). Each queue's index finds its due rows.

    A task that was cancelled while it was leased is not due. Its lease ends by time.
    """
    for queue in QUEUES.values():
        until, deaths = queue.column("lease_until"), queue.column("deaths")
        where = () if queue.where is None else (queue.where,)
        connection.execute(
            update(queue.table)
            .where(queue.column("due_at").is_not(None), until.is_not(None), *where)
            .values({until: None, queue.column("lease_owner"): None, deaths: deaths + 1})
        )
    connection.execute(update(sinks).values(lease_until=None, lease_owner=None))
