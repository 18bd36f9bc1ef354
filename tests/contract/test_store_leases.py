"""Leases and fences (design, decision 1): who works on which row, until when."""

import asyncio
from collections.abc import Sequence

import pytest
from sqlalchemy import text

from service.db.queues import QUEUES
from service.db.tables import deliveries, tasks
from service.db.transaction import Transaction
from service.queue import leases
from service.tasks.accept import insert_tasks
from service.tasks.callbacks import accept_callbacks
from service.tasks.rows import TaskRow
from service.tasks.state import State
from tests.contract.subject import (
    HOUR,
    LEASE,
    MINUTE,
    SECOND,
    Clock,
    Opener,
    Subject,
    callback,
    completed,
    stored,
)

URL = "https://r.test/0"


async def one_due(subject: Subject, stage: str) -> str:
    """A row that is due for a stage and leased to nobody."""
    match stage:
        case "submit":
            return await subject.queued()
        case "settle":
            task_id = await subject.submitted()
            await subject.callback(task_id, None, b"<html>")
            return task_id
        case "reconcile":
            task_id = await subject.submitted()
            subject.clock.now = (await subject.task(task_id))["settle_due_at"]
            return task_id
        case "download":
            return str((await subject.images(await subject.storing(URL)))[0]["id"])
        case "replay":
            return await subject.replay()
        case _:
            endpoint = await subject.endpoint()
            await subject.submitted()
            (delivery,) = await subject.rows(deliveries, endpoint_id=endpoint)
            if stage == "redeliver":
                await subject.attempt(await subject.claimed("deliver", delivery["id"]), "retry")
            return str(delivery["id"])


@pytest.mark.parametrize("stage", QUEUES)
async def test_a_lease_lasts_thirty_seconds(subject: Subject, stage: str) -> None:
    """At 29.999 s another gets nothing, once it is over everything, with the next fence and
    attempt, and a death counted.
    """
    key = await one_due(subject, stage)
    (lease,) = await subject.claim(stage)
    assert (lease.stage, lease.key) == (stage, key)
    subject.clock.shift(29_999)
    assert await subject.claim(stage) == []
    subject.clock.shift(1)
    stage = (
        "redeliver" if stage == "deliver" else stage
    )  # an attempt was begun: what follows is a retry
    (again,) = await subject.claim(stage)
    assert (again.key, again.fence, again.attempts) == (key, lease.fence + 1, lease.attempts + 1)
    queue = QUEUES[stage]
    row = await subject.row(queue.table, key)
    assert (row[queue.prefix + "deaths"], row[queue.prefix + "lease_owner"]) == (1, "one")


@pytest.mark.parametrize("stage", QUEUES)
async def test_a_renewed_lease_lasts_thirty_seconds_more(subject: Subject, stage: str) -> None:
    """Renewed every 10 s while a call runs; who lost it is told, and gets it back by nothing."""
    await one_due(subject, stage)
    (lease,) = await subject.claim(stage)
    for _ in range(5):
        subject.clock.shift(10 * SECOND)
        assert await subject.write(leases.renew, lease)
    stage = "redeliver" if stage == "deliver" else stage
    subject.clock.shift(LEASE - 1)
    assert await subject.claim(stage) == []
    subject.clock.shift(1)
    assert len(await subject.claim(stage)) == 1
    assert not await subject.write(leases.renew, lease)


async def test_renewing_never_shortens_a_lease(subject: Subject) -> None:
    """A submission's lease outlasts its call, whether it can be renewed in that time or not."""
    lease = await subject.submitting()
    subject.clock.shift(10 * SECOND)
    assert await subject.write(leases.renew, lease)
    subject.clock.shift(60 * SECOND - 1)
    assert await subject.claim("submit") == []
    assert await subject.write(leases.renew, lease)
    subject.clock.shift(LEASE - 1)
    assert await subject.claim("submit") == []
    subject.clock.shift(1)
    assert len(await subject.claim("submit")) == 1


async def test_a_claim_takes_what_is_due_and_no_more_than_there_are_places(
    subject: Subject,
) -> None:
    """The longest due first; the rest stays due; without a place nothing is claimed."""
    keys = []
    for _ in range(5):
        keys.append(await subject.queued())
        subject.clock.shift(SECOND)
    assert await subject.claim("submit", 0) == []
    assert [sorted(lease.key for lease in await subject.claim("submit", 2)) for _ in range(3)] == [
        keys[:2],
        keys[2:4],
        keys[4:],
    ]
    assert await subject.claim("submit", 9) == []


async def test_a_claim_says_how_many_it_got(subject: Subject) -> None:
    """So that a worker knows whether more may be waiting; unused places come back."""
    for _ in range(3):
        await subject.queued()
    subject.places.free = {"submit": 2, "settle": 4}
    assert await subject.batch(leases.claim, ["submit", "settle", "download"]) == [2, 0, 0]
    assert subject.places.free == {"submit": 0, "settle": 4}


