"""Claims pass over owners that use their whole share. Waiting deliveries are brought forward.

A process of schema 0005 takes a replay of undelivered events for one of dead deliveries.
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("replays", sa.Column("pending", sa.Boolean(), nullable=True))
    op.add_column("deliveries", sa.Column("planned_at", sa.BigInteger(), nullable=True))
    for stage, wanting in (
        ("deliver", "attempts = 0 AND replay_id IS NULL"),
        ("redeliver", "(attempts > 0 OR replay_id IS NOT NULL)"),
    ):
        _create(f"{stage}_due_at_owner", ["due_at", "owner"], f"due_at IS NOT NULL AND {wanting}")
    waiting = "due_at IS NOT NULL AND endpoint_id IS NOT NULL"
    _create("endpoint_id_due_at", ["endpoint_id", "due_at"], waiting)


def _create(name: str, columns: list[str], where: str) -> None:
    condition = sa.text(where)
    op.create_index(
        f"ix_deliveries_{name}",
        "deliveries",
        columns,
        unique=False,
        sqlite_where=condition,
        postgresql_where=condition,
    )
