"""Owners take turns in submitting: one owner's flood delays another's task by about a round."""

from collections.abc import Sequence

import pytest
from sqlalchemy import Connection, text

from service.db.sqlite import SqliteStore
from service.db.tables import tasks
from service.tasks.accept import insert_tasks
from service.tasks.admin import TaskResolution, resolve_tasks
from service.tasks.state import State
from tests.contract.subject import HOUR, MINUTE, SECOND, Subject, creates_nothing, doubts


async def flood(subject: Subject, owner: str, count: int) -> None:
    """That many tasks of one owner, which nobody has a place for."""
    for begin in range(0, count, 200):
        await subject.batch(
            insert_tasks, [subject.wish(owner=owner) for _ in range(min(200, count - begin))]
        )


async def served(subject: Subject, count: int) -> list[str]:
    """The owners of the next tasks, one claimed after the other; each is taken by the upstream at
    once.
    """
    return [await serve(subject) for _ in range(count)]


async def serve(subject: Subject) -> str:
    (lease,) = await subject.claim("submit")
    await subject.cancel(lease.key)
    owner: str = (await subject.task(lease.key))["owner"]
    return owner


async def test_a_flood_delays_anothers_task_by_one_turn(subject: Subject) -> None:
    """Ten thousand tasks of one owner wait: another's single one is among the next two."""
    await flood(subject, "flood", 10_000)
    await served(subject, 3)
    await subject.queued(owner="modest")
    assert "modest" in await served(subject, 2)


async def test_owners_that_wait_are_served_in_turn(subject: Subject) -> None:
    """However many each has, and whoever came first: a round has one of everybody who waits."""
    for owner, count in (("a", 40), ("b", 10), ("c", 3)):
        await flood(subject, owner, count)
    for _ in range(3):
        assert sorted(await served(subject, 3)) == ["a", "b", "c"]
    assert sorted(await served(subject, 4)) == ["a", "a", "b", "b"]


async def test_an_owners_own_tasks_are_sent_in_their_order(subject: Subject) -> None:
    """First come, first served, whatever others do between."""
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


async def test_nobody_saves_turns_up(subject: Subject) -> None:
    """Who has always one task on its way and who now comes with many alternate from now on: the
    past counts for neither.
    """
    for _ in range(20):
        await subject.queued(owner="steady")
        await subject.claim("submit")
    await flood(subject, "burst", 30)
    await subject.queued(owner="steady")
    assert "steady" in await served(subject, 3)


async def test_a_straggler_lets_nobody_overtake(subject: Subject) -> None:
    """An old task that waits for its time long does not set the clock back: a newcomer's burst is
    served alternately with who waits.
    """
    lease = await subject.submitting(owner="old")
    assert await subject.submission(lease, creates_nothing("429", HOUR, 2 * HOUR)) is State.QUEUED
    await flood(subject, "a", 100)
    await served(subject, 50)
    await flood(subject, "b", 100)
    assert sorted(await served(subject, 10)) == ["a"] * 5 + ["b"] * 5


@pytest.mark.parametrize("again", ["nothing was created", "uncertain", "sent again by hand"])
async def test_a_straggler_that_is_due_lets_nobody_overtake(subject: Subject, again: str) -> None:
    """What is sent again has a turn of long ago: once it is due, a newcomer's burst begins with
    those who wait for their first.
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


async def test_a_straggler_on_its_way_lets_nobody_overtake(subject: Subject) -> None:
    """All others wait for their time, and the one that is sent again has a turn of long ago: a
    newcomer alternates with the others.
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


async def test_a_straggler_helps_none_of_its_owners_tasks_to_overtake(subject: Subject) -> None:
    """An owner's burst stands behind its own last, and not before where submitting stands."""
    lease = await subject.submitting(owner="b")
    assert await subject.submission(lease, creates_nothing("429", HOUR, 2 * HOUR)) is State.QUEUED
    await flood(subject, "a", 100)
    await served(subject, 50)
    await flood(subject, "b", 100)
    assert sorted(await served(subject, 10)) == ["a"] * 5 + ["b"] * 5


async def test_while_all_wait_for_their_time_a_newcomer_is_among_the_first(
    subject: Subject,
) -> None:
    """An upstream that takes nothing for a while: whoever comes then is served as soon as those who
    were refused.
    """
    await flood(subject, "a", 40)
    for lease in await subject.claim("submit", 40):
        await subject.start(lease)
        await subject.submission(lease, creates_nothing("429", MINUTE, HOUR))
    await subject.queued(owner="b")
    subject.clock.shift(MINUTE)
    assert "b" in await served(subject, 2)


async def test_what_was_refused_by_the_hundred_is_not_served_first(subject: Subject) -> None:
    """Whoever is told 429 goes behind its owner's others, but keeps its place before what comes
    later: a newcomer waits for one turn.
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


async def test_a_new_task_takes_no_place_before_those_that_are_due(subject: Subject) -> None:
    """A free place goes to whoever's turn it is: new tasks are leased at birth only when nobody
    waits.
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
    """What may have been charged waits for proof: its owner's next task does not wait behind it."""
    await subject.uncertain(owner="a")
    row = await subject.task(await subject.queued(owner="a"))
    assert row["submit_turn"] == 0


async def test_a_claim_and_an_insert_sort_nothing(sqlite_store: SqliteStore) -> None:
    """With thousands that wait the next is found through the index on SQLite, and so is an owner's
    last.
    """

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


async def test_turns_are_given_within_a_batch_as_one_by_one(subject: Subject) -> None:
    """Tasks that are committed together get the turns they would have got alone."""
    wishes = [subject.wish(owner=owner) for owner in "aabab"]
    await subject.batch(insert_tasks, wishes)
    rows = {row["id"]: row["submit_turn"] for row in await subject.rows(tasks)}
    assert [rows[wish.id] for wish in wishes] == [0, 1, 0, 2, 1]
    await subject.batch(insert_tasks, wishes)  # run again after a lost commit
    assert {row["id"]: row["submit_turn"] for row in await subject.rows(tasks)} == rows
    subject.clock.shift(SECOND)
    row = await subject.task(await subject.queued(owner="a"))
    assert row["submit_turn"] == 3