async def test_a_row_is_born_leased_when_a_place_is_free(subject: Subject) -> None:
    """Handed over in memory after the commit: no claim, no waiting; the place is taken."""
    subject.places.free = {"submit": 1}
    first, second = await subject.queued(), await subject.queued()
    (lease,) = subject.places.new_leases()
    assert (lease.stage, lease.key, lease.fence, lease.attempts) == ("submit", first, 1, 1)
    assert subject.places.free == {"submit": 0}
    born, due = await subject.task(first), await subject.task(second)
    assert (born["submit_lease_until"], born["submit_lease_owner"]) == (
        subject.clock.now + LEASE,
        "one",
    )
    assert (due["submit_lease_until"], due["submit_due_at"], due["submit_attempts"]) == (
        None,
        subject.clock.now,
        0,
    )
    assert [tx.due for tx in subject.places.transactions] == [set(), {"submit"}], (
        "workers are told of what nobody was granted"
    )
    subject.clock.shift(LEASE)
    assert {lease.key for lease in await subject.claim("submit", 9)} == {first, second}


async def test_every_stage_is_born_leased(subject: Subject) -> None:
    """Settling and downloads by a callback, deliveries by an event: each takes a place of its own
    stage.
    """
    await subject.endpoint()
    task_id = await subject.submitted()
    subject.places.free = {"settle": 1, "download": 1, "deliver": 2}
    await subject.callback(task_id, completed(task_id, URL, "https://r.test/1"))
    claimed = {lease.stage: lease for lease in subject.places.new_leases()}
    assert sorted(claimed) == ["download", "settle"]
    assert (
        await subject.settle(
            task_id, completed(task_id, URL, "https://r.test/1"), lease=claimed["settle"]
        )
        is State.STORING
    )
    first, second = await subject.images(task_id)
    await subject.download(first, stored(first), claimed["download"])
    await subject.download(second, stored(second))
    assert [lease.stage for lease in subject.places.new_leases()] == ["deliver"]


async def test_a_batch_that_fails_keeps_no_place(subject: Subject) -> None:
    """What was granted in a transaction that did not commit was never granted."""

    def defect(tx: Transaction, wishes: Sequence[TaskRow]) -> list[None]:
        insert_tasks(tx, wishes)
        raise ZeroDivisionError

    subject.places.free = {"submit": 2}
    with pytest.raises(ZeroDivisionError):
        await subject.write(defect, subject.wish())
    assert (subject.places.leased, subject.places.free) == ([], {"submit": 2})


async def test_a_detached_process_is_granted_nothing(subject: Subject) -> None:
    """About to stop: new rows are due for others."""
    subject.places.free = {"submit": 9}
    subject.store.detach()
    assert (await subject.task(await subject.queued()))["submit_lease_until"] is None
    assert subject.places.leased == []


async def test_work_given_back_counts_no_attempt(subject: Subject) -> None:
    """A stopping process releases: due as before, for anybody at once; a second release changes
    nothing.
    """
    key = await subject.queued()
    (lease,) = await subject.claim("submit")
    assert await subject.batch(leases.give_back, [lease]) == [True]
    assert await subject.batch(leases.give_back, [lease]) == [False]
    (again,) = await subject.claim("submit")
    assert (again.key, again.attempts) == (key, 1)
    assert (await subject.task(key))["submit_deaths"] == 0


async def test_work_that_was_none_is_not_due_again(subject: Subject) -> None:
    """`done` ends lease and due time under the fence."""
    lease = await subject.claimed("submit", await subject.queued())
    assert await subject.write(leases.done, lease)
    subject.clock.shift(HOUR)
    assert await subject.claim("submit") == []
    assert not await subject.write(leases.done, lease)


async def test_asking_at_once_begins_the_schedule_anew(subject: Subject) -> None:
    """A callback makes the row due now with no attempts; while somebody asks already it only
    becomes due.
    """
    task_id = await subject.submitted()
    for _ in range(3):
        await subject.settle(task_id, None)
    assert (await subject.task(task_id))["settle_attempts"] == 3
    await subject.callback(task_id, completed(task_id, URL))
    task = await subject.task(task_id)
    assert (task["settle_attempts"], task["settle_due_at"], task["settle_lease_until"]) == (
        0,
        subject.clock.now,
        None,
    )
    (lease,) = await subject.claim("settle")
    subject.places.free = {"settle": 1}
    await subject.write(accept_callbacks, callback(task_id, None, b"<html>"))
    assert subject.places.leased == [], "one worker a row"
    assert (await subject.task(task_id))["settle_fence"] == lease.fence


async def test_an_ended_lease_is_taken_by_whoever_wants_the_row(subject: Subject) -> None:
    """A callback for a task whose settling process died is handed over at once, under a new
    fence.
    """
    task_id = await subject.submitted()
    late = await subject.asking(task_id)
    subject.clock.shift(LEASE)
    subject.places.free = {"settle": 1, "download": 0}
    await subject.callback(task_id, completed(task_id, URL))
    (lease,) = subject.places.new_leases()
    assert (lease.key, lease.fence, lease.attempts) == (task_id, late.fence + 1, 1)
    assert await subject.settle(task_id, completed(task_id, URL), lease=late) is None


