"""The bodies of submissions that were sent before bodies went with their last use. They hold
prompts and, of early versions, callback tokens in clear.
"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"

tasks = sa.table("tasks", sa.column("state"), sa.column("body", sa.LargeBinary()))
UNSENT = ("queued", "submitting", "uncertain")  # a task in these may still be submitted


def upgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":  # otherwise the file keeps the bytes
        op.execute("PRAGMA secure_delete=ON")
    old = sa.and_(sa.func.length(tasks.c.body) > 0, tasks.c.state.not_in(UNSENT))
    op.execute(sa.update(tasks).where(old).values(body=b""))
