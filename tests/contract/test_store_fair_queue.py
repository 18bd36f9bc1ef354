"""Owners take turns in submitting. One owner's flood delays another owner's task by about one
round.
"""

import sqlite3
from collections.abc import Sequence
from typing import Any

import pytest
from sqlalchemy import Connection, event, text

from service.db.sqlite import SqliteStore
from service.db.tables import tasks
from service.tasks.accept import insert_tasks
from service.tasks.admin import TaskResolution, resolve_tasks
from service.tasks.state import State
from service.tasks.task_queries import EARLIER, task_row
from tests.contract.subject import HOUR, MINUTE, SECOND, Subject, creates_nothing, doubts

pytestmark = pytest.mark.slow


async def flood(subject: Subject, owner: str, count: int) -> None:
    """Inserts this number of queued tasks of one owner."""
    for begin in range(0, count, 200):
        await subject.batch(
            insert_tasks, [subject.wish(owner=owner) for _ in range(min(200, count - begin))]
        )


async def served(subject: Subject, count: int) -> list[str]:
    """The owners of the next tasks, claimed one after another. Each task ends at once."""
    return [await serve(subject) for _ in range(count)]


async def serve(subject: Subject) -> str:
    (lease,) = await subject.claim("submit")
    await subject.cancel(lease.key)
    owner: str = (await subject.task(lease.key))["owner"]
    return owner


async def test_a_flood_delays_another_owners_task_by_one_turn(subject: Subject) -> None:
    """Two thousand tasks of one owner wait. Another owner's only task is among the next two."""
    await flood(subject, "flood", 2_000)
    await served(subject, 3)
    await subject.queued(owner="modest")
    assert "modest" in await served(subject, 2)


async def test_owners_that_wait_are_served_in_turn(subject: Subject) -> None:
    """A round has one task of each waiting owner, whatever their numbers and order of arrival."""
    for owner, count in (("a", 40), ("b", 10), ("c", 3)):
        await flood(subject, owner, count)
    for _ in range(3):
        assert sorted(await served(subject, 3)) == ["a", "b", "c"]
    assert sorted(await served(subject, 4)) == ["a", "a", "b", "b"]


async def test_an_owners_tasks_are_claimed_in_their_order(subject: Subject) -> None:
    """The tasks of other owners in between do not change that."""
    mine = []
    for _ in range(5):
        mine.append(await subject.queued(owner="a"))
        await flood(subject, "b", 3)
        subject.clock.shift(1)
    claimed = await subject.claim("submit", 20)
    rows = [await subject.task(lease.key) for lease in claimed]
    turns = {row["id"]: row["submit_turn"] for row in rows if row["owner"] == "a"}
    assert sorted(turns, key=turns.__getitem__) == mine
    assert len(set(turns.values())) == 5


async def test_an_owner_cannot_save_turns(subject: Subject) -> None:
    """An owner with one task at a time and an owner with a burst alternate from now on. Their past
    does not count.
    """
    for _ in range(20):
        await subject.queued(owner="steady")
        await subject.claim("submit")
    await flood(subject, "burst", 30)
    await subject.queued(owner="steady")
    assert "steady" in await served(subject, 3)


async def test_a_task_that_waits_long_does_not_let_a_new_owner_overtake(subject: Subject) -> None:
    """An old task that waits for its retry does not set the turns back. A new owner's burst
    alternates with the tasks that wait.
    """
    lease = await subject.submitting(owner="old")
    assert await subject.submission(lease, creates_nothing("429", HOUR, 2 * HOUR)) is State.QUEUED
    await flood(subject, "a", 100)
    await served(subject, 50)
    await flood(subject, "b", 100)
    assert sorted(await served(subject, 10)) == ["a"] * 5 + ["b"] * 5


@pytest.mark.parametrize("again", ["nothing was created", "uncertain", "sent again by hand"])
async def test_a_late_retry_that_is_due_does_not_let_a_new_owner_overtake(
    subject: Subject, again: str
) -> None:
    """A retry has an old turn. When it is due, a new owner's burst starts at the turn of the tasks
    that wait for their first attempt.
    """
    lease = await subject.submitting(owner="old")
    await subject.submission(
        lease,
        creates_nothing("429", MINUTE, HOUR)
        if again == "nothing was created"
        else doubts("no answer", MINUTE),
    )
    await flood(subject, "a", 100)
    await served(subject, 50)
    if again == "sent again by hand":
        assert await subject.write(resolve_tasks, TaskResolution(lease.key, resubmit=True)) is None
    subject.clock.shift(MINUTE)
    await flood(subject, "b", 100)
    assert await served(subject, 1) == ["old"]
    assert sorted(await served(subject, 10)) == ["a"] * 5 + ["b"] * 5


async def test_a_late_retry_that_is_leased_does_not_let_a_new_owner_overtake(
    subject: Subject,
) -> None:
    """All other tasks wait for their retries, and the leased retry has an old turn. A new owner's
    burst alternates with them.
    """
    lease = await subject.submitting(owner="old")
    await subject.submission(lease, creates_nothing("429", SECOND, HOUR))
    await flood(subject, "a", 60)
    await served(subject, 40)
    for refused in await subject.claim("submit", 20):
        await subject.start(refused)
        await subject.submission(refused, creates_nothing("429", MINUTE, HOUR))
    subject.clock.shift(SECOND)
    again = await subject.claimed("submit", lease.key)
    await flood(subject, "b", 20)
    await subject.cancel(again.key)
    subject.clock.shift(MINUTE)
    assert sorted(await served(subject, 10)) == ["a"] * 5 + ["b"] * 5