async def test_first_attempts_and_retries_have_places_of_their_own(subject: Subject) -> None:
    """Two queues on one table: any number of retries leaves the first attempts their places."""
    await subject.endpoint()
    await subject.submitted()
    retry, fresh = (
        await subject.claimed("deliver", (await subject.rows(deliveries))[0]["id"]),
        await subject.submitted(),
    )
    await subject.attempt(retry, "retry")
    assert [lease.key for lease in await subject.claim("redeliver", 9)] == [retry.key]
    (first,) = await subject.claim("deliver", 9)
    assert (await subject.row(deliveries, first.key))["task_id"] == fresh


async def test_what_was_asked_for_and_what_is_silent_have_places_of_their_own(
    subject: Subject,
) -> None:
    """Two queues on one table: any number of silent tasks leaves the confirmations their places; a
    callback moves its task over.
    """
    silent = [await subject.submitted() for _ in range(3)]
    subject.clock.now = max([(await subject.task(task_id))["settle_due_at"] for task_id in silent])
    assert await subject.claim("settle", 9) == []
    await subject.callback(silent[1], completed(silent[1], URL))
    assert [lease.key for lease in await subject.claim("settle", 9)] == [silent[1]]
    assert sorted(lease.key for lease in await subject.claim("reconcile", 9)) == [
        silent[0],
        silent[2],
    ]


async def test_reopening_a_store_on_sqlite_frees_what_the_dead_process_held(
    sqlite_opener: Opener, clock: Clock
) -> None:
    """The lock proves that nobody else lives: no waiting for leases; a task in `submitting` can be
    claimed, and was one death.
    """
    async with sqlite_opener("dead") as store:
        dead = Subject(store, clock)
        lease, image = await dead.submitting(), await dead.storing(URL)
        await dead.claim("download")
    async with sqlite_opener("alive") as store:
        alive = Subject(store, clock)
        again = await alive.claimed("submit", lease.key)
        assert (again.fence, await alive.state(lease.key)) == (lease.fence + 1, State.SUBMITTING)
        assert (await alive.task(lease.key))["submit_deaths"] == 1
        assert [found.key for found in await alive.claim("download")] == [
            (await alive.images(image))[0]["id"]
        ]


async def test_opening_postgres_once_more_frees_nothing(
    two: tuple[Subject, Subject], postgres_opener: Opener
) -> None:
    """Others may live: their leases stand until they end."""
    lease = await two[0].submitting()
    async with postgres_opener("three") as store:
        third = Subject(store, two[0].clock)
        assert await third.claim("submit", 9) == []
        third.clock.shift(70 * SECOND)
        assert [found.key for found in await third.claim("submit", 9)] == [lease.key]


async def test_a_row_is_claimed_by_one_process_alone(two: tuple[Subject, Subject]) -> None:
    """`SKIP LOCKED`: many claims at once from two processes share the rows out, each to one, none
    twice, none left.
    """
    for _ in range(5):
        two[0].places.free.clear()  # nothing is born leased
        keys = {
            inserted.task_id
            for inserted in await two[0].batch(insert_tasks, [two[0].wish() for _ in range(60)])
        }
        taken: list[str] = []
        for _ in range(60):
            for place in two:
                place.places.free["submit"] = 7
            await asyncio.gather(
                *(place.write(leases.claim, "submit") for place in two for _ in range(3))
            )
            claimed = [place.places.new_leases() for place in two]
            assert all(len(got) <= 7 for got in claimed), "never more than there are places"
            if not any(claimed):
                break
            taken += [lease.key for got in claimed for lease in got]
        assert len(taken) == 60
        assert set(taken) == keys
        assert {row["submit_fence"] for row in await two[0].rows(tasks) if row["id"] in keys} == {1}


async def test_no_plan_makes_postgres_claim_more_than_there_are_places(
    two: tuple[Subject, Subject],
) -> None:
    """A nested loop over the rows to choose from would choose anew for each row of the table."""
    subject = two[0]
    await subject.batch(insert_tasks, [subject.wish() for _ in range(50)])

    def awkward(tx: Transaction, stages: Sequence[str]) -> list[int]:
        for kind in ("hashagg", "sort", "hashjoin", "mergejoin", "material", "memoize"):
            tx.connection.execute(text(f"SET LOCAL enable_{kind} = off"))
        return leases.claim(tx, stages)

    subject.places.free["submit"] = 7
    assert await subject.write(awkward, "submit") == 7
    assert len(subject.places.new_leases()) == 7


async def test_a_lease_that_ends_is_no_fault_of_the_next_in_line(subject: Subject) -> None:
    """Deaths count leases that ran out, not those that were finished or given back."""
    key = await subject.queued()
    for _ in range(3):
        await subject.write(leases.give_back, await subject.claimed("submit", key))
    await subject.claim("submit")
    subject.clock.shift(LEASE)
    assert len(await subject.claim("submit")) == 1
    assert (await subject.task(key))["submit_deaths"] == 1
    subject.clock.shift(MINUTE)
    assert await subject.claim("submit") == []  # it outlived two: it is to run alone
