"""Images on a host that is refused for now, and since when the same wrong bytes came."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("images", sa.Column("wrong_since", sa.BigInteger(), nullable=True))
    op.add_column("images", sa.Column("refused_host", sa.String(length=255), nullable=True))
    refused = sa.text("refused_host IS NOT NULL")
    op.create_index(
        "ix_images_refused_host",
        "images",
        ["refused_host"],
        unique=False,
        sqlite_where=refused,
        postgresql_where=refused,
    )
