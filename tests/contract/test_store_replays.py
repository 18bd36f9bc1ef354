"""Replays: which events they mean, page by page, and what ends them (contract section 3)."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from service.db.paging import Row
from service.db.tables import deliveries, endpoints, events, replays
from service.db.transaction import Lease
from service.events.endpoints import EndpointChange, change_endpoints
from service.events.replays import (
    NewReplayRow,
    ReplayFilter,
    ReplayPage,
    cancel_replays,
    insert_replays,
    record_pages,
    replay_extent,
    replay_page,
    replay_row,
)
from service.upkeep.expiry import forget_deliveries, forget_events, forget_replays
from tests.contract.subject import DAY, LEASE, OWNER, SECOND, Subject, new_id
from tests.outbox import Made, emit

TYPE = "image.task.failed"
ALL = ReplayFilter("", OWNER, 0, None, ("*",), "all")
DEAD = replace(ALL, only="dead")


async def event(subject: Subject, type: str = TYPE, owner: str = OWNER) -> str:
    """A new event, a second after the one before."""
    subject.clock.shift(SECOND)
    (id,) = await subject.write(emit, Made(1, type, owner))
    return id


async def meant(subject: Subject, wanted: ReplayFilter, endpoint: str) -> list[str]:
    """The events of a replay, as counted and as its one page has them; the replay is taken back."""
    wanted = replace(wanted, endpoint_id=endpoint)
    extent = await subject.store.read(replay_extent, wanted)
    replay = NewReplayRow(new_id("replay"), OWNER, wanted, extent)
    assert await subject.write(insert_replays, replay)
    found = await subject.store.read(replay_page, replay.id, 100)
    assert found.wait_ms is None
    assert len(found.events) == extent.count
    assert await subject.write(cancel_replays, (replay.id, None))
    return [row["id"] for row in found.events]


async def end(subject: Subject, event_id: str, result: str) -> None:
    """What came of an event's first delivery."""
    (row,) = await subject.rows(deliveries, event_id=event_id)
    await subject.attempt(await subject.claimed("deliver", row["id"]), result)


async def started(subject: Subject, endpoint: str, wanted: ReplayFilter = ALL) -> str:
    wanted = replace(wanted, endpoint_id=endpoint)
    replay = NewReplayRow(
        new_id("replay"), OWNER, wanted, await subject.store.read(replay_extent, wanted)
    )
    assert await subject.batch(insert_replays, [replay, replay]) == [True, True]
    return replay.id


async def turn(subject: Subject, replay_id: str, limit: int = 2) -> Row:
    """One page of a replay, when it is due; the replay afterwards."""
    subject.clock.now = max(subject.clock.now, (await subject.row(replays, replay_id))["due_at"])
    lease = await subject.claimed("replay", replay_id)
    page = await subject.store.read(replay_page, replay_id, limit)
    assert await subject.write(record_pages, (lease, page))
    return await subject.row(replays, replay_id)


def ids(rows: Sequence[Row]) -> list[str]:
    return [row["event_id"] for row in rows]


async def test_a_replay_means_what_its_endpoint_subscribes_to(subject: Subject) -> None:
    """Its owner's events of its types, and of those the types that are asked for; an endpoint of
    all owners has everybody's.
    """
    endpoint = await subject.endpoint(types=["image.task.failed", "image.task.completed"])
    everybodys = await subject.endpoint(None, types=["*"])
    failed, completed = await event(subject), await event(subject, "image.task.completed")
    submitted, others = (
        await event(subject, "image.task.submitted"),
        await event(subject, owner="other"),
    )
    assert await meant(subject, ALL, endpoint) == [failed, completed]
    assert await meant(subject, replace(ALL, types=()), endpoint) == [failed, completed]
    assert await meant(
        subject, replace(ALL, types=("image.task.completed", "image.task.submitted")), endpoint
    ) == [completed]
    assert await meant(subject, replace(ALL, types=("image.task.submitted",)), endpoint) == []
    assert await meant(subject, replace(ALL, owner=None), everybodys) == [
        failed,
        completed,
        submitted,
        others,
    ]


