"""Endpoints know since when they have their status. NULL: since before this migration."""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    op.add_column("endpoints", sa.Column("status_since", sa.BigInteger(), nullable=True))
