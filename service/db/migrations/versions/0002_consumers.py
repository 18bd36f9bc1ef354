"""Replays: events that an endpoint gets again. Sinks: how far each broker has come."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "replays",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("owner", sa.String(length=64), nullable=False),
        sa.Column("endpoint_id", sa.String(length=40), nullable=False),
        sa.Column("since_at", sa.BigInteger(), nullable=False),
        sa.Column("until_at", sa.BigInteger(), nullable=False),
        sa.Column("types", sa.JSON(), nullable=False),
        sa.Column("only", sa.String(length=8), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.Column("made", sa.BigInteger(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("last", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("finished_at", sa.BigInteger(), nullable=True),
        sa.Column("due_at", sa.BigInteger(), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("lease_until", sa.BigInteger(), nullable=True),
        sa.Column("lease_owner", sa.String(length=64), nullable=True),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("deaths", sa.Integer(), nullable=False),
        sa.Column("faults", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_replays")),
    )
    for name, columns, where in (
        ("ix_replays_replay_due_at", ["due_at"], "due_at IS NOT NULL"),
        ("ix_replays_deaths", ["deaths"], "deaths > 0"),
    ):
        op.create_index(
            name,
            "replays",
            columns,
            unique=False,
            sqlite_where=sa.text(where),
            postgresql_where=sa.text(where),
        )
    op.create_index(op.f("ix_replays_endpoint_id"), "replays", ["endpoint_id"], unique=False)
    op.execute("INSERT INTO counters (name, value) VALUES ('clock', 0)")
    op.add_column("deliveries", sa.Column("replay_id", sa.String(length=40), nullable=True))
    made = sa.text("replay_id IS NOT NULL")
    op.create_index(
        "ix_deliveries_replay_id",
        "deliveries",
        ["replay_id", "state"],
        unique=False,
        sqlite_where=made,
        postgresql_where=made,
    )
    for stage, wanting in (
        ("deliver", "attempts = 0 AND replay_id IS NULL"),
        ("redeliver", "(attempts > 0 OR replay_id IS NOT NULL)"),
    ):
        name, due = (
            f"ix_deliveries_{stage}_next_due_at",
            sa.text(f"due_at IS NOT NULL AND {wanting}"),
        )
        op.create_index(
            name, "deliveries", ["due_at"], unique=False, sqlite_where=due, postgresql_where=due
        )
    op.create_table(
        "sinks",
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("lease_until", sa.BigInteger(), nullable=True),
        sa.Column("lease_owner", sa.String(length=64), nullable=True),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("seen_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_sinks")),
    )
