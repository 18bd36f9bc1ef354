"""Replays: which events they cover, how they make deliveries page by page, and how they end
(docs/api.md, "Endpoints and deliveries").
"""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from service.db.paging import Row
from service.db.tables import deliveries, endpoints, events, replays
from service.db.transaction import Lease
from service.events.endpoints import EndpointChange, change_endpoints
from service.events.replay_filter import ReplayFilter, replay_extent
from service.events.replays import (
    NewReplayRow,
    ReplayPage,
    cancel_replays,
    insert_replays,
    record_pages,
    replay_page,
    replay_row,
)
from service.upkeep.retention_sql import forget_deliveries, forget_events, forget_replays
from tests.contract.subject import DAY, LEASE, OWNER, SECOND, Subject, new_id
from tests.outbox import Made, emit

TYPE = "image.task.failed"
ALL = ReplayFilter("", OWNER, 0, None, ("*",), "all")
DEAD = replace(ALL, only="dead")


async def event(subject: Subject, type: str = TYPE, owner: str = OWNER) -> str:
    """Emits an event, one second after the previous one."""
    subject.clock.shift(SECOND)
    (id,) = await subject.write(emit, Made(1, type, owner))
    return id


async def covered(subject: Subject, wanted: ReplayFilter, endpoint: str) -> list[str]:
    """The events that a replay covers, as counted and as listed on its one page. The replay is
    cancelled afterwards.
    """
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
    """Records the outcome of an event's first delivery."""
    (row,) = await subject.rows(deliveries, event_id=event_id)
    await subject.attempt(await subject.claimed("deliver", row["id"]), result)


async def started(subject: Subject, endpoint: str, wanted: ReplayFilter = ALL) -> str:
    wanted = replace(wanted, endpoint_id=endpoint)
    replay = NewReplayRow(
        new_id("replay"), OWNER, wanted, await subject.store.read(replay_extent, wanted)
    )
    assert await subject.batch(insert_replays, [replay, replay]) == [True, True]
    return replay.id


async def next_page(subject: Subject, replay_id: str, limit: int = 2) -> Row:
    """Moves the clock to the replay's due time, makes one page, and returns the replay's row."""
    subject.clock.now = max(subject.clock.now, (await subject.row(replays, replay_id))["due_at"])
    lease = await subject.claimed("replay", replay_id)
    page = await subject.store.read(replay_page, replay_id, limit)
    assert await subject.write(record_pages, (lease, page))
    return await subject.row(replays, replay_id)


def ids(rows: Sequence[Row]) -> list[str]:
    return [row["event_id"] for row in rows]


async def test_a_replay_covers_the_events_that_its_endpoint_subscribes_to(subject: Subject) -> None:
    """It covers the owner's events of the endpoint's types, limited to the requested types. An
    endpoint without an owner gets every owner's events.
    """
    endpoint = await subject.endpoint(types=["image.task.failed", "image.task.completed"])
    for_all = await subject.endpoint(None, types=["*"])
    failed, completed = await event(subject), await event(subject, "image.task.completed")
    submitted, others = (
        await event(subject, "image.task.submitted"),
        await event(subject, owner="other"),
    )
    assert await covered(subject, ALL, endpoint) == [failed, completed]
    assert await covered(subject, replace(ALL, types=()), endpoint) == [failed, completed]
    assert await covered(
        subject, replace(ALL, types=("image.task.completed", "image.task.submitted")), endpoint
    ) == [completed]
    assert await covered(subject, replace(ALL, types=("image.task.submitted",)), endpoint) == []
    assert await covered(subject, replace(ALL, owner=None), for_all) == [
        failed,
        completed,
        submitted,
        others,
    ]


async def test_a_replay_includes_since_and_excludes_until(subject: Subject) -> None:
    """Without `until`, it covers every event so far, also of the same millisecond."""
    endpoint = await subject.endpoint()
    made, times = [], []
    for _ in range(3):
        made.append(await event(subject))
        times.append(subject.clock.now)
    assert await covered(subject, replace(ALL, since=times[1]), endpoint) == made[1:]
    assert await covered(subject, replace(ALL, until=times[1]), endpoint) == made[:1]
    assert (
        await covered(subject, replace(ALL, since=times[1], until=times[2]), endpoint) == made[1:2]
    )
    assert await covered(subject, replace(ALL, since=times[2] + 1), endpoint) == []


async def test_a_dead_replay_covers_events_that_the_endpoint_never_took(subject: Subject) -> None:
    """It covers neither delivered events nor pending ones. An event whose replayed delivery is dead
    too is covered again.
    """
    endpoint = await subject.endpoint()
    dead, taken, pending = [await event(subject) for _ in range(3)]
    await end(subject, dead, "dead")
    await end(subject, taken, "delivered")
    assert await covered(subject, DEAD, endpoint) == [dead]
    assert await covered(subject, ALL, endpoint) == [dead, taken, pending]
    replay = await started(subject, endpoint, DEAD)
    assert (await next_page(subject, replay))["state"] == "done"
    assert await covered(subject, DEAD, endpoint) == []
    (again,) = await subject.rows(deliveries, replay_id=replay)
    await subject.attempt(await subject.claimed("redeliver", again["id"]), "dead")
    assert await covered(subject, DEAD, endpoint) == [dead]


