"""The tables of operators: their acts, and whether submission is paused.

A row of `audit` is never changed. Only retention deletes it.
"""

from sqlalchemy import JSON, BigInteger, Column, Index, String, Table, Text

from service.db.tables import metadata

audit = Table(
    "audit",
    metadata,
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("id", String(40), nullable=False, unique=True),
    Column("time", BigInteger, nullable=False),
    Column("owner", String(64), nullable=False),  # of the key
    Column("key_id", String(40)),  # NULL: a command in the store itself
    Column("action", String(64), nullable=False),
    Column("target", String(200)),
    Column("reason", Text),
    Column("outcome", String(64), nullable=False),
    Column("detail", JSON(none_as_null=True)),
    Column("request_id", String(64)),
    Index(None, "time"),
)

# One row for each kind of work that operators may pause: `submission`.
pauses = Table(
    "pauses",
    metadata,
    Column("name", String(32), primary_key=True),
    Column("paused_at", BigInteger),  # NULL: the work goes on
    Column("reason", Text),
    Column("key_id", String(40)),
)