async def test_a_replay_is_from_since_until_before_until(subject: Subject) -> None:
    """`since` is included, `until` is not; without it all that there is, also of the same
    millisecond.
    """
    endpoint = await subject.endpoint()
    made, times = [], []
    for _ in range(3):
        made.append(await event(subject))
        times.append(subject.clock.now)
    assert await meant(subject, replace(ALL, since=times[1]), endpoint) == made[1:]
    assert await meant(subject, replace(ALL, until=times[1]), endpoint) == made[:1]
    assert await meant(subject, replace(ALL, since=times[1], until=times[2]), endpoint) == made[1:2]
    assert await meant(subject, replace(ALL, since=times[2] + 1), endpoint) == []


async def test_dead_is_what_the_endpoint_never_took(subject: Subject) -> None:
    """Not what it took, nor what is on its way; after a retry by replay that failed too it is dead
    again.
    """
    endpoint = await subject.endpoint()
    dead, taken, pending = [await event(subject) for _ in range(3)]
    await end(subject, dead, "dead")
    await end(subject, taken, "delivered")
    assert await meant(subject, DEAD, endpoint) == [dead]
    assert await meant(subject, ALL, endpoint) == [dead, taken, pending]
    replay = await started(subject, endpoint, DEAD)
    assert (await turn(subject, replay))["state"] == "done"
    assert await meant(subject, DEAD, endpoint) == []
    (again,) = await subject.rows(deliveries, replay_id=replay)
    await subject.attempt(await subject.claimed("redeliver", again["id"]), "dead")
    assert await meant(subject, DEAD, endpoint) == [dead]


async def test_what_was_made_while_an_endpoint_was_disabled_it_never_took(subject: Subject) -> None:
    """No delivery was made, the outbox has the event. What was there before the endpoint was not
    meant for it.
    """
    before = await event(subject)
    subject.clock.shift(SECOND)
    endpoint = await subject.endpoint()
    buried = await event(subject)
    await subject.change(endpoint, status="disabled")
    since = subject.clock.now
    missed = await event(subject)
    await subject.change(endpoint, status="enabled")
    after = await event(subject)
    assert await meant(subject, DEAD, endpoint) == [buried, missed]
    assert await meant(subject, replace(DEAD, since=since + 1), endpoint) == [missed]
    assert await meant(subject, ALL, endpoint) == [before, buried, missed, after]


async def test_a_replay_makes_its_deliveries_page_by_page(subject: Subject) -> None:
    """In the order of the outbox, due at once as retries are, with the whole schedule; nothing that
    came after its start.
    """
    endpoint = await subject.endpoint()
    made = [await event(subject) for _ in range(5)]
    replay = await started(subject, endpoint)
    row = await subject.row(replays, replay)
    assert (row["state"], row["count"], row["made"], row["until_at"], row["finished_at"]) == (
        "running",
        5,
        0,
        subject.clock.now,
        None,
    )
    await event(subject)
    for count in (2, 4):
        row = await turn(subject, replay)
        assert (row["state"], row["made"], row["due_at"]) == (
            "running",
            count,
            subject.clock.now + SECOND,
        )
        assert subject.places.transactions[-1].due >= {"redeliver"}
    row = await turn(subject, replay)
    assert (row["state"], row["made"], row["due_at"], row["finished_at"]) == (
        "done",
        5,
        None,
        subject.clock.now,
    )
    rows = sorted(await subject.rows(deliveries, replay_id=replay), key=lambda each: each["id"])
    assert ids(rows) == made
    assert {
        (each["state"], each["owner"], each["endpoint_id"], each["attempts"]) for each in rows
    } == {("pending", OWNER, endpoint, 0)}
    lease = await subject.claimed("redeliver", rows[0]["id"])
    assert lease.attempts == 1
    await subject.attempt(lease, "delivered")
    found = await subject.store.read(replay_row, replay, OWNER)
    assert found is not None
    assert found[1] == {"pending": 4, "delivered": 1}
    assert await subject.store.read(replay_row, replay, "other") is None
    assert await subject.store.read(replay_row, "rpl_gone", None) is None
    assert await subject.store.read(replay_page, replay, 9) == ReplayPage((), None, None)


