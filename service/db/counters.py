"""Single numbers of the store, by name, and the sequences that they give out."""

from sqlalchemy import Connection, bindparam, insert, select, update

from service.db.prepared import run
from service.db.tables import counters
from service.db.transaction import Transaction


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


def next_numbers(tx: Transaction, name: str, count: int) -> range:
    """The next numbers of a sequence. The counter's row stays locked until the commit, so that
    rows become visible in the order of their numbers, with any number of writers.
    """
    ((last,),) = run(tx.connection, _RAISING, {"counter": name, "by": count})
    return range(last - count + 1, last + 1)
