"""Statements on SQLite's driver do what they do through SQLAlchemy."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, event, select
from sqlalchemy.exc import IntegrityError

from service.db import prepared, schema
from service.db.integrity import begin
from service.db.prepared import run, run_many
from service.db.sqlite import new_engine
from service.db.tables import deliveries, tasks
from service.db.transaction import changing, inserting
from service.tasks.rows import TaskRow
from service.tasks.state import State
from service.tasks.task_queries import EARLIER

OWNER = "shop"


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[Connection]:
    begin(tmp_path / "store.db")
    engine = new_engine(tmp_path / "store.db", readonly=False)
    with engine.connect() as connection, connection.begin():
        schema.migrate(connection, allowed=True)
        yield connection


def task(number: int, **values: Any) -> dict[str, Any]:
    row = TaskRow(f"task_{number}", OWNER, "evolink", "m", State.QUEUED, 2**40, **values)
    row.idempotency_key = f"key {number}"
    return {name: getattr(row, name) for name in TaskRow.__slots__}


ROWS = (
    task(0),
    task(1, body=b"\0\xff", request={"a": ["ü\u2028", 1.5, None]}, warnings=[], resubmit=True),
    task(2, inputs=[{"url": "x"}], can_cancel=False, error={}),
)


def test_rows_are_written_and_read_with_the_types_of_their_columns(connection: Connection) -> None:
    run_many(connection, inserting(tasks), ROWS)
    changes = [{"row_id": f"task_{number}", "error": {"n": number}} for number in range(2)]
    run_many(connection, changing(tasks, frozenset({"error"})), changes)
    statement = select(*(tasks.c[name] for name in TaskRow.__slots__)).order_by(tasks.c.id)
    found = [list(row) for row in run(connection, statement)]
    assert found == [list(row) for row in connection.execute(statement)]
    expected = [{**row, **change} for row, change in zip(ROWS, (*changes, {}), strict=True)]
    assert found == [[row[name] for name in TaskRow.__slots__] for row in expected]


def test_a_column_that_no_row_names_has_its_default(connection: Connection) -> None:
    row = dict.fromkeys(("id", "owner", "event_id", "state"), "x") | {"created_at": 1}
    run_many(connection, inserting(deliveries), [row])
    assert connection.execute(select(deliveries.c.attempts, deliveries.c.fence)).all() == [(0, 0)]


def test_lists_of_any_length_find_their_rows(connection: Connection) -> None:
    run_many(connection, inserting(tasks), ROWS)
    for ids in range(6):
        for keys in range(4):
            names = [f"key {number}" for number in range(keys)]
            given = {
                "ids": [f"task_{number}" for number in range(ids)],
                "keys": [(OWNER, name) for name in names],
                "owners": [OWNER],
                "names": names,
            }
            found = [tuple(row) for row in run(connection, EARLIER, given)]
            assert found == [tuple(row) for row in connection.execute(EARLIER, given)]


def test_errors_of_the_driver_are_those_of_sqlalchemy(connection: Connection) -> None:
    with pytest.raises(IntegrityError) as raised:
        run_many(connection, inserting(tasks), [ROWS[0], ROWS[0]])
    assert isinstance(raised.value.orig, sqlite3.IntegrityError)


def test_a_row_without_a_name_of_the_first_one_is_refused(connection: Connection) -> None:
    nameless = {name: value for name, value in ROWS[1].items() if name != "owner"}
    with pytest.raises(KeyError, match="owner"):
        run_many(connection, inserting(tasks), [ROWS[0], nameless])


def test_who_listens_to_statements_hears_these_too(connection: Connection) -> None:
    heard = list[str]()
    event.listen(connection, "before_cursor_execute", lambda *args: heard.append(args[2]))
    run_many(connection, inserting(tasks), ROWS)
    assert run(connection, select(tasks.c.id).order_by(tasks.c.id).limit(1)) == [("task_0",)]
    assert len(heard) == 2


def test_few_plans_are_kept(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "KEPT", 3)
    for number in range(10):
        run(connection, select(tasks.c.id).where(tasks.c.id == str(number)))
    assert len(prepared._plans) <= 3
