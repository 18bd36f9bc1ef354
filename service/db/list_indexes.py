"""What lists, filters and figures are looked up by, so that none of them reads the whole store:
indexes, pairs of metadata, and counters (docs/decisions/0046).

An index of what is rare costs an ordinary task nothing. A query uses it only if it repeats the
index's condition word for word.

Triggers of the database write `task_metadata` and these rows of `counters`: `tasks STATE` (tasks
that ended in that state), `credits reserved` (of those tasks) and `credits KIND` (the sums of the
ledger). So processes of an earlier version, which know nothing of them, keep them right too.
"""

from sqlalchemy import BigInteger, Column, Index, String, Table, Text, and_, literal_column

from service.db.money_tables import ledger
from service.db.tables import deliveries, events, metadata, tasks

# The types of nearly all events. Of the others, each has its own place in an index.
COMMON = ("image.task.submitted", "image.task.completed")
RARE_EVENT = and_(*(events.c.type != literal_column(f"'{type}'") for type in COMMON))
UNFINISHED = deliveries.c.state != literal_column("'delivered'")
REFUSED = deliveries.c.last_status >= literal_column("300")
ENDED_BADLY = and_(tasks.c.terminal_at.is_not(None), tasks.c.state != literal_column("'completed'"))
HAS_ERROR = tasks.c.error.is_not(None)

task_metadata = Table(
    "task_metadata",
    metadata,
    Column("task_id", String(40), nullable=False, index=True),
    Column("owner", String(64), nullable=False),
    Column("created_at", BigInteger, nullable=False),  # of the task
    Column("key", Text, nullable=False),
    Column("value", Text, nullable=False),
    Index("ix_task_metadata_pair", "key", "value", "created_at", "task_id"),
    Index("ix_task_metadata_owner_pair", "owner", "key", "value", "created_at", "task_id"),
)

Index("ix_tasks_model_created_at_id", tasks.c.model, tasks.c.created_at, tasks.c.id)
Index("ix_deliveries_created_at_id", deliveries.c.created_at, deliveries.c.id)
Index(
    "ix_deliveries_endpoint_id_created_at_id",
    *(deliveries.c[name] for name in ("endpoint_id", "created_at", "id")),
)
Index("ix_ledger_owner_sequence", ledger.c.owner, ledger.c.sequence)

# Migrations make these, as those of `service/db/queues.py`.
for name, table, where, *columns in (
    ("tasks_bad_end", tasks, ENDED_BADLY, "state", "created_at", "id"),
    ("tasks_owner_bad_end", tasks, ENDED_BADLY, "owner", "state", "created_at", "id"),
    ("tasks_error", tasks, HAS_ERROR, "created_at", "id"),
    ("tasks_owner_error", tasks, HAS_ERROR, "owner", "created_at", "id"),
    ("deliveries_unfinished", deliveries, UNFINISHED, "state", "created_at", "id"),
    ("deliveries_cause", deliveries, deliveries.c.cause.is_not(None), "cause", "created_at", "id"),
    ("deliveries_refused", deliveries, REFUSED, "last_status", "created_at", "id"),
    ("events_rare", events, RARE_EVENT, "type", "sequence"),
    ("events_owner_rare", events, RARE_EVENT, "owner", "type", "sequence"),
):
    Index(f"ix_{name}", *(table.c[column] for column in columns), sqlite_where=where)