async def test_replays_to_one_endpoint_come_one_after_the_other(subject: Subject) -> None:
    """However many are asked for, the rate is that of one; those to others do not wait."""
    one, other = await subject.endpoint(), await subject.endpoint()
    await event(subject)
    first, second, elsewhere = [await started(subject, endpoint) for endpoint in (one, one, other)]
    waits = [
        await subject.store.read(replay_page, replay, 9) for replay in (first, second, elsewhere)
    ]
    assert [(found.wait_ms, len(found.events)) for found in waits] == [
        (None, 1),
        (SECOND, 0),
        (None, 1),
    ]
    position = (await subject.row(replays, second))["position"]
    assert await subject.write(record_pages, (await subject.claimed("replay", second), waits[1]))
    row = await subject.row(replays, second)
    assert (row["state"], row["position"], row["due_at"]) == (
        "running",
        position,
        subject.clock.now + SECOND,
    )
    await turn(subject, first)
    found = await subject.store.read(replay_page, second, 9)
    assert found.wait_ms is None


@pytest.mark.parametrize("how", ["disabled", "deleted"])
async def test_a_replay_ends_with_its_endpoint(subject: Subject, how: str) -> None:
    """Disabled or deleted in the middle: cancelled, whether the page was read before or after, and
    nothing more is made.
    """
    endpoint = await subject.endpoint()
    for _ in range(3):
        await event(subject)
    early, late = await started(subject, endpoint), await started(subject, endpoint)
    lease = await subject.claimed("replay", early)
    page = await subject.store.read(replay_page, early, 2)
    change = EndpointChange(
        endpoint, None, delete=how == "deleted", status=None if how == "deleted" else "disabled"
    )
    assert await subject.write(change_endpoints, change)
    before = len(await subject.rows(deliveries))
    assert not await subject.write(record_pages, (lease, page))
    assert not await subject.write(
        record_pages, (await subject.claimed("replay", late), ReplayPage((), None, None))
    )
    assert [row["state"] for row in await subject.rows(replays)] == ["cancelled", "cancelled"]
    assert [row["due_at"] for row in await subject.rows(replays)] == [None, None]
    assert len(await subject.rows(deliveries)) == before
    replay = NewReplayRow(
        new_id("replay"),
        OWNER,
        replace(ALL, endpoint_id=endpoint),
        await subject.store.read(replay_extent, ALL),
    )
    assert not await subject.write(insert_replays, replay)


async def test_a_cancelled_replay_makes_nothing_more_and_what_is_pending_is_dead(
    subject: Subject,
) -> None:
    """By its owner or an admin; what was delivered stays so. Cancelled again, or after its end, it
    is no other.
    """
    endpoint = await subject.endpoint()
    for _ in range(4):
        await event(subject)
    replay = await started(subject, endpoint)
    await turn(subject, replay)
    taken, waiting = await subject.rows(deliveries, replay_id=replay)
    await subject.attempt(await subject.claimed("redeliver", taken["id"]), "delivered")
    under_way = await subject.claimed("redeliver", waiting["id"])
    assert not await subject.write(cancel_replays, (replay, "other"))
    assert not await subject.write(cancel_replays, ("rpl_gone", None))
    subject.clock.shift(SECOND)
    lease = await subject.claimed("replay", replay)
    found = await subject.store.read(replay_page, replay, 2)
    for _ in range(2):
        assert await subject.write(cancel_replays, (replay, OWNER))
    assert not await subject.write(record_pages, (lease, found))
    row = await subject.row(replays, replay)
    assert (row["state"], row["made"], row["due_at"], row["finished_at"]) == (
        "cancelled",
        2,
        None,
        subject.clock.now,
    )
    states = [
        (each["state"], each["due_at"]) for each in await subject.rows(deliveries, replay_id=replay)
    ]
    assert states == [("delivered", None), ("dead", None)]
    await subject.attempt(under_way, "retry", wait_ms=SECOND)
    assert (await subject.row(deliveries, waiting["id"]))["due_at"] is None
    assert await subject.claim("replay") == []


