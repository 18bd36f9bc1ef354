"""The request that submitted a task, and the trace that the task belongs to."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    op.add_column("tasks", sa.Column("request_id", sa.String(64), nullable=True))
    for table in ("tasks", "events"):
        op.add_column(table, sa.Column("traceparent", sa.String(55), nullable=True))
