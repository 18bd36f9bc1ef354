"""Endpoints that recover, move to a new URL, or get an attempt by hand.

docs/api.md has the rules under "Endpoints and deliveries".
"""

import asyncio

import pytest

from service.db.paging import Row
from service.db.tables import attempts, deliveries, endpoints
from service.db.transaction import Lease
from service.events import endpoints as endpoint_store
from service.events.deliveries import (
    DeliveryOutcome,
    ManualAttempt,
    record_attempts,
    record_manual_attempts,
)
from service.events.endpoints import DeliveryAttempt
from service.events.secrets import SecretChange, change_secrets, stored_secret
from service.queue import leases
from tests.contract.subject import DAY, HOUR, MINUTE, OWNER, SECOND, Subject, new_id
from tests.outbox import Made, emit

TYPE = "image.task.failed"


async def pending(subject: Subject, endpoint: str, count: int = 1) -> list[Row]:
    """Emits events and returns their new deliveries to this endpoint."""
    event_ids = await subject.write(emit, Made(count, TYPE, OWNER))
    return [
        row
        for row in await subject.rows(deliveries, endpoint_id=endpoint)
        if row["event_id"] in event_ids
    ]


async def first(subject: Subject, endpoint: str) -> Lease:
    (row,) = await pending(subject, endpoint)
    return await subject.claimed("deliver", row["id"])


async def snoozed(subject: Subject, endpoint: str, count: int, wait_ms: int) -> list[str]:
    """Deliveries that were snoozed because the endpoint was busy."""
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
    for _ in range(2):  # recorded again after a lost response to the commit
        await subject.write(record_manual_attempts, made)


