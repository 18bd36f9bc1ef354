"""Whether an input image has an alpha channel: some models take no such image."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.add_column("files", sa.Column("alpha", sa.Boolean(), nullable=True))
