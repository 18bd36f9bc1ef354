"""Failures of deliveries have a cause. Replays may have a filter of deliveries. The list of all
owners' tasks has an index.

A process of schema 0010 cancels a replay without an endpoint.
"""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"

DEAD = """UPDATE deliveries SET failed_since = finished_at, failed_at = finished_at,
    cause = coalesce((SELECT 'answered ' || max(status) FROM attempts
    WHERE delivery_id = deliveries.id), 'no response') WHERE state = 'dead'"""
FAILED = ("failed_at", "endpoint_id", "cause", "failed_since")


def upgrade() -> None:
    op.add_column("deliveries", sa.Column("cause", sa.String(length=64), nullable=True))
    for name in ("failed_since", "failed_at"):
        op.add_column("deliveries", sa.Column(name, sa.BigInteger(), nullable=True))
    op.add_column("deliveries", sa.Column("last_status", sa.Integer(), nullable=True))
    op.add_column("replays", sa.Column("filter", sa.JSON(none_as_null=True), nullable=True))
    op.add_column("replays", sa.Column("after", sa.String(length=40), nullable=True))
    op.add_column("attempts", sa.Column("endpoint_id", sa.String(length=40), nullable=True))
    op.create_index("ix_tasks_created_at_id", "tasks", ["created_at", "id"])
    op.create_index("ix_attempts_endpoint_id_time", "attempts", ["endpoint_id", "time"])
    _create("failures", *FAILED)
    _create("owner_failures", "owner", *FAILED)
    _create("failed_created_at", "owner", "created_at", "id")
    op.execute(DEAD)


def _create(name: str, *columns: str) -> None:
    condition = sa.text("cause IS NOT NULL")
    op.create_index(
        f"ix_deliveries_{name}",
        "deliveries",
        list(columns),
        unique=False,
        sqlite_where=condition,
        postgresql_where=condition,
    )