async def test_cancelling_while_a_page_is_recorded_leaves_nothing_pending(
    two: tuple[Subject, Subject],
) -> None:
    """From two processes, in any order: either the page was not made, or it is dead."""
    for _ in range(10):
        endpoint = await two[0].endpoint()
        await event(two[0])
        replay = await started(two[0], endpoint)
        lease = await two[0].claimed("replay", replay)
        found = await two[0].store.read(replay_page, replay, 9)
        page = (lease, found)
        await asyncio.gather(
            two[0].write(record_pages, page), two[1].write(cancel_replays, (replay, None))
        )
        assert {row["state"] for row in await two[0].rows(deliveries, replay_id=replay)} <= {"dead"}
        await two[0].change(endpoint, status="disabled")


async def test_a_page_counts_under_its_lease_alone(subject: Subject) -> None:
    """Whoever was too slow makes nothing twice; a page that is recorded again after a lost answer
    neither.
    """
    endpoint = await subject.endpoint()
    await event(subject)
    replay = await started(subject, endpoint)
    late = await subject.claimed("replay", replay)
    found = await subject.store.read(replay_page, replay, 9)
    subject.clock.shift(LEASE)
    lease = await subject.claimed("replay", replay)
    assert not await subject.write(record_pages, (late, found))
    page = (lease, found)
    assert [await subject.write(record_pages, page) for _ in range(2)] == [True, False]
    assert not await subject.write(
        record_pages, (Lease("replay", "rpl_gone", 1, 1), ReplayPage((), None, None))
    )
    assert len(await subject.rows(deliveries, replay_id=replay)) == 1


async def test_what_retention_took_is_not_replayed(subject: Subject) -> None:
    """Also between a page's reading and its recording: no delivery is made of an event that is
    gone.
    """
    endpoint = await subject.endpoint()
    gone, kept = await event(subject), await event(subject)
    for each in (gone, kept):
        await end(subject, each, "delivered")
    replay = await started(subject, endpoint)
    lease = await subject.claimed("replay", replay)
    found = await subject.store.read(replay_page, replay, 9)
    await subject.write(
        forget_deliveries, [row["id"] for row in await subject.rows(deliveries, event_id=gone)]
    )
    await subject.write(forget_events, [gone])
    assert len(await subject.rows(events)) == 1
    assert await subject.write(record_pages, (lease, found))
    row = await subject.row(replays, replay)
    assert (row["state"], row["count"], row["made"]) == ("done", 2, 1)
    assert ids(await subject.rows(deliveries, replay_id=replay)) == [kept]
    assert await meant(subject, ALL, endpoint) == [kept]


async def test_a_page_of_one_type_goes_by_what_the_endpoint_wants_now(subject: Subject) -> None:
    """Types that it gave up since are not sent to it any more."""
    endpoint = await subject.endpoint(types=["*"])
    await event(subject)
    replay = await started(subject, endpoint)
    await subject.change(endpoint, types=("image.task.completed",))
    found = await subject.store.read(replay_page, replay, 9)
    assert list(found.events) == []
    assert (await subject.row(endpoints, endpoint))["types"] == ["image.task.completed"]


async def test_a_replay_that_ended_long_ago_is_forgotten(subject: Subject) -> None:
    """Those that run, and those that ended since, stay."""
    endpoint = await subject.endpoint()
    old, new, running = [await started(subject, endpoint) for _ in range(3)]
    await subject.write(cancel_replays, (old, None))
    subject.clock.shift(DAY)
    before = subject.clock.now - 1
    await subject.write(cancel_replays, (new, None))
    assert await subject.write(forget_replays, before) == 1
    assert [row["id"] for row in await subject.rows(replays)] == [new, running]
