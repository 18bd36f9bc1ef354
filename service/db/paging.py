"""Rows as queries return them, and pages by key, which are bounded in rows and in bytes."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Connection, RowMapping, Select, tuple_

Row = RowMapping | Mapping[str, Any]
After = tuple[int, str] | None  # time and id of the last row of the page before

Item = TypeVar("Item")
Key = TypeVar("Key")
PAGE_BYTES = (4 << 20) - 1024  # of all items of an answer, which is 4 MiB with what is around them
# Rows of the first statement, and of a further one: the more, the smaller the last ones were.
FIRST, BATCH, BATCH_BYTES = 2, 16, 256 << 10


@dataclass(frozen=True, slots=True)
class Owned:
    """The id of a row that has to be this owner's. `owner` None: any owner's (admin)."""

    id: str
    owner: str | None


@dataclass(frozen=True, slots=True)
class Selection:
    """Which rows a page has: of one owner (None: every owner's), created at or after `since` and
    before `until` (milliseconds, None: at any time), and after the last row of the page before.
    """

    owner: str | None = None
    limit: int | None = None
    after: After = None
    since: int | None = None
    until: int | None = None

    def narrow(self, statement: Select[Any], table: Any) -> Select[Any]:
        return matching(statement, table, owner=self.owner, since=self.since, until=self.until)


def conditions(
    table: Any, since: int | None = None, until: int | None = None, **values: object
) -> list[ColumnElement[bool]]:
    """Of rows with these column values, created at or after `since` and before `until`. None: any
    value, at any time.
    """
    clauses = [table.c[name] == value for name, value in values.items() if value is not None]
    if since is not None:
        clauses.append(table.c.created_at >= since)
    if until is not None:
        clauses.append(table.c.created_at < until)
    return clauses


def matching(statement: Select[Any], table: Any, **values: Any) -> Select[Any]:
    return statement.where(*conditions(table, **values))


def page(statement: Select[Any], table: Any, selection: Selection, key: str = "id") -> Select[Any]:
    """Newest first. A page costs the same at any depth of the list: databases look up the pair of
    time and `key` in an index, which they cannot do with the same condition as `OR`.
    """
    created, last = table.c.created_at, table.c[key]
    statement = selection.narrow(statement, table)
    if selection.after is not None:
        statement = statement.where(tuple_(created, last) < tuple_(*selection.after))
    return statement.order_by(created.desc(), last.desc()).limit(selection.limit)


def courtesy(connection: Connection) -> Callable[[], None]:
    """A function that a long read calls now and then: it returns once no urgent work is in hand."""
    give_way: Callable[[], None] = connection.info.get("give_way", lambda: None)
    return give_way


def in_batches(
    read: Callable[[Key, int], Sequence[Item]],
    key: Callable[[Item], Key],
    size: Callable[[Item], int],
    after: Key,
    limit: int,
    give_way: Callable[[], None] = lambda: None,
) -> Iterator[Item]:
    """At most `limit` items after a key. `read` takes a key and a number of rows. Rows are read a
    few at a time: each may have a MiB, which is up to 20 MiB while it is an object of Python. After
    each `BATCH_BYTES`, the thread gives way to more urgent work.
    """
    count, since = FIRST, 0
    while limit > 0:
        count = min(count, limit)
        items = read(after, count)
        yield from items
        if len(items) < count:
            return
        after, limit = key(items[-1]), limit - count
        read_bytes = sum(map(size, items))
        count = max(1, min(BATCH, BATCH_BYTES * count // max(1, read_bytes)))
        since += read_bytes
        if since >= BATCH_BYTES:
            since = 0
            give_way()


def that_fit(
    items: Iterable[Item], size: Callable[[Item], int], most: int
) -> tuple[list[Item], bool]:
    """The first items that have at most `most` bytes together, or the first one alone, and whether
    there are more. Takes no item from the iterable behind the first that does not fit.
    """
    fitting: list[Item] = []
    for item in items:
        most -= size(item)
        if most < 0 and fitting:
            return fitting, True
        fitting.append(item)
    return fitting, False
