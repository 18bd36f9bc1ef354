"""What lists, filters and figures are looked up by, so that none of them reads the whole store:
indexes, pairs of metadata, and counters (docs/decisions/0046).

Migrations make the indexes. An index of what is rare costs an ordinary task nothing. A query uses
it only if it repeats the index's condition word for word.

Triggers of the database write `task_metadata` and these rows of `counters`: `tasks STATE` (tasks
that ended in that state), `credits reserved` (of those tasks) and `credits KIND` (the sums of the
ledger). So processes of an earlier version, which know nothing of them, keep them right too.
"""

from sqlalchemy import BigInteger, Column, String, Table, Text, and_, literal_column

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
    Column("task_id", String(40), nullable=False),
    Column("owner", String(64), nullable=False),
    Column("created_at", BigInteger, nullable=False),  # of the task
    Column("key", Text, nullable=False),
    Column("value", Text, nullable=False),
)
