"""The tables of input images: the owners' files, and the copies that an upstream has of them."""

from sqlalchemy import BigInteger, Boolean, Column, Integer, String, Table, Text

from service.db.tables import metadata

files = Table(
    "files",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("filename", Text, nullable=False),
    Column("media_type", String(64), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("width", Integer, nullable=False),
    Column("height", Integer, nullable=False),
    # NULL: not stored yet, or erased. The row stays until the sweep has looked for its blob.
    Column("blob", String(200)),
    Column("erased_at", BigInteger),
    Column("alpha", Boolean),  # NULL: not measured
)

# An upstream's copy of a file or of a result, by the id of either.
copies = Table(
    "copies",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("upstream", String(32), nullable=False),
    Column("file_id", String(200)),  # the upstream's
    Column("url", Text, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
)
