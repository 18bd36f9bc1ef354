"""Single numbers of the store, by name, and the sequences that they give out."""

from collections.abc import Sequence

from sqlalchemy import Connection, Table, bindparam, insert, select, update

from service.db.paging import Row, matching
from service.db.prepared import run
from service.db.tables import counters
from service.db.transaction import Transaction
from service.strict_json import JSON


def counter(connection: Connection, name: str) -> int:
    """0: no row has the name."""
    return connection.scalar(select(counters.c.value).where(counters.c.name == name)) or 0


def set_counter(tx: Transaction, name: str, value: int) -> bool:
    """Sets a counter, and adds its row if it is missing. False: it had that value."""
    locked = select(counters.c.value).where(counters.c.name == name).with_for_update()
    current = tx.connection.scalar(locked)
    if (current or 0) == value:
        return False
    if current is None:
        tx.connection.execute(insert(counters).values(name=name, value=value))
    else:
        named = counters.c.name == name
        tx.connection.execute(update(counters).where(named).values(value=value))
    return True


_RAISING = (
    update(counters)
    .where(counters.c.name == bindparam("counter"))
    .values(value=counters.c.value + bindparam("by"))
    .returning(counters.c.value)
)


def number(tx: Transaction, name: str, rows: Sequence[JSON]) -> None:
    """Gives rows the next numbers of a sequence. The counter's row stays locked until the commit,
    so that rows become visible in the order of their numbers, with any number of writers.
    """
    values = {"counter": name, "by": len(rows)}
    ((last,),) = run(tx.connection, _RAISING, values)
    for sequence, row in enumerate(rows, last - len(rows) + 1):
        row["sequence"] = sequence


def numbered_page(
    connection: Connection,
    /,
    table: Table,
    after: str | None,
    limit: int,
    sees: str | None = None,
    **where: str | None,
) -> list[Row] | None:
    """Rows of a sequence in their order, after the row with this id. None: there is no such row
    that the owner `sees` has.
    """
    statement = matching(select(table), table, **where)
    if after is not None:
        query = matching(select(table.c.sequence), table, id=after, owner=sees)
        if (sequence := connection.scalar(query)) is None:
            return None
        statement = statement.where(table.c.sequence > sequence)
    return list(connection.execute(statement.order_by(table.c.sequence).limit(limit)).mappings())
