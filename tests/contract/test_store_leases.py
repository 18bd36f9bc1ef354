"""Leases and fences: which worker has which row, and until when (docs/concepts.md)."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest
from sqlalchemy import text

from service.db.queues import QUEUES
from service.db.tables import deliveries, tasks
from service.db.transaction import Transaction
from service.images.downloads import image_and_origin, images_and_origins
from service.queue import leases
from service.queue.outlook import outlook
from service.tasks.accept import insert_tasks
from service.tasks.rows import TaskRow
from service.tasks.state import State
from service.tasks.task_queries import task_row, tasks_by_id
from tests.contract.subject import (
    HOUR,
    LEASE,
    MINUTE,
    SECOND,
    Clock,
    Opener,
    Subject,
    accept_callbacks,
    callback,
    completed,
    stored,
)

URL = "https://r.test/0"
Read = Callable[[Subject, str], Awaitable[object]]


def reading(query: Callable[..., object], *more: object) -> Read:
    async def read(subject: Subject, key: str) -> object:
        return await subject.store.read(query, key, *more)

    return read


# What a claim of a stage reads, and what its job reads without it.
READERS: dict[str, tuple[leases.Rows, Read]] = {
    "settle": (tasks_by_id, reading(task_row, None)),
    "download": (images_and_origins, reading(image_and_origin)),
}


async def one_due(subject: Subject, stage: str) -> str:
    """The key of a row that is due for a stage and has no lease."""
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
async def test_a_lease_lasts_fifteen_seconds(subject: Subject, stage: str) -> None:
    """At 14.999 s no worker can claim the row. At 15 s a worker claims it with the next fence and
    attempt, and the crash is counted.
    """
    key = await one_due(subject, stage)
    (lease,) = await subject.claim(stage)
    assert (lease.stage, lease.key) == (stage, key)
    subject.clock.shift(14_999)
    assert await subject.claim(stage) == []
    subject.clock.shift(1)
    # The first attempt has begun, so the next one is a retry.
    stage = "redeliver" if stage == "deliver" else stage
    (again,) = await subject.claim(stage)
    assert (again.key, again.fence, again.attempts) == (key, lease.fence + 1, lease.attempts + 1)
    queue = QUEUES[stage]
    row = await subject.row(queue.table, key)
    assert (row[queue.prefix + "deaths"], row[queue.prefix + "lease_owner"]) == (1, "one")


@pytest.mark.parametrize("stage", QUEUES)
async def test_a_renewed_lease_lasts_fifteen_seconds_more(subject: Subject, stage: str) -> None:
    """The worker renews it every 5 s while a call runs. A renewal of an expired and claimed lease
    fails.
    """
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
    """A submission's lease outlasts its call, whether the worker can renew it in that time or
    not.
    """
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


async def test_a_claim_takes_due_rows_up_to_the_free_places(subject: Subject) -> None:
    """The row that has been due longest comes first, and the rest stays due. Without a free place,
    no row is claimed.
    """
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


@pytest.mark.parametrize("stage", READERS)
async def test_a_claim_gives_the_rows_that_its_jobs_would_read(
    subject: Subject, stage: str
) -> None:
    rows, read = READERS[stage]
    keys = {await one_due(subject, stage) for _ in range(2)}
    subject.places.new_leases()
    subject.places.free = {stage: 10}
    assert await subject.write(leases.claim_with_rows, (stage, rows)) == 2
    given = {lease.key: lease.row for lease in subject.places.new_leases()}
    assert given.keys() == keys
    for key in keys:
        assert given[key] is not None
        assert given[key] == await read(subject, key)


async def test_a_claim_returns_how_many_rows_it_got(subject: Subject) -> None:
    """The worker then knows whether more rows may wait. Unused places are free again."""
    for _ in range(3):
        await subject.queued()
    subject.places.free = {"submit": 2, "settle": 4}
    assert await subject.batch(leases.claim, ["submit", "settle", "download"]) == [2, 0, 0]
    assert subject.places.free == {"submit": 0, "settle": 4}


async def test_a_new_row_is_leased_at_once_when_a_place_is_free(subject: Subject) -> None:
    """The store hands the lease over in memory after the commit, without a claim, and the place is
    taken.
    """
    subject.places.free = {"submit": 1}
    first, second = await subject.queued(), await subject.queued()
    (lease,) = subject.places.new_leases()
    assert (lease.stage, lease.key, lease.fence, lease.attempts) == ("submit", first, 1, 1)
    assert subject.places.free == {"submit": 0}
    leased, due = await subject.task(first), await subject.task(second)
    assert (leased["submit_lease_until"], leased["submit_lease_owner"]) == (
        subject.clock.now + LEASE,
        "one",
    )
    assert (due["submit_lease_until"], due["submit_due_at"], due["submit_attempts"]) == (
        None,
        subject.clock.now,
        0,
    )
    assert [tx.due for tx in subject.places.transactions] == [set(), {"submit"}], (
        "workers get a hint about rows without a lease"
    )
    subject.clock.shift(LEASE)
    assert {lease.key for lease in await subject.claim("submit", 9)} == {first, second}


async def test_new_rows_of_every_stage_are_leased_at_once(subject: Subject) -> None:
    """A callback makes queries and downloads due, and an event makes deliveries due. Each takes a
    place of its own stage.
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
    """The leases of a transaction that did not commit do not exist."""

    def defect(tx: Transaction, wishes: Sequence[TaskRow]) -> list[None]:
        insert_tasks(tx, wishes)
        raise ZeroDivisionError

    subject.places.free = {"submit": 2}
    with pytest.raises(ZeroDivisionError):
        await subject.write(defect, subject.wish())
    assert (subject.places.leased, subject.places.free) == ([], {"submit": 2})


