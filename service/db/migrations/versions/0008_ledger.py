"""Money: the ledger, and budgets. A task that has a cost gets its charge as the first entry."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

CHARGES = """INSERT INTO ledger (sequence, id, time, task_id, created_at, owner, model, upstream,
    kind, credits, source)
    SELECT row_number() OVER (ORDER BY created_at, id), 'led_' || substr(id, 6),
    coalesce(terminal_at, created_at), id, created_at, owner, model, upstream, 'charge',
    credits_used, 'query' FROM tasks WHERE credits_used > 0"""
LAST = "INSERT INTO counters (name, value) VALUES ('ledger', (SELECT count(*) FROM ledger))"


def upgrade() -> None:
    op.create_table(
        "ledger",
        sa.Column("sequence", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("time", sa.BigInteger(), nullable=False),
        sa.Column("task_id", sa.String(length=40), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("owner", sa.String(length=64), nullable=False),
        sa.Column("model", sa.String(length=200), nullable=False),
        sa.Column("upstream", sa.String(length=32), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("credits", sa.BigInteger(), nullable=False),
        sa.Column("source", sa.String(length=16), nullable=False),
        sa.PrimaryKeyConstraint("sequence", name=op.f("pk_ledger")),
        sa.UniqueConstraint("id", name=op.f("uq_ledger_id")),
    )
    op.create_index(op.f("ix_ledger_task_id_sequence"), "ledger", ["task_id", "sequence"])
    sums = ["owner", "created_at", "kind", "credits"]
    op.create_index(op.f("ix_ledger_owner_created_at_kind_credits"), "ledger", sums)
    op.create_table(
        "budgets",
        sa.Column("owner", sa.String(length=64), nullable=False),
        sa.Column("period", sa.String(length=8), nullable=False),
        sa.Column("credits", sa.BigInteger(), nullable=False),
        sa.Column("changed_at", sa.BigInteger(), nullable=False),
        sa.Column("exhausted_since", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("owner", name=op.f("pk_budgets")),
    )
    for name in ("credits_estimated", "credits_refunded"):
        op.add_column("tasks", sa.Column(name, sa.BigInteger(), nullable=True))
    op.add_column("tasks", sa.Column("images_requested", sa.Integer(), nullable=True))
    op.execute(CHARGES)
    op.execute(LAST)
