"""Endpoints that come back, move, or are tried by hand (contract section 3)."""

import asyncio

import pytest

from service.db.paging import Row
from service.db.tables import attempts, deliveries, endpoints
from service.db.transaction import Lease
from service.events import deliveries as delivery_store
from service.events.deliveries import (
    DeliveryAttempt,
    DeliveryOutcome,
    ManualAttempt,
    record_attempts,
    record_manual_attempts,
)
from service.events.secrets import SecretChange, change_secrets, stored_secret
from service.queue import leases
from tests.contract.subject import DAY, HOUR, MINUTE, OWNER, SECOND, Subject, new_id
from tests.outbox import Made, emit

TYPE = "image.task.failed"


async def pending(subject: Subject, endpoint: str, count: int = 1) -> list[Row]:
    """New deliveries to this endpoint."""
    made = await subject.write(emit, Made(count, TYPE, OWNER))
    return [
        row
        for row in await subject.rows(deliveries, endpoint_id=endpoint)
        if row["event_id"] in made
    ]


async def first(subject: Subject, endpoint: str) -> Lease:
    (row,) = await pending(subject, endpoint)
    return await subject.claimed("deliver", row["id"])


async def snoozed(subject: Subject, endpoint: str, count: int, wait_ms: int) -> list[str]:
    """Deliveries that found the endpoint busy."""
    rows = await pending(subject, endpoint, count)
    for row in rows:
        await subject.write(
            record_attempts,
            DeliveryOutcome(await subject.claimed("deliver", row["id"]), "snooze", wait_ms=wait_ms),
        )
    return [row["id"] for row in rows]


async def by_hand(
    subject: Subject,
    delivery_id: str,
    error: str | None = None,
    result: str | None = None,
    pause_ms: int = 0,
) -> None:
    status = 500 if error else 204
    attempt = DeliveryAttempt(new_id("attempt"), status, 12, error, pause_ms=pause_ms)
    made = ManualAttempt(delivery_id, result or ("failed" if error else "delivered"), attempt)
    for _ in range(2):  # after a commit whose answer was lost it runs again
        await subject.write(record_manual_attempts, made)