async def test_a_detached_process_gets_no_lease(subject: Subject) -> None:
    """The process is about to stop, so new rows are due for other processes."""
    subject.places.free = {"submit": 9}
    subject.store.detach()
    assert (await subject.task(await subject.queued()))["submit_lease_until"] is None
    assert subject.places.leased == []


async def test_a_released_row_counts_no_attempt(subject: Subject) -> None:
    """A stopping process releases the row. It is due as before, and a second release changes
    nothing.
    """
    key = await subject.queued()
    (lease,) = await subject.claim("submit")
    assert await subject.batch(leases.give_back, [lease]) == [True]
    assert await subject.batch(leases.give_back, [lease]) == [False]
    (again,) = await subject.claim("submit")
    assert (again.key, again.attempts) == (key, 1)
    assert (await subject.task(key))["submit_deaths"] == 0


async def test_a_row_that_is_done_is_not_due_again(subject: Subject) -> None:
    """`done` clears the lease and the due time, only under the current fence."""
    lease = await subject.claimed("submit", await subject.queued())
    assert await subject.write(leases.done, lease)
    subject.clock.shift(HOUR)
    assert await subject.claim("submit") == []
    assert not await subject.write(leases.done, lease)


async def test_a_callback_starts_the_schedule_of_queries_anew(subject: Subject) -> None:
    """The row is due now with no attempts. While a worker has it, it only becomes due."""
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
    assert subject.places.leased == [], "one worker per row"
    assert (await subject.task(task_id))["settle_fence"] == lease.fence


async def test_a_callback_replaces_an_expired_lease_at_once(subject: Subject) -> None:
    """The worker of the settle stage died. The callback hands the task over under a new fence."""
    task_id = await subject.submitted()
    late = await subject.asking(task_id)
    subject.clock.shift(LEASE)
    subject.places.free = {"settle": 1, "download": 0}
    await subject.callback(task_id, completed(task_id, URL))
    (lease,) = subject.places.new_leases()
    assert (lease.key, lease.fence, lease.attempts) == (task_id, late.fence + 1, 1)
    assert await subject.settle(task_id, completed(task_id, URL), lease=late) is None


