"""Since when a completed task lacks results."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("tasks", sa.Column("incomplete_since", sa.BigInteger(), nullable=True))