async def test_a_dead_replay_covers_events_of_the_time_when_the_endpoint_was_disabled(
    subject: Subject,
) -> None:
    """They have no deliveries, but the outbox has the events. Events from before the endpoint
    existed are not covered.
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
    assert await covered(subject, DEAD, endpoint) == [buried, missed]
    assert await covered(subject, replace(DEAD, since=since + 1), endpoint) == [missed]
    assert await covered(subject, ALL, endpoint) == [before, buried, missed, after]


async def test_a_replay_makes_its_deliveries_page_by_page(subject: Subject) -> None:
    """They come in the order of the outbox and are due at once, as retries, with the whole
    schedule. Events after the replay's start are not covered.
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
        row = await next_page(subject, replay)
        assert (row["state"], row["made"], row["due_at"]) == (
            "running",
            count,
            subject.clock.now + SECOND,
        )
        assert subject.places.transactions[-1].due >= {"redeliver"}
    row = await next_page(subject, replay)
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


async def test_replays_to_one_endpoint_run_one_after_another(subject: Subject) -> None:
    """Several replays have the rate of one. Replays to other endpoints do not wait."""
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
    await next_page(subject, first)
    found = await subject.store.read(replay_page, second, 9)
    assert found.wait_ms is None


@pytest.mark.parametrize("how", ["disabled", "deleted"])
async def test_a_replay_ends_with_its_endpoint(subject: Subject, how: str) -> None:
    """The endpoint is disabled or deleted in the middle. The replay is cancelled, whether its page
    was read before or after, and makes no more deliveries.
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


async def test_a_cancelled_replay_makes_no_more_deliveries_and_pending_ones_are_dead(
    subject: Subject,
) -> None:
    """The owner or an admin cancels it. Delivered events stay delivered. A second cancel, or a
    cancel after the end, changes nothing.
    """
    endpoint = await subject.endpoint()
    for _ in range(4):
        await event(subject)
    replay = await started(subject, endpoint)
    await next_page(subject, replay)
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


async def test_a_cancel_while_a_page_is_recorded_leaves_no_pending_delivery(
    two: tuple[Subject, Subject],
) -> None:
    """Two processes commit in any order: the page is not made, or its deliveries are dead."""
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


async def test_a_page_is_recorded_only_under_its_current_lease(subject: Subject) -> None:
    """A worker that was too slow makes no delivery twice. A page that is recorded again after a
    lost response makes none either.
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


async def test_events_that_retention_removed_are_not_replayed(subject: Subject) -> None:
    """This holds also when an event is removed after its page was read."""
    endpoint = await subject.endpoint()
    gone, kept = await event(subject), await event(subject)
    for each in (gone, kept):
        await end(subject, each, "delivered")
    replay = await started(subject, endpoint)
    lease = await subject.claimed("replay", replay)
    found = await subject.store.read(replay_page, replay, 9)
    await subject.write(forget_deliveries, [gone])
    await subject.write(forget_events, [gone])
    assert len(await subject.rows(events)) == 1
    assert await subject.write(record_pages, (lease, found))
    row = await subject.row(replays, replay)
    assert (row["state"], row["count"], row["made"]) == ("done", 2, 1)
    assert ids(await subject.rows(deliveries, replay_id=replay)) == [kept]
    assert await covered(subject, ALL, endpoint) == [kept]


async def test_a_page_follows_the_types_that_the_endpoint_wants_now(subject: Subject) -> None:
    """Types that the endpoint dropped since the replay's start are not sent."""
    endpoint = await subject.endpoint(types=["*"])
    await event(subject)
    replay = await started(subject, endpoint)
    await subject.change(endpoint, types=("image.task.completed",))
    found = await subject.store.read(replay_page, replay, 9)
    assert list(found.events) == []
    assert (await subject.row(endpoints, endpoint))["types"] == ["image.task.completed"]


async def test_a_replay_that_ended_long_ago_is_removed(subject: Subject) -> None:
    """Running and recently ended replays stay."""
    endpoint = await subject.endpoint()
    old, new, running = [await started(subject, endpoint) for _ in range(3)]
    await subject.write(cancel_replays, (old, None))
    subject.clock.shift(DAY)
    before = subject.clock.now - 1
    await subject.write(cancel_replays, (new, None))
    assert await subject.write(forget_replays, before) == 1
    assert [row["id"] for row in await subject.rows(replays)] == [new, running]


async def test_replays_of_an_endpoint_follow_each_other_by_time(subject: Subject) -> None:
    """An id's text is in no order of time: its digits come after its letters, and sort before."""
    endpoint = await subject.endpoint()
    await event(subject)
    wanted = replace(ALL, endpoint_id=endpoint)
    extent = await subject.store.read(replay_extent, wanted)
    for id in ("rpl_b", "rpl_2"):
        subject.clock.shift(SECOND)
        assert await subject.write(insert_replays, NewReplayRow(id, OWNER, wanted, extent))
    pages = [await subject.store.read(replay_page, id, 100) for id in ("rpl_b", "rpl_2")]
    assert [len(page.events) for page in pages] == [1, 0]
