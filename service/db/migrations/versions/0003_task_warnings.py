"""Warnings about a submission's fields."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("tasks", sa.Column("warnings", sa.JSON(), nullable=True))
