"""Endpoints have an order, a filter, static headers and a rate. A delivery has its key and place
in that order, and the time that the rate gave it. NULL: none of them, as in old rows.
"""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"


def upgrade() -> None:
    op.add_column("endpoints", sa.Column("options", sa.JSON(none_as_null=True), nullable=True))
    op.add_column("endpoints", sa.Column("headers", sa.LargeBinary(), nullable=True))
    for name in ("slot_at", "recovered_at"):
        op.add_column("endpoints", sa.Column(name, sa.BigInteger(), nullable=True))
    op.add_column("deliveries", sa.Column("order_key", sa.String(64), nullable=True))
    for name in ("sequence", "slot_at"):
        op.add_column("deliveries", sa.Column(name, sa.BigInteger(), nullable=True))
    ordered = sa.text("order_key IS NOT NULL")
    op.create_index(
        "ix_deliveries_ordered",
        "deliveries",
        ["endpoint_id", "order_key", "state", "sequence"],
        sqlite_where=ordered,
        postgresql_where=ordered,
    )
