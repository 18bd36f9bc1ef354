"""How far brokers have come in the outbox, and who publishes there (design, decisions 1 and 9)."""

from dataclasses import replace

from service.db.tables import sinks
from service.events.broker_worker import (
    SinkLease,
    advance_sinks,
    lease_sinks,
    release_sinks,
    sinks_behind,
)
from service.events.feed import outbox_end
from service.upkeep import expiry
from tests.contract.subject import DAY, LEASE, SECOND, Opener, Subject

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


async def test_a_new_sink_begins_at_the_outboxs_end(subject: Subject) -> None:
    """What was before it is not its; from then on it has a place of its own."""
    assert await behind(subject) is None
    await subject.submitted()
    first = await held(subject)
    assert first == SinkLease(NAME, 1, await end(subject))
    await subject.submitted()
    assert (await held(subject)).position == first.position < await end(subject)


async def test_a_sink_advances_as_far_as_was_confirmed(subject: Subject) -> None:
    """The lag is the time of the oldest event, of the types it gets, that it lacks; none when it
    has all.
    """
    mine = await held(subject)
    await subject.submitted()
    told = subject.clock.now
    subject.clock.shift(3 * SECOND)
    await subject.submitted()
    assert (
        await behind(subject),
        await behind(subject, "image.task.*"),
        await behind(subject, "callback.*"),
    ) == (told, told, None)
    assert await subject.write(advance_sinks, replace(mine, position=mine.position + 1))
    assert await behind(subject) == told + 3 * SECOND
    assert await subject.write(advance_sinks, replace(mine, position=await end(subject)))
    assert await behind(subject) is None


async def test_one_process_at_a_time_has_a_sink(two: tuple[Subject, Subject]) -> None:
    """Until its lease ends, 30 s after it was last renewed; what it says then counts no more."""
    one, other = two
    first = await held(one)
    assert await hold(other) is None
    one.clock.shift(LEASE - 1)
    assert await hold(one) == first
    one.clock.shift(LEASE - 1)
    assert await hold(other) is None
    one.clock.shift(1)
    second = await held(other)
    assert (second.fence, second.position) == (first.fence + 1, first.position)
    assert not await one.write(advance_sinks, replace(first, position=99))
    assert not await one.write(release_sinks, first)
    assert await hold(one) is None
    assert await other.write(release_sinks, second)
    assert (await held(one)).fence == second.fence + 1


async def test_a_clock_that_went_back_keeps_no_sink(two: tuple[Subject, Subject]) -> None:
    """A lease that ends later than any can counts as ended."""
    one, other = two
    await held(one)
    one.clock.shift(-DAY)
    assert await hold(other) is not None


async def test_a_store_that_proves_nobody_lives_frees_its_sinks(sqlite_opener: Opener) -> None:
    """SQLite, at the start: the next process goes on at once."""
    async with sqlite_opener() as store:
        first = await store.write(lease_sinks, NAME)
    async with sqlite_opener("two") as store:
        second = await store.write(lease_sinks, NAME)
    assert first is not None
    assert second == replace(first, fence=first.fence + 1)


async def test_events_stay_until_every_sink_has_them(subject: Subject) -> None:
    """However old they are; a sink at which nobody has published for all that time keeps
    nothing.
    """
    mine = await held(subject)
    for _ in range(3):
        await subject.submitted()
    mine = replace(mine, position=mine.position + 1)
    await subject.write(advance_sinks, mine)
    subject.clock.shift(40 * DAY)
    before = subject.clock.now - 30 * DAY
    assert await hold(subject) is not None
    page = await subject.store.read(expiry.old_events, 0, before)
    assert page is not None
    assert page.last == mine.position
    (row,) = await subject.rows(sinks)
    subject.clock.shift(31 * DAY)
    assert row["seen_at"] < subject.clock.now - 30 * DAY
    page = await subject.store.read(expiry.old_events, 0, subject.clock.now - 30 * DAY)
    assert page is not None
    assert page.last == await end(subject)