async def test_deliveries_that_waited_for_a_dead_endpoint_are_due_when_it_recovers(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first success after failures brings a limited number of deliveries forward, and each of
    them that is delivered brings further ones. Another endpoint's keep their time.
    """
    monkeypatch.setattr(endpoint_store, "FORWARD", 2)
    monkeypatch.setattr(endpoint_store, "MORE", 1)
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
    for each in (sooner, soon):
        await subject.attempt(await subject.claimed("deliver", each), "delivered")
    rows = [await subject.row(deliveries, id) for id in (late, retry.key)]
    assert [(row["due_at"], row["planned_at"]) for row in rows] == [(now, 0), (now, now + HOUR)]


async def test_a_retry_that_was_brought_forward_in_vain_keeps_its_place_in_the_schedule(
    subject: Subject,
) -> None:
    """A delivery that always fails, beside others that succeed, is brought forward once before each
    planned attempt, and that attempt does not count.
    """
    endpoint = await subject.endpoint()
    poison = await first(subject, endpoint)
    await subject.attempt(poison, "retry", wait_ms=HOUR)
    planned = subject.clock.now + HOUR
    for _ in range(3):
        subject.clock.shift(SECOND)
        await subject.attempt(await first(subject, endpoint), "delivered")
        due = [lease for lease in await subject.claim("redeliver", 9) if lease.key == poison.key]
        for lease in due:
            assert lease.attempts == 2
            await subject.write(
                record_attempts,
                DeliveryOutcome(
                    lease,
                    "retry",
                    DeliveryAttempt(new_id("attempt"), 500, 1, "answered 500"),
                    planned - subject.clock.now,
                    early=True,
                ),
            )
    row = await subject.row(deliveries, poison.key)
    assert (row["due_at"], row["planned_at"], row["attempts"]) == (planned, planned, 1)
    assert len(await subject.rows(attempts, delivery_id=poison.key)) == 2
    subject.clock.now = planned
    await subject.attempt(await subject.claimed("redeliver", poison.key), "retry", wait_ms=HOUR)
    row = await subject.row(deliveries, poison.key)
    assert (row["due_at"], row["planned_at"], row["attempts"]) == (planned + HOUR, None, 2)
    await subject.attempt(await first(subject, endpoint), "delivered")
    assert (await subject.row(deliveries, poison.key))["due_at"] == planned


@pytest.mark.parametrize("change", [{"url": "https://new.test/"}, {"status": "enabled"}])
async def test_a_repaired_endpoint_gets_its_waiting_deliveries_at_once(
    subject: Subject, change: dict[str, str]
) -> None:
    """Its owner gives it another address, or enables it after a pause."""
    endpoint = await subject.endpoint()
    lease = await first(subject, endpoint)
    await subject.attempt(lease, "retry", wait_ms=HOUR, pause_ms=HOUR)
    await subject.change(endpoint, status="paused")
    await subject.change(endpoint, **change)
    assert (await subject.row(deliveries, lease.key))["due_at"] == subject.clock.now


async def test_a_success_during_a_pause_brings_deliveries_to_its_end(subject: Subject) -> None:
    endpoint = await subject.endpoint()
    failing, arriving = await first(subject, endpoint), await first(subject, endpoint)
    await subject.attempt(failing, "retry", wait_ms=DAY, pause_ms=HOUR)
    await subject.attempt(arriving, "delivered")
    assert (await subject.row(deliveries, failing.key))["due_at"] == subject.clock.now + HOUR


async def test_a_success_does_not_end_a_pause_that_the_endpoint_asked_for(subject: Subject) -> None:
    endpoint = await subject.endpoint()
    failing, arriving = await first(subject, endpoint), await first(subject, endpoint)
    await subject.attempt(failing, "retry", wait_ms=HOUR, pause_ms=HOUR)
    (waiting,) = await snoozed(subject, endpoint, 1, HOUR)
    await subject.attempt(arriving, "delivered")
    assert (await subject.row(deliveries, waiting))["due_at"] == subject.clock.now + HOUR


@pytest.mark.parametrize("stage", ["deliver", "redeliver"])
async def test_an_attempt_that_others_wait_for_wakes_the_workers(
    subject: Subject, stage: str
) -> None:
    """Deliveries were snoozed until this attempt ended. The workers look for them at once, also
    when the attempt's lease has expired.
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


async def test_a_new_url_starts_without_failures_and_pause(subject: Subject) -> None:
    """A change to the same URL keeps both."""
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
async def test_an_answer_of_the_old_url_does_not_count_against_the_new_one(
    subject: Subject, *, hand: bool
) -> None:
    """An attempt was under way when the endpoint moved, and the old URL answers 410 or asks for a
    pause. The delivery goes to the new URL.
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


async def test_pausing_a_disabled_endpoint_ends_its_disabling(subject: Subject) -> None:
    """New deliveries are made again, and held."""
    endpoint = await subject.endpoint()
    await subject.change(endpoint, status="disabled")
    assert await pending(subject, endpoint) == []
    await subject.change(endpoint, status="paused")
    row = await subject.row(endpoints, endpoint)
    assert (row["status"], row["disabled_at"], row["disabled_reason"]) == ("paused", None, None)
    assert len(await pending(subject, endpoint)) == 1


async def test_one_of_two_changes_of_a_secret_at_once_wins(two: tuple[Subject, Subject]) -> None:
    """This holds for the secrets of endpoints and of owners. The losing process learns that it
    lost, and reads the secret again.
    """
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


async def test_an_attempt_by_hand_changes_a_delivery_only_if_it_succeeds(subject: Subject) -> None:
    """A failure is kept as an attempt, and the schedule goes on. A success delivers the event in
    every earlier state.
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


async def test_an_attempt_by_hand_obeys_410_and_retry_after(subject: Subject) -> None:
    """410 disables the endpoint and makes its pending deliveries dead. Retry-After pauses the
    endpoint.
    """
    asking, gone = await subject.endpoint(), await subject.endpoint()
    one, other = await first(subject, asking), await first(subject, gone)
    await by_hand(subject, one.key, "answered 429", pause_ms=MINUTE)
    row = await subject.row(endpoints, asking)
    assert (row["paused_until"], row["failing_since"]) == (subject.clock.now + MINUTE, None), (
        "the endpoint is paused, and its time of failures does not start"
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
async def test_an_attempt_by_hand_succeeds_while_another_is_under_way(
    subject: Subject, result: str
) -> None:
    """The event is delivered whatever the other attempt's outcome is. Both attempts are kept."""
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
    """The lease of the attempt under way still holds."""
    lease = await first(subject, await subject.endpoint())
    await by_hand(subject, lease.key, "answered 500")
    assert await subject.attempt(lease, "delivered")
    assert (await subject.row(deliveries, lease.key))["state"] == "delivered"


async def test_an_attempt_by_hand_to_a_tasks_own_callback_url_changes_no_endpoint(
    subject: Subject,
) -> None:
    await subject.key(OWNER)
    task_id = await subject.completed(callback_url="https://c.test/done")
    (row,) = await subject.rows(deliveries, task_id=task_id)
    await subject.write(leases.give_back, await subject.claimed("deliver", row["id"]))
    await by_hand(subject, row["id"])
    assert (await subject.row(deliveries, row["id"]))["state"] == "delivered"
