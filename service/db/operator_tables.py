"""The tables of operators: API keys, money, the audit of their acts, and what they pause.

Credits are millionths of a credit. All sums are made from the rows of `ledger`.
"""

from sqlalchemy import JSON, BigInteger, Column, String, Table, Text

from service.db.tables import metadata

# The store has the hash of a key, not the key.
api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("hash", String(64), nullable=False, unique=True),
    Column("hint", String(16), nullable=False),  # the first characters of the key
    Column("scopes", JSON, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("revoked_at", BigInteger),
)

# A row is never changed and never deleted, also not by erasure and retention.
ledger = Table(
    "ledger",
    metadata,
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("id", String(40), nullable=False, unique=True),
    Column("time", BigInteger, nullable=False),
    Column("task_id", String(40), nullable=False),
    # Of the task. All entries of a task count for the day on which it was accepted.
    Column("created_at", BigInteger, nullable=False),
    Column("owner", String(64), nullable=False),
    Column("model", String(200), nullable=False),
    Column("upstream", String(32), nullable=False),
    Column("kind", String(16), nullable=False),  # estimate | reserve | charge | refund | adjust
    Column("credits", BigInteger, nullable=False),
    Column("source", String(16), nullable=False),  # catalogue | submit | query | callback, operator
)

budgets = Table(
    "budgets",
    metadata,
    Column("owner", String(64), primary_key=True),
    Column("period", String(8), nullable=False),  # day | month | total
    Column("credits", BigInteger, nullable=False),
    Column("changed_at", BigInteger, nullable=False),
    # The start of the period for which operators have the event `budget.exhausted`.
    Column("exhausted_since", BigInteger),
)

# A row is never changed. Only retention deletes it.
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
