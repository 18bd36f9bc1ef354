"""Files in the store: the input images of owners, and the copies that an upstream has of them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from sqlalchemy import Connection, Select, delete, select, update

from service.db.file_tables import copies
from service.db.file_tables import files as file_table
from service.db.paging import Owned, Selection, matching, page
from service.db.transaction import Transaction, one_by_one
from service.ids import rfc3339
from service.strict_json import JSON

FILES = 50  # files that one transaction of retention takes
ROW_MS = 7 * 86_400_000  # how long the row of a file that is gone stays


@dataclass(slots=True)
class FileRow:
    """A row of `files`, one attribute per column. `blob` None: not stored yet, or erased."""

    id: str
    owner: str
    created_at: int
    expires_at: int
    filename: str
    media_type: str
    bytes: int
    sha256: str
    width: int
    height: int
    blob: str | None = None
    erased_at: int | None = None
    alpha: bool | None = None


@dataclass(frozen=True, slots=True)
class InputCopy:
    """A row of `copies`: where the upstream has an input image, and until when."""

    id: str
    owner: str
    upstream: str
    file_id: str | None
    url: str
    expires_at: int


@dataclass(frozen=True, slots=True)
class InputImage:
    """An input image of a submission. Only the URL of a public link is known."""

    id: str | None = None
    url: str | None = None
    sha256: str | None = None
    width: int | None = None
    height: int | None = None


@dataclass(frozen=True, slots=True)
class NamedInput:
    """An entry of `image_urls`: its image, as the stored body names it (an id or a public link),
    and as the client named it. Of a `data:` URL both are the id of the file that was `made` of it.
    """

    image: InputImage
    stored: str
    shown: str
    made: bool = False


FILE_COLUMNS = [file_table.c[field.name] for field in fields(FileRow)]


def file_document(row: FileRow) -> JSON:
    names = ("id", "filename", "media_type", "bytes", "width", "height", "sha256")
    times = {"created": row.created_at // 1000, "expires_at": rfc3339(row.expires_at)}
    return {"object": "file", **{name: getattr(row, name) for name in names}, **times}


def select_files(now: int) -> Select[Any]:
    """The files that are stored and have not expired."""
    c = file_table.c
    return select(*FILE_COLUMNS).where(c.blob.is_not(None), c.expires_at > now)


def file_rows(connection: Connection, statement: Select[Any]) -> list[FileRow]:
    return [FileRow(*row) for row in connection.execute(statement)]


def stored_file(
    connection: Connection, file_id: str, owner: str | None, now: int
) -> FileRow | None:
    """A file that is stored and has not expired. `owner` None: any owner's."""
    statement = matching(select_files(now), file_table, id=file_id, owner=owner)
    return next(iter(file_rows(connection, statement)), None)


def file_list(connection: Connection, wanted: Selection, now: int) -> list[FileRow]:
    return file_rows(connection, page(select_files(now), file_table, wanted))


@one_by_one
def insert_files(tx: Transaction, item: FileRow) -> None:
    """Inserts a file before its blob is stored, so that the sweep knows it."""
    tx.insert(file_table, asdict(item) | {"blob": None})


@one_by_one
def store_files(tx: Transaction, item: FileRow) -> None:
    """Names the blob of a file. It is stored from now on."""
    tx.change(file_table, item.id, {"blob": item.blob})


@dataclass(frozen=True, slots=True)
class ErasedFile:
    """The objects to delete after the commit: the blob, and the upstream's copy."""

    blob: str
    copy: InputCopy | None


@one_by_one
def erase_files(tx: Transaction, item: Owned) -> ErasedFile | None:
    """Erases a file with everything that came from its owner. None: there is no such file."""
    c = file_table.c
    stored = select(c.blob).where(c.blob.is_not(None))
    statement = matching(stored, file_table, id=item.id, owner=item.owner)
    blob = tx.connection.execute(statement.with_for_update()).scalar()
    if blob is None:
        return None
    tx.change(file_table, item.id, _gone(tx))
    tx.write()  # the next item may name the same file
    return ErasedFile(blob, next(iter(forget_copies(tx, [item.id])), None))


def _gone(tx: Transaction) -> JSON:
    """The row stays, so that the sweep knows the owner of a blob that it finds."""
    return {"blob": None, "erased_at": tx.now, "filename": "", "sha256": ""}


@one_by_one
def forget_files(tx: Transaction, before: int) -> list[str]:
    """Erases files whose days were over by this time, at most FILES. Returns their blobs, which
    are deleted after the commit.
    """
    c = file_table.c
    old = select(c.id, c.blob).where(c.expires_at <= before, c.blob.is_not(None))
    oldest = old.order_by(c.expires_at).limit(FILES).with_for_update(skip_locked=True)
    rows = list(tx.connection.execute(oldest))
    ids = [row.id for row in rows]
    tx.connection.execute(update(file_table).where(c.id.in_(ids)).values(_gone(tx)))
    tx.connection.execute(delete(copies).where(copies.c.id.in_(ids)))
    return [row.blob for row in rows]


@one_by_one
def forget_file_rows(tx: Transaction, before: int) -> None:
    """Deletes the rows of files that are gone, and copies that the upstream has no more."""
    old = file_table.c.expires_at <= before - ROW_MS
    tx.connection.execute(delete(file_table).where(old, file_table.c.blob.is_(None)))
    tx.connection.execute(delete(copies).where(copies.c.expires_at <= before))


def forget_copies(tx: Transaction, ids: Sequence[str]) -> list[InputCopy]:
    """Removes the rows of the upstream's copies of these files and results. The caller deletes the
    copies after the commit.
    """
    gone = list(input_copies(tx.connection, ids).values())
    tx.connection.execute(delete(copies).where(copies.c.id.in_(ids)))
    return gone


def input_copies(connection: Connection, ids: Sequence[str]) -> dict[str, InputCopy]:
    columns = [copies.c[field.name] for field in fields(InputCopy)]
    rows = connection.execute(select(*columns).where(copies.c.id.in_(ids)))
    return {row.id: InputCopy(*row) for row in rows}
