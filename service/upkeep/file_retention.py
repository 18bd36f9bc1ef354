"""The SQL of the retention of input images.

A file is erased when its days are over. Its row stays for as long again, so that the sweep knows
the owner of a blob that it finds.
"""

from sqlalchemy import delete, select, update

from service.db.file_tables import copies, files
from service.db.transaction import Transaction, one_by_one

FILES = 50  # rows that one transaction takes
ROW_MS = 7 * 86_400_000  # how long the row of a file that is gone stays


@one_by_one
def forget_files(tx: Transaction, before: int) -> list[str]:
    """Erases files whose days were over by this time, at most FILES. Returns their blobs, which
    are deleted after the commit.
    """
    old = select(files.c.id, files.c.blob).where(
        files.c.expires_at <= before, files.c.blob.is_not(None)
    )
    oldest = old.order_by(files.c.expires_at).limit(FILES).with_for_update(skip_locked=True)
    rows = list(tx.connection.execute(oldest))
    ids = [row.id for row in rows]
    gone = {"blob": None, "erased_at": tx.now, "filename": "", "sha256": ""}
    tx.connection.execute(update(files).where(files.c.id.in_(ids)).values(gone))
    tx.connection.execute(delete(copies).where(copies.c.id.in_(ids)))
    return [row.blob for row in rows]


@one_by_one
def forget_file_rows(tx: Transaction, before: int) -> None:
    """Deletes the rows of files that are gone, and copies that the upstream has no more."""
    old = files.c.expires_at <= before - ROW_MS
    tx.connection.execute(delete(files).where(old, files.c.blob.is_(None)))
    tx.connection.execute(delete(copies).where(copies.c.expires_at <= before))
