"""The inbox: callbacks that are committed and wait for their verdict. Rows are only inserted and
deleted.
"""

from sqlalchemy import BigInteger, Column, Integer, LargeBinary, String, Table

from service.db.tables import metadata

inbox = Table(
    "inbox",
    metadata,
    # The order of arrival. A callback that follows the response to another one has a larger number.
    Column("sequence", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("id", String(40), nullable=False),  # the callback's
    Column("task_id", String(40), nullable=False, index=True),
    Column("upstream", String(32), nullable=False),  # whose module reads the body
    Column("received_at", BigInteger, nullable=False),
    Column("size", Integer, nullable=False),  # of the body as it came
    Column("digest", String(64), nullable=False),  # of the body as it came
    Column("body", LargeBinary, nullable=False),  # the beginning of a body that is too large
)