async def test_what_waited_for_a_dead_endpoint_is_due_when_it_is_back(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first success after failures: what was put off and never tried, so many at once; retries
    keep their schedule.
    """
    monkeypatch.setattr(delivery_store, "BACK_TO_NORMAL", 2)
    endpoint, other = await subject.endpoint(), await subject.endpoint()
    failing, retry = await first(subject, endpoint), await first(subject, endpoint)
    await subject.attempt(retry, "retry", wait_ms=HOUR)
    late, soon, sooner = [
        (await snoozed(subject, endpoint, 1, wait))[0] for wait in (HOUR, MINUTE, SECOND)
    ]
    (others,) = [
        row["id"]
        for row in await subject.rows(deliveries, endpoint_id=other)
        if row["event_id"] is not None
    ][-1:]
    await subject.write(
        record_attempts,
        DeliveryOutcome(await subject.claimed("deliver", others), "snooze", wait_ms=MINUTE),
    )
    await subject.attempt(failing, "delivered")
    now = subject.clock.now
    due = [
        (await subject.row(deliveries, id))["due_at"]
        for id in (sooner, soon, late, retry.key, others)
    ]
    assert due == [now, now, now + HOUR, now + HOUR, now + MINUTE]
    assert subject.places.transactions[-1].due >= {"deliver"}
    again = await subject.claimed("deliver", sooner)
    await subject.attempt(again, "delivered")
    assert (await subject.row(deliveries, late))["due_at"] == now + HOUR


async def test_whoever_asked_for_peace_is_not_hurried(subject: Subject) -> None:
    """A success of another call ends no pause."""
    endpoint = await subject.endpoint()
    failing, arriving = await first(subject, endpoint), await first(subject, endpoint)
    await subject.attempt(failing, "retry", wait_ms=HOUR, pause_ms=HOUR)
    (waiting,) = await snoozed(subject, endpoint, 1, HOUR)
    await subject.attempt(arriving, "delivered")
    assert (await subject.row(deliveries, waiting))["due_at"] == subject.clock.now + HOUR


@pytest.mark.parametrize("stage", ["deliver", "redeliver"])
async def test_who_was_waited_for_tells_the_workers(subject: Subject, stage: str) -> None:
    """Others were put off until this attempt was over: they are looked for at once, whoever holds
    the lease.
    """
    endpoint = await subject.endpoint()
    lease = await first(subject, endpoint)
    assert not await subject.write(
        record_attempts,
        DeliveryOutcome(Lease(stage, lease.key, lease.fence + 1, 1), "retry", wake=True),
    )
    assert subject.places.transactions[-1].due == {stage}
    assert await subject.write(record_attempts, DeliveryOutcome(lease, "retry", wait_ms=SECOND))
    assert subject.places.transactions[-1].due == set()


async def test_a_new_address_begins_with_a_clean_record(subject: Subject) -> None:
    """How long the old one failed, and what peace it asked for, is forgotten; by the same address
    it is not.
    """
    endpoint = await subject.endpoint()
    await subject.attempt(await first(subject, endpoint), "retry", wait_ms=HOUR, pause_ms=HOUR)
    began = subject.clock.now
    for url, known in (
        ("https://s.test/hook", (began, began + HOUR)),
        ("https://new.test/", (None, None)),
    ):
        await subject.change(endpoint, url=url)
        row = await subject.row(endpoints, endpoint)
        assert (row["failing_since"], row["paused_until"]) == known


@pytest.mark.parametrize("hand", [False, True], ids=["planned", "by hand"])
async def test_what_the_old_address_says_is_not_held_against_the_new_one(
    subject: Subject, *, hand: bool
) -> None:
    """Who moves away answers 410, or wants peace, at the old address; an attempt was under way
    there. The new one gets the event.
    """
    endpoint = await subject.endpoint()
    old = (await subject.row(endpoints, endpoint))["url"]
    gone, busy = await first(subject, endpoint), await first(subject, endpoint)
    await subject.change(endpoint, url="https://new.test/")
    for lease, result, pause_ms in ((busy, "retry", HOUR), (gone, "gone", 0)):
        attempt = DeliveryAttempt(
            new_id("attempt"), 410, 12, "answered 410", pause_ms=pause_ms, url=old
        )
        if hand:
            manual = ManualAttempt(lease.key, "failed" if pause_ms else "gone", attempt)
            await subject.write(record_manual_attempts, manual)
        else:
            outcome = DeliveryOutcome(lease, result, attempt, 0, disable_after_ms=1)
            assert await subject.write(record_attempts, outcome)
            assert (await subject.row(deliveries, lease.key))["due_at"] == subject.clock.now
        assert (await subject.row(deliveries, lease.key))["state"] == "pending"
    row = await subject.row(endpoints, endpoint)
    assert (row["status"], row["paused_until"], row["failing_since"]) == ("enabled", None, None)


async def test_a_disabled_endpoint_that_is_paused_is_disabled_no_more(subject: Subject) -> None:
    """Deliveries are made again, and held."""
    endpoint = await subject.endpoint()
    await subject.change(endpoint, status="disabled")
    assert await pending(subject, endpoint) == []
    await subject.change(endpoint, status="paused")
    row = await subject.row(endpoints, endpoint)
    assert (row["status"], row["disabled_at"], row["disabled_reason"]) == ("paused", None, None)
    assert len(await pending(subject, endpoint)) == 1


async def test_of_two_who_change_a_secret_at_once_one_comes_first(
    two: tuple[Subject, Subject],
) -> None:
    """An endpoint's or an owner's: the other is told, and looks again."""
    endpoint = await two[0].endpoint()
    await two[0].key(OWNER, b"first")
    for _ in range(5):
        for table, key in (("endpoints", endpoint), ("owners", OWNER)):
            held = await two[0].store.read(stored_secret, table, key)
            assert held is not None
            changes = [SecretChange(table, key, held, new_id("key").encode()) for _ in two]
            assert sorted(
                await asyncio.gather(
                    *(
                        each.write(change_secrets, change)
                        for each, change in zip(two, changes, strict=True)
                    )
                )
            ) == [False, True]
    assert not await two[0].write(change_secrets, SecretChange("owners", "nobody", b"", b""))


async def test_an_attempt_by_hand_moves_nothing_unless_it_arrives(subject: Subject) -> None:
    """A failure is on record, and what was planned goes on; a success ends the delivery, whatever
    became of it before.
    """
    endpoint = await subject.endpoint()
    lease = await first(subject, endpoint)
    await subject.attempt(lease, "retry", wait_ms=HOUR, disable_after_ms=5 * DAY)
    before = await subject.row(deliveries, lease.key)
    await by_hand(subject, lease.key, "answered 500")
    assert await subject.row(deliveries, lease.key) == before
    assert len(await subject.rows(attempts)) == 2
    await by_hand(subject, lease.key)
    row = await subject.row(deliveries, lease.key)
    assert (row["state"], row["due_at"], row["finished_at"]) == (
        "delivered",
        None,
        subject.clock.now,
    )
    assert (await subject.row(endpoints, endpoint))["failing_since"] is None
    await by_hand(subject, lease.key, "answered 500")
    assert (await subject.row(deliveries, lease.key))["state"] == "delivered"
    await by_hand(subject, "dlv_gone")
    assert len(await subject.rows(attempts)) == 4


async def test_an_attempt_by_hand_is_told_what_a_planned_one_is(subject: Subject) -> None:
    """410 disables the endpoint and buries what is pending; Retry-After pauses it; a task's own
    address that is gone is dead.
    """
    asking, gone = await subject.endpoint(), await subject.endpoint()
    one, other = await first(subject, asking), await first(subject, gone)
    await by_hand(subject, one.key, "answered 429", pause_ms=MINUTE)
    row = await subject.row(endpoints, asking)
    assert (row["paused_until"], row["failing_since"]) == (subject.clock.now + MINUTE, None), (
        "peace, and no beginning of days of failures"
    )
    await by_hand(subject, one.key, "answered 429", pause_ms=SECOND)
    assert (await subject.row(endpoints, asking))["paused_until"] == subject.clock.now + MINUTE
    await by_hand(subject, other.key, "answered 410", "gone")
    row, delivery = await subject.row(endpoints, gone), await subject.row(deliveries, other.key)
    assert (row["status"], row["disabled_at"], delivery["state"], delivery["due_at"]) == (
        "disabled",
        subject.clock.now,
        "dead",
        None,
    )
    assert (await subject.types()).count("endpoint.disabled") == 1
    assert (await subject.row(endpoints, asking))["status"] == "enabled"


@pytest.mark.parametrize("result", ["retry", "dead", "delivered"])
async def test_an_attempt_by_hand_arrives_while_another_is_under_way(
    subject: Subject, result: str
) -> None:
    """Whatever comes of the other, the delivery is delivered; both are on record."""
    lease = await first(subject, await subject.endpoint())
    await by_hand(subject, lease.key)
    assert not await subject.attempt(lease, result, wait_ms=1)
    row = await subject.row(deliveries, lease.key)
    assert (row["state"], row["due_at"]) == ("delivered", None)
    assert len(await subject.rows(attempts)) == 2
    assert await subject.claim("redeliver") == []
    assert "delivery.exhausted" not in await subject.types()


async def test_an_attempt_by_hand_that_fails_leaves_the_one_under_way_alone(
    subject: Subject,
) -> None:
    """Its lease still holds."""
    lease = await first(subject, await subject.endpoint())
    await by_hand(subject, lease.key, "answered 500")
    assert await subject.attempt(lease, "delivered")
    assert (await subject.row(deliveries, lease.key))["state"] == "delivered"


async def test_an_attempt_by_hand_of_a_tasks_own_address_judges_nobody(subject: Subject) -> None:
    """There is no endpoint."""
    await subject.key(OWNER)
    task_id = await subject.completed(callback_url="https://c.test/done")
    (row,) = await subject.rows(deliveries, task_id=task_id)
    await subject.write(leases.give_back, await subject.claimed("deliver", row["id"]))
    await by_hand(subject, row["id"])
    assert (await subject.row(deliveries, row["id"]))["state"] == "delivered"
