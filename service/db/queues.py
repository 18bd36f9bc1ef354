"""The queues: which rows of which table are work, in which order, and the indexes for them.

A row is work while its `due_at` is set. It carries `due_at`, `attempts`, `lease_until`,
`lease_owner`, `fence`, `deaths` and `faults`; `service/queue/leases.py` writes them.
"""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Column, ColumnElement, Connection, Index, Table, and_, or_, update

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
# One queue for each set of lease columns.
LEASED = {(queue.table.name, queue.prefix): queue for queue in QUEUES.values()}.values()


def _partial(name: str, where: ColumnElement[bool], *columns: ColumnElement[Any]) -> None:
    """Only migrations make indexes, for both databases. To name `postgresql_where` here too would
    import PostgreSQL's dialect into every process.
    """
    Index(name, *columns, sqlite_where=where)


# Each queue has an index of its own, so that a claim in one does not read thousands of due rows of
# another. The index of `submit` begins with the order, because owners take turns. A claim of
# deliveries may pass over owners that use their whole share, by an index that ends with the owner.
for queue in QUEUES.values():
    due = queue.column("due_at")
    columns = [queue.order, due] if queue.stage == "submit" else [due]
    waiting = due.is_not(None) if queue.where is None else and_(due.is_not(None), queue.where)
    if queue.table is deliveries:
        _partial(f"ix_deliveries_{queue.stage}_due_at_owner", waiting, due, deliveries.c.owner)
    else:
        _partial(f"ix_{queue.table.name}_{queue.stage}_due_at", waiting, *columns)

for queue in LEASED:
    deaths = queue.column("deaths")
    _partial(f"ix_{queue.table.name}_{queue.prefix}deaths", deaths > ZERO, deaths)

# The deliveries that an endpoint waits for, soonest first.
_waiting = and_(deliveries.c.due_at.is_not(None), deliveries.c.endpoint_id.is_not(None))
_partial(
    "ix_deliveries_endpoint_id_due_at", _waiting, deliveries.c.endpoint_id, deliveries.c.due_at
)
_ordered = (deliveries.c[name] for name in ("endpoint_id", "order_key", "state", "sequence"))
_partial("ix_deliveries_ordered", deliveries.c.order_key.is_not(None), *_ordered)
_replayed = deliveries.c.replay_id.is_not(None)
_partial("ix_deliveries_replay_id", _replayed, deliveries.c.replay_id, deliveries.c.state)
# Failures: their groups, for one owner and for all, and their deliveries by time.
_failing, _columns = deliveries.c.cause.is_not(None), deliveries.c
_group = _columns.failed_at, _columns.endpoint_id, _columns.cause, _columns.failed_since
_partial("ix_deliveries_failures", _failing, *_group)
_partial("ix_deliveries_owner_failures", _failing, _columns.owner, *_group)
_partial(
    "ix_deliveries_failed_created_at", _failing, _columns.owner, _columns.created_at, _columns.id
)
_retained = and_(tasks.c.terminal_at.is_not(None), tasks.c.erased_at.is_(None))
_partial("ix_tasks_terminal_at", _retained, tasks.c.terminal_at)
_partial("ix_images_stored_at", images.c.blob.is_not(None), images.c.stored_at)
_partial("ix_images_refused_host", images.c.refused_host.is_not(None), images.c.refused_host)
_unsubmitted = tasks.c.submit_due_at.is_not(None)
_partial("ix_tasks_owner_submit_turn", _unsubmitted, tasks.c.owner, tasks.c.submit_turn)


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