async def test_a_late_retry_does_not_help_its_owners_burst_to_overtake(subject: Subject) -> None:
    """The burst starts after the owner's last turn, and not before the current turn."""
    lease = await subject.submitting(owner="b")
    assert await subject.submission(lease, creates_nothing("429", HOUR, 2 * HOUR)) is State.QUEUED
    await flood(subject, "a", 100)
    await served(subject, 50)
    await flood(subject, "b", 100)
    assert sorted(await served(subject, 10)) == ["a"] * 5 + ["b"] * 5


async def test_a_new_owner_is_among_the_first_after_all_tasks_were_refused(
    subject: Subject,
) -> None:
    """The upstream accepts nothing for a while. The new owner's task is claimed as early as the
    refused ones.
    """
    await flood(subject, "a", 40)
    for lease in await subject.claim("submit", 40):
        await subject.start(lease)
        await subject.submission(lease, creates_nothing("429", MINUTE, HOUR))
    await subject.queued(owner="b")
    subject.clock.shift(MINUTE)
    assert "b" in await served(subject, 2)


async def test_refused_tasks_do_not_go_before_a_new_owners_task(subject: Subject) -> None:
    """A task that got a 429 goes behind its owner's other tasks, but before the owner's later ones.
    A new owner waits for one turn.
    """
    await flood(subject, "a", 60)
    for lease in await subject.claim("submit", 40):
        await subject.start(lease)
        await subject.submission(lease, creates_nothing("429", MINUTE, HOUR))
    subject.clock.shift(MINUTE)
    await subject.queued(owner="b")
    assert "b" in await served(subject, 3)
    await subject.queued(owner="a")
    again = [
        row["submit_turn"]
        for row in await subject.rows(tasks)
        if row["submit_attempts"] and row["owner"] == "a"
    ]
    last = max(row["submit_turn"] for row in await subject.rows(tasks) if row["owner"] == "a")
    assert max(again) < last


async def test_a_new_task_takes_no_place_before_due_tasks(subject: Subject) -> None:
    """A free place goes to the task whose turn it is. A new task is leased at once only when no
    task waits.
    """
    subject.places.free["submit"] = 1
    first = await subject.queued(owner="a")
    assert [lease.key for lease in subject.places.new_leases()] == [first]
    waiting = await subject.queued(owner="b")
    subject.places.free["submit"] = 2
    late = await subject.queued(owner="a")
    assert subject.places.new_leases() == []
    assert "submit" in subject.places.transactions[-1].due
    for key in (waiting, late):
        assert [lease.key for lease in await subject.claim("submit")] == [key]


async def test_an_uncertain_task_has_had_its_turn(subject: Subject) -> None:
    """It may have been charged and waits for proof. Its owner's next task does not wait behind
    it.
    """
    await subject.uncertain(owner="a")
    row = await subject.task(await subject.queued(owner="a"))
    assert row["submit_turn"] == 0


async def test_indexes_find_the_next_task_and_an_owners_last_turn(
    sqlite_store: SqliteStore,
) -> None:
    """SQLite sorts no rows for a claim or an insert, with any number of waiting tasks."""

    def plan(connection: Connection, statements: Sequence[str]) -> list[str]:
        return [
            str(row)
            for statement in statements
            for row in connection.execute(text(f"EXPLAIN QUERY PLAN {statement}"))
        ]

    next_one = (
        "SELECT id FROM tasks WHERE submit_due_at <= 1 AND (submit_lease_until IS NULL OR"
        " submit_lease_until <= 1)"
    )
    last = (
        "SELECT submit_turn FROM tasks WHERE owner = 'a' AND submit_due_at IS NOT NULL AND"
        " state IN ('queued', 'submitting')"
    )
    statements = [
        f"{next_one} ORDER BY submit_turn LIMIT 3",
        f"{last} ORDER BY submit_turn DESC LIMIT 1",
    ]
    found = await sqlite_store.read(plan, statements)
    assert len(found) == 2
    assert "ix_tasks_submit_due_at" in found[0]
    assert "ix_tasks_owner_submit_turn" in found[1]


async def test_tasks_of_one_batch_get_the_same_turns_as_alone(subject: Subject) -> None:
    wishes = [subject.wish(owner=owner) for owner in "aabab"]
    await subject.batch(insert_tasks, wishes)
    rows = {row["id"]: row["submit_turn"] for row in await subject.rows(tasks)}
    assert [rows[wish.id] for wish in wishes] == [0, 1, 0, 2, 1]
    await subject.batch(insert_tasks, wishes)  # repeated after a lost response to the commit
    assert {row["id"]: row["submit_turn"] for row in await subject.rows(tasks)} == rows
    subject.clock.shift(SECOND)
    row = await subject.task(await subject.queued(owner="a"))
    assert row["submit_turn"] == 3


async def test_indexes_find_earlier_tasks_and_one_by_the_upstreams_id(
    sqlite_store: SqliteStore,
) -> None:
    """SQLite reads no other task of the owner, with several idempotency keys in one batch too."""

    def plan(connection: Connection) -> list[str]:
        found = []

        @event.listens_for(connection, "before_cursor_execute")
        def explained(
            _: object, cursor: sqlite3.Cursor, statement: str, parameters: Any, *__: object
        ) -> None:
            found.extend(cursor.execute(f"EXPLAIN QUERY PLAN {statement}", parameters).fetchall())

        keys = [("a", "first"), ("a", "second")]
        names = ["first", "second"]
        given = {"ids": ["task_1"], "keys": keys, "owners": ["a"], "names": names}
        connection.execute(EARLIER, given)
        task_row(connection, "task-unified-1", "a")
        return [row[3] for row in found]

    plans = await sqlite_store.read(plan)
    assert any("owner=? AND idempotency_key=?" in line for line in plans)
    assert any("upstream_id=?" in line for line in plans)
    assert not [line for line in plans if line.startswith("SCAN tasks") or "(owner=?)" in line]
