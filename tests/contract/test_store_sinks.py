"""How far each broker has got in the outbox, and which process publishes to it
(docs/brokers.md).
"""

from dataclasses import replace

from service.db.tables import sinks
from service.events.broker_worker import (
    LEASE_MS,
    RELEASED,
    SinkLease,
    change_sinks,
    lease_sinks,
    sinks_behind,
)
from service.events.feed import outbox_end
from service.upkeep import retention_sql
from tests.contract.subject import DAY, SECOND, Opener, Subject

NAME = "nats://127.0.0.1:4222/darkroom?stream=EVENTS"


async def hold(subject: Subject) -> SinkLease | None:
    return await subject.write(lease_sinks, NAME)


async def held(subject: Subject) -> SinkLease:
    found = await hold(subject)
    assert found is not None
    return found


async def end(subject: Subject) -> int:
    return await subject.store.read(outbox_end)


async def behind(subject: Subject, *types: str) -> int | None:
    return (await subject.store.read(sinks_behind, {NAME: types}))[NAME]


async def test_a_new_sink_starts_at_the_end_of_the_outbox(subject: Subject) -> None:
    """It does not get earlier events. From then on, it has its own position."""
    assert await behind(subject) is None
    await subject.submitted()
    first = await held(subject)
    assert first == SinkLease(NAME, 1, await end(subject))
    await subject.submitted()
    assert (await held(subject)).position == first.position < await end(subject)


async def test_a_sink_advances_as_far_as_the_broker_confirmed(subject: Subject) -> None:
    """The lag is the time of the oldest event of its types that the sink lacks, or None."""
    mine = await held(subject)
    await subject.submitted()
    emitted_at = subject.clock.now
    subject.clock.shift(3 * SECOND)
    await subject.submitted()
    assert (
        await behind(subject),
        await behind(subject, "image.task.*"),
        await behind(subject, "callback.*"),
    ) == (emitted_at, emitted_at, None)
    assert await subject.write(change_sinks, (mine, {"position": mine.position + 1}))
    assert await behind(subject) == emitted_at + 3 * SECOND
    assert await subject.write(change_sinks, (mine, {"position": await end(subject)}))
    assert await behind(subject) is None


async def test_one_process_at_a_time_has_a_sink(two: tuple[Subject, Subject]) -> None:
    """Its lease ends 30 s after the last renewal. What it records under an expired lease does not
    count.
    """
    one, other = two
    first = await held(one)
    assert await hold(other) is None
    one.clock.shift(LEASE_MS - 1)
    assert await hold(one) == first
    one.clock.shift(LEASE_MS - 1)
    assert await hold(other) is None
    one.clock.shift(1)
    second = await held(other)
    assert (second.fence, second.position) == (first.fence + 1, first.position)
    assert not await one.write(change_sinks, (first, {"position": 99}))
    assert not await one.write(change_sinks, (first, RELEASED))
    assert await hold(one) is None
    assert await other.write(change_sinks, (second, RELEASED))
    assert (await held(one)).fence == second.fence + 1


async def test_a_sink_is_free_after_the_clock_went_back(two: tuple[Subject, Subject]) -> None:
    """A lease that ends later than the longest possible lease counts as expired."""
    one, other = two
    await held(one)
    one.clock.shift(-DAY)
    assert await hold(other) is not None


async def test_opening_a_sqlite_store_frees_its_sinks(sqlite_opener: Opener) -> None:
    """The file's lock proves that no other process uses the store. The next process goes on at
    once.
    """
    async with sqlite_opener() as store:
        first = await store.write(lease_sinks, NAME)
    async with sqlite_opener("two") as store:
        second = await store.write(lease_sinks, NAME)
    assert first is not None
    assert second == replace(first, fence=first.fence + 1)


async def test_events_stay_until_every_sink_has_them(subject: Subject) -> None:
    """This holds at any age. A sink without a publisher for the whole retention time keeps no
    event.
    """
    mine = await held(subject)
    for _ in range(3):
        await subject.submitted()
    mine = replace(mine, position=mine.position + 1)
    await subject.write(change_sinks, (mine, {"position": mine.position}))
    subject.clock.shift(40 * DAY)
    before = subject.clock.now - 30 * DAY
    assert await hold(subject) is not None
    page = await subject.store.read(retention_sql.old_events, 0, before)
    assert page is not None
    assert page.last == mine.position
    (row,) = await subject.rows(sinks)
    subject.clock.shift(31 * DAY)
    assert row["seen_at"] < subject.clock.now - 30 * DAY
    page = await subject.store.read(retention_sql.old_events, 0, subject.clock.now - 30 * DAY)
    assert page is not None
    assert page.last == await end(subject)
