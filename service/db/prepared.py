"""Runs the statements that most transactions have. On SQLite each is compiled once and goes to the
driver: SQLAlchemy takes five times as long around such a statement as SQLite takes for it.

A statement that comes here is made once, and binds all that changes. Its lists hold text or tuples
of text.
"""

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.types import TupleType

Given = Mapping[str, Any]
DRIVER = "driver"  # in `Connection.info`: the driver's connection, if statements go to it
NOTHING: Given = {}
KEPT = 1000  # plans


def run(connection: Connection, statement: Any, given: Given = NOTHING) -> Sequence[Any]:
    """Runs a statement. Returns its rows, each a sequence."""
    if (driver := _driver(connection)) is None:
        result = connection.execute(statement, given)
        return result.all() if result.returns_rows else ()
    given = {name: _padded(v) if isinstance(v, list) else v for name, v in given.items()}
    lengths = [len(value) for value in given.values() if isinstance(value, list)]
    plan = _plan(connection, statement, given, *lengths)
    return plan.read(_call(driver.execute, plan.sql, plan.bound(given)))


def run_mappings(
    connection: Connection, statement: Any, given: Given = NOTHING
) -> list[dict[str, Any]]:
    """Runs a statement. Returns its rows, each with its values by name."""
    names = statement.exported_columns.keys()
    return [dict(zip(names, row, strict=True)) for row in run(connection, statement, given)]


def run_many(connection: Connection, statement: Any, rows: Sequence[Given]) -> None:
    """Runs a statement for each of the rows, which bind the same names."""
    if (driver := _driver(connection)) is None:
        connection.execute(statement, rows)
    else:
        plan = _plan(connection, statement, rows[0])
        _call(driver.executemany, plan.sql, map(plan.bound, rows))


def begin(connection: Connection, sql: str) -> None:
    """Begins a transaction with this statement. SQLAlchemy takes part from its own first one on."""
    if (driver := _driver(connection)) is None:
        connection.begin()
    else:
        _call(driver.execute, sql, ())


def commit(connection: Connection) -> None:
    """Ends what `begin` began, for SQLAlchemy and for the driver."""
    connection.commit()
    if (driver := _driver(connection)) is not None and driver.in_transaction:
        _call(driver.execute, "COMMIT", ())


def roll_back(connection: Connection) -> None:
    connection.rollback()
    connection.info[DRIVER].rollback()


def _call(execute: Callable[[str, Any], sqlite3.Cursor], sql: str, values: Any) -> list[Any]:
    """Calls the driver. Its errors become SQLAlchemy's."""
    try:
        return execute(sql, values).fetchall()
    except sqlite3.Error as error:
        raise DBAPIError.instance(sql, None, error, sqlite3.Error, hide_parameters=True) from error


def _driver(connection: Connection) -> sqlite3.Connection | None:
    """None: SQLAlchemy runs the statement, on PostgreSQL or because a test listens to it."""
    listened = connection.dispatch.before_cursor_execute or connection.dispatch.commit
    driver: sqlite3.Connection | None = connection.info.get(DRIVER)
    return None if listened else driver


def _padded(values: list[Any]) -> list[Any]:
    """The list with its last value repeated up to a power of two, so that few plans do for all."""
    return values + values[-1:] * ((1 << (len(values) - 1).bit_length()) - len(values))


class _Plan:
    """A compiled statement, for lists of the lengths of those given."""

    def __init__(self, connection: Connection, statement: Any, given: Given) -> None:
        dialect = connection.dialect
        names, many = list(given), statement.is_insert
        compiled = statement.compile(dialect=dialect, column_keys=names, for_executemany=many)
        state = compiled.construct_expanded_state(given)
        self.sql: str = state.statement
        self._order: Sequence[str] = state.positiontup
        self._lists = [each for each in state.parameter_expansion.items() if each[0] in given]
        defaults = {column.key: column.default.arg for column in compiled.insert_prefetch}
        values = {**state.parameters, **defaults}
        self._constants = {name: value for name, value in values.items() if name not in given}
        types = {name: bind.type for name, bind in compiled.binds.items()}
        self._tuples = {name for name, type in types.items() if isinstance(type, TupleType)}
        self._binds = [
            (name, process)
            for name in values.keys() & types.keys()
            if (process := types[name].dialect_impl(dialect).bind_processor(dialect))
        ]
        self._results = [
            (index, process)
            for index, column in enumerate(statement.exported_columns)
            if (process := column.type.dialect_impl(dialect).result_processor(dialect, None))
        ]

    def bound(self, given: Given) -> list[Any]:
        """The values in the order of the statement."""
        values = {**self._constants, **given}
        for name, process in self._binds:
            values[name] = process(values[name])
        for name, parts in self._lists:
            of_list = chain(*given[name]) if name in self._tuples else given[name]
            values.update(zip(parts, of_list, strict=True))
        return [values[name] for name in self._order]

    def read(self, rows: list[Any]) -> list[Any]:
        """The driver's rows with the values of the columns' types."""
        if not self._results:
            return rows
        read = [list(row) for row in rows]
        for index, process in self._results:
            for row in read:
                row[index] = process(row[index])
        return read


_plans: dict[Any, _Plan] = {}


def _plan(connection: Connection, statement: Any, given: Given, *lengths: int) -> _Plan:
    key = statement, connection.dialect, *given, *lengths
    if (plan := _plans.get(key)) is None:
        if len(_plans) >= KEPT:
            _plans.clear()
        plan = _plans[key] = _Plan(connection, statement, given)
    return plan