async def test_first_attempts_and_retries_have_places_of_their_own(subject: Subject) -> None:
    """They are two queues on one table. Any number of retries leaves the first attempts their
    places.
    """
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


async def test_confirmations_and_reconciling_have_places_of_their_own(subject: Subject) -> None:
    """They are two queues on one table. Any number of silent tasks leaves the confirmations their
    places. A callback moves its task from one to the other.
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


async def test_reopening_a_sqlite_store_releases_the_leases_of_the_dead_process(
    sqlite_opener: Opener, clock: Clock
) -> None:
    """The file's lock proves that no other process lives, so no worker waits for a lease to expire.
    The lost lease counts as one crash.
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


async def test_opening_postgres_once_more_releases_no_lease(
    two: tuple[Subject, Subject], postgres_opener: Opener
) -> None:
    """Other processes may live. Their leases stand until they expire."""
    lease = await two[0].submitting()
    async with postgres_opener("three") as store:
        third = Subject(store, two[0].clock)
        assert await third.claim("submit", 9) == []
        third.clock.shift(70 * SECOND)
        assert [found.key for found in await third.claim("submit", 9)] == [lease.key]


async def test_a_row_is_claimed_by_one_process_alone(two: tuple[Subject, Subject]) -> None:
    """With `SKIP LOCKED`, many claims at once from two processes share the rows out. Each row goes
    to one process, and none is left.
    """
    for _ in range(5):
        two[0].places.free.clear()  # no new row is leased at once
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
            assert all(len(got) <= 7 for got in claimed), "never more than the free places"
            if not any(claimed):
                break
            taken += [lease.key for got in claimed for lease in got]
        assert len(taken) == 60
        assert set(taken) == keys
        assert {row["submit_fence"] for row in await two[0].rows(tasks) if row["id"] in keys} == {1}


async def test_no_query_plan_makes_postgres_claim_more_rows_than_places(
    two: tuple[Subject, Subject],
) -> None:
    """A nested loop over the candidates would choose candidates anew for each row of the table."""
    subject = two[0]
    await subject.batch(insert_tasks, [subject.wish() for _ in range(50)])

    def awkward(tx: Transaction, stages: Sequence[str]) -> list[int]:
        for kind in ("hashagg", "sort", "hashjoin", "mergejoin", "material", "memoize"):
            tx.connection.execute(text(f"SET LOCAL enable_{kind} = off"))
        return leases.claim(tx, stages)

    subject.places.free["submit"] = 7
    assert await subject.write(awkward, "submit") == 7
    assert len(subject.places.new_leases()) == 7


async def test_only_expired_leases_count_as_crashes(subject: Subject) -> None:
    """A lease that was finished or released does not count."""
    key = await subject.queued()
    for _ in range(3):
        await subject.write(leases.give_back, await subject.claimed("submit", key))
    await subject.claim("submit")
    subject.clock.shift(LEASE)
    assert len(await subject.claim("submit")) == 1
    assert (await subject.task(key))["submit_deaths"] == 1
    subject.clock.shift(MINUTE)
    assert await subject.claim("submit") == []  # after two crashes, it runs alone


@pytest.mark.parametrize("stage", QUEUES)
async def test_the_outlook_names_due_rows_and_the_next_due_time(
    subject: Subject, stage: str
) -> None:
    """A claim by it leases the row. Before its time, the row's due time is the next look."""
    key = await one_due(subject, stage)
    before = await subject.store.read(outlook, subject.clock.now - 1)
    assert stage not in before.ready
    assert before.next_due == subject.clock.now
    now = await subject.store.read(outlook, subject.clock.now)
    assert stage in now.ready
    assert not now.candidates
    await subject.claimed(stage, key)
    leased = await subject.store.read(outlook, subject.clock.now)
    assert stage not in leased.ready
