"""The tables of money. Credits are millionths of a credit.

A row of `ledger` is never changed and never deleted, also not by erasure and retention. All sums
are made from these rows.
"""

from sqlalchemy import BigInteger, Column, Index, String, Table

from service.db.tables import metadata

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
    Index(None, "task_id", "sequence"),
    Index(None, "owner", "created_at", "kind", "credits"),
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
