"""Deliveries: attempts, retries, dead deliveries, and endpoints that are paused, disabled or
deleted.

docs/api.md has the rules under "Endpoints and deliveries".
"""

import asyncio
from collections.abc import Mapping

import pytest

from service.db.paging import After, Row, Selection
from service.db.tables import attempts, deliveries, endpoints
from service.db.transaction import Lease
from service.events.deliveries import (
    DeliveryOutcome,
    delivery_list,
    delivery_to_send,
    record_attempts,
)
from service.events.endpoints import (
    DeliveryAttempt,
    EndpointChange,
    NewEndpointRow,
    change_endpoints,
    endpoint_list,
    endpoint_row,
    insert_endpoints,
)
from service.queue import leases
from tests.contract.subject import DAY, HOUR, LEASE, MINUTE, SECOND, Subject, new_id

FIVE_DAYS = 5 * DAY


async def first(subject: Subject, endpoint: str) -> Lease:
    """The lease for the delivery of a new task's event to this endpoint, before its first
    attempt.
    """
    await subject.submitted()
    (row,) = await subject.rows(deliveries, endpoint_id=endpoint, state="pending", attempts=0)
    return await subject.claimed("deliver", row["id"])


async def again(subject: Subject, lease: Lease) -> Lease:
    """Moves the clock to the retry's due time and returns the lease for it."""
    subject.clock.now = max(subject.clock.now, (await subject.row(deliveries, lease.key))["due_at"])
    return await subject.claimed("redeliver", lease.key)


async def endpoint_of(subject: Subject, id: str) -> Row:
    return await subject.row(endpoints, id)


async def test_a_delivered_event_is_never_due_again(subject: Subject) -> None:
    """Any 2xx delivers the event. The store keeps the attempt."""
    lease = await first(subject, await subject.endpoint())
    made = DeliveryAttempt(new_id("attempt"), 204, 12, None, b"thanks")
    assert await subject.write(record_attempts, DeliveryOutcome(lease, "delivered", made))
    row = await subject.row(deliveries, lease.key)
    assert (
        row["state"],
        row["finished_at"],
        row["due_at"],
        row["lease_until"],
        row["attempts"],
    ) == ("delivered", subject.clock.now, None, None, 1)
    (attempt,) = await subject.rows(attempts)
    assert (
        attempt["delivery_id"],
        attempt["status"],
        attempt["duration_ms"],
        attempt["error"],
        attempt["answer"],
    ) == (lease.key, 204, 12, None, b"thanks")
    subject.clock.shift(FIVE_DAYS)
    assert [await subject.claim(stage) for stage in ("deliver", "redeliver")] == [[], []]


async def test_a_failed_attempt_is_retried_by_schedule(subject: Subject) -> None:
    """The delivery stays pending and becomes due after the wait. The store counts and keeps each
    attempt.
    """
    lease = await first(subject, await subject.endpoint())
    for number in range(1, 4):
        assert lease.attempts == number
        assert await subject.attempt(lease, "retry", wait_ms=5 * SECOND)
        row = await subject.row(deliveries, lease.key)
        assert (row["state"], row["due_at"], row["finished_at"]) == (
            "pending",
            subject.clock.now + 5 * SECOND,
            None,
        )
        subject.clock.shift(5 * SECOND - 1)
        assert await subject.claim("redeliver") == []
        lease = await again(subject, lease)
    assert len(await subject.rows(attempts, delivery_id=lease.key)) == 3


async def test_after_the_last_retry_a_delivery_is_dead_and_an_event_tells_operators(
    subject: Subject,
) -> None:
    """The delivery is kept and listed, and `delivery.exhausted` is emitted once."""
    endpoint = await subject.endpoint()
    lease = await first(subject, endpoint)
    await subject.attempt(lease, "dead")
    row = await subject.row(deliveries, lease.key)
    assert (row["state"], row["finished_at"], row["due_at"]) == ("dead", subject.clock.now, None)
    (event,) = [event for event in await subject.events() if event["type"] == "delivery.exhausted"]
    assert (event["owner"], event["task_id"]) == ("admin", row["task_id"])
    assert event["data"] == {
        "delivery_id": row["id"],
        "endpoint_id": endpoint,
        "event_id": row["event_id"],
        "task_id": row["task_id"],
    }


async def test_a_dead_delivery_of_an_operators_event_emits_no_event(subject: Subject) -> None:
    """Otherwise a dead endpoint of an operator would cause new events for itself without end."""
    operators = await subject.endpoint("admin", ["delivery.exhausted"])
    await subject.attempt(await first(subject, await subject.endpoint()), "dead")
    (row,) = await subject.rows(deliveries, endpoint_id=operators)
    await subject.attempt(await subject.claimed("deliver", row["id"]), "dead")
    assert (await subject.types()).count("delivery.exhausted") == 1


async def test_a_delivery_without_its_endpoint_is_dead_without_an_attempt(subject: Subject) -> None:
    """The worker made no attempt, so none is kept and no event is emitted."""
    lease = await first(subject, await subject.endpoint())
    assert await subject.write(record_attempts, DeliveryOutcome(lease, "dead"))
    assert ((await subject.row(deliveries, lease.key))["state"], await subject.rows(attempts)) == (
        "dead",
        [],
    )
    assert "delivery.exhausted" not in await subject.types()


async def test_an_attempt_under_an_expired_lease_is_kept_and_decides_nothing(
    subject: Subject,
) -> None:
    """The attempt was made, so the store keeps it. The worker with the new lease decides the
    delivery's state.
    """
    late = await first(subject, await subject.endpoint())
    subject.clock.shift(LEASE)
    holder = await subject.claimed("redeliver", late.key)
    assert not await subject.attempt(late, "dead")
    assert (await subject.row(deliveries, late.key))["state"] == "pending"
    assert await subject.attempt(holder, "delivered")
    assert (
        len(await subject.rows(attempts)),
        (await subject.row(deliveries, late.key))["state"],
    ) == (2, "delivered")


async def test_an_attempt_recorded_again_is_kept_once(subject: Subject) -> None:
    """A worker that lost the response to a commit records the attempt again and finds it there."""
    lease = await first(subject, await subject.endpoint())
    outcome = DeliveryOutcome(
        lease, "delivered", DeliveryAttempt(new_id("attempt"), 204, 12, None, b"")
    )
    assert [await subject.write(record_attempts, outcome) for _ in range(2)] == [True, False]
    assert len(await subject.rows(attempts)) == 1


async def test_an_attempt_for_a_deleted_delivery_is_dropped(subject: Subject) -> None:
    assert not await subject.attempt(Lease("deliver", "dlv_gone", 1, 1), "delivered")
    assert await subject.rows(attempts) == []


async def test_410_disables_the_endpoint_and_its_pending_deliveries_are_dead(
    subject: Subject,
) -> None:
    """No new deliveries are made for the endpoint. Operators get one event, however many attempts
    are answered with 410.
    """
    endpoint, other = await subject.endpoint(), await subject.endpoint()
    one, two = await first(subject, endpoint), await first(subject, endpoint)
    await subject.submitted()
    assert await subject.attempt(one, "gone")
    row = await endpoint_of(subject, endpoint)
    assert (row["status"], row["disabled_at"], row["disabled_reason"]) == (
        "disabled",
        subject.clock.now,
        "the endpoint answered 410 Gone",
    )
    assert {row["state"] for row in await subject.rows(deliveries, endpoint_id=endpoint)} == {
        "dead"
    }
    assert {row["state"] for row in await subject.rows(deliveries, endpoint_id=other)} == {
        "pending"
    }
    subject.clock.shift(SECOND)
    assert await subject.attempt(two, "gone")
    assert (await endpoint_of(subject, endpoint))["disabled_at"] == subject.clock.now - SECOND
    (event,) = [event for event in await subject.events() if event["type"] == "endpoint.disabled"]
    assert (event["owner"], event["data"]["endpoint_id"]) == ("admin", endpoint)
    await subject.submitted()
    assert len(await subject.rows(deliveries, endpoint_id=endpoint)) == 3
    assert await subject.claim("redeliver", 9) == []


async def test_attempts_under_way_while_their_endpoint_is_disabled(subject: Subject) -> None:
    """A failed attempt plans no retry of its dead delivery. A successful attempt still delivers the
    event.
    """
    endpoint = await subject.endpoint()
    failing, arriving = await first(subject, endpoint), await first(subject, endpoint)
    await subject.change(endpoint, status="disabled")
    await subject.attempt(failing, "retry", wait_ms=SECOND)
    await subject.attempt(arriving, "delivered")
    rows = [await subject.row(deliveries, lease.key) for lease in (failing, arriving)]
    assert [(row["state"], row["due_at"]) for row in rows] == [("dead", None), ("delivered", None)]


async def test_an_endpoint_that_only_fails_for_the_set_time_is_disabled(subject: Subject) -> None:
    """The time counts from the first failure after the last success. A success starts it anew."""
    endpoint = await subject.endpoint()
    lease = await first(subject, endpoint)
    await subject.attempt(lease, "retry", wait_ms=FIVE_DAYS - 1, disable_after_ms=FIVE_DAYS)
    began = subject.clock.now
    assert (await endpoint_of(subject, endpoint))["failing_since"] == began
    await subject.attempt(
        await again(subject, lease), "retry", wait_ms=1, disable_after_ms=FIVE_DAYS
    )
    assert (await endpoint_of(subject, endpoint))["status"] == "enabled"
    await subject.attempt(await first(subject, endpoint), "delivered")
    assert (await endpoint_of(subject, endpoint))["failing_since"] is None
    await subject.attempt(
        await again(subject, lease), "retry", wait_ms=FIVE_DAYS, disable_after_ms=FIVE_DAYS
    )
    assert (await endpoint_of(subject, endpoint))["status"] == "enabled"
    await subject.attempt(
        await again(subject, lease), "retry", wait_ms=1, disable_after_ms=FIVE_DAYS
    )
    row = await endpoint_of(subject, endpoint)
    assert (row["status"], row["disabled_reason"][:26]) == (
        "disabled",
        "every attempt failed since",
    )
    assert (await subject.types())[-1] == "endpoint.disabled"
    assert (await subject.row(deliveries, lease.key))["state"] == "dead"


@pytest.mark.parametrize("more", [{"ours": True, "disable_after_ms": 1}, {"disable_after_ms": 0}])
async def test_our_own_faults_and_a_time_of_zero_disable_no_endpoint(
    subject: Subject, more: dict[str, int]
) -> None:
    """A fault on our side says nothing about the endpoint. A time of 0 means never."""
    endpoint = await subject.endpoint()
    lease = await first(subject, endpoint)
    for _ in range(3):
        await subject.attempt(lease, "retry", wait_ms=DAY, **more)
        lease = await again(subject, lease)
    row = await endpoint_of(subject, endpoint)
    assert (row["status"], row["failing_since"] is None) == ("enabled", "ours" in more)


async def test_retry_after_pauses_the_whole_endpoint(subject: Subject) -> None:
    """Neither a shorter `Retry-After` nor a late success of another attempt ends the pause
    sooner.
    """
    endpoint = await subject.endpoint()
    one, two, three = [await first(subject, endpoint) for _ in range(3)]
    asked = subject.clock.now
    await subject.attempt(one, "retry", wait_ms=HOUR, pause_ms=HOUR)
    await subject.attempt(two, "retry", wait_ms=MINUTE, pause_ms=MINUTE)
    await subject.attempt(three, "delivered")
    assert (await endpoint_of(subject, endpoint))["paused_until"] == asked + HOUR


async def test_a_delivery_during_a_pause_is_snoozed_and_counts_no_attempt(subject: Subject) -> None:
    """`snooze`: the delivery is due when the pause is over, still as a first attempt."""
    lease = await first(subject, await subject.endpoint())
    assert await subject.write(record_attempts, DeliveryOutcome(lease, "snooze", wait_ms=MINUTE))
    row = await subject.row(deliveries, lease.key)
    assert (row["state"], row["due_at"], row["attempts"]) == (
        "pending",
        subject.clock.now + MINUTE,
        0,
    )
    subject.clock.shift(MINUTE)
    assert (await subject.claimed("deliver", lease.key)).attempts == 1


async def test_a_paused_endpoint_holds_its_deliveries_until_it_is_enabled(subject: Subject) -> None:
    """A held delivery is pending and not due. Enabling the endpoint makes it due at once, as a
    first attempt, and tells the workers.
    """
    endpoint = await subject.endpoint()
    lease = await first(subject, endpoint)
    await subject.change(endpoint, status="paused")
    assert await subject.write(record_attempts, DeliveryOutcome(lease, "held"))
    row = await subject.row(deliveries, lease.key)
    assert (row["state"], row["due_at"], row["attempts"]) == ("pending", None, 0)
    subject.clock.shift(FIVE_DAYS)
    assert await subject.claim("deliver") == []
    await subject.change(endpoint, status="enabled")
    assert subject.places.transactions[-1].due == {"deliver", "redeliver"}
    assert (await subject.claimed("deliver", lease.key)).attempts == 1


async def test_a_delivery_held_after_its_endpoint_was_enabled_is_due(subject: Subject) -> None:
    """The endpoint was enabled just before a worker recorded the hold, so no later change would
    release the delivery.
    """
    endpoint = await subject.endpoint()
    lease = await first(subject, endpoint)
    await subject.change(endpoint, status="paused")
    await subject.change(endpoint, status="enabled")
    assert await subject.write(record_attempts, DeliveryOutcome(lease, "held"))
    assert (await subject.row(deliveries, lease.key))["due_at"] == subject.clock.now


async def test_a_hold_and_an_enable_at_once_leave_the_delivery_due(
    two: tuple[Subject, Subject],
) -> None:
    """Two processes commit them in any order."""
    endpoint = await two[0].endpoint()
    for _ in range(10):
        lease = await first(two[0], endpoint)
        await two[0].change(endpoint, status="paused")
        await asyncio.gather(
            two[0].write(record_attempts, DeliveryOutcome(lease, "held")),
            two[1].change(endpoint, status="enabled"),
        )
        assert (await two[0].row(deliveries, lease.key))["due_at"] == two[0].clock.now
        await two[0].attempt(await two[0].claimed("deliver", lease.key), "delivered")


async def test_410_from_a_tasks_own_callback_url_makes_the_delivery_dead(subject: Subject) -> None:
    """There is no endpoint to disable. A delivery that is dead after its last retry emits
    `delivery.exhausted`, as for an endpoint.
    """
    await subject.key("painter")
    for result, count in [("gone", 0), ("dead", 1)]:
        task_id = await subject.completed(callback_url="https://c.test/done")
        (row,) = await subject.rows(deliveries, task_id=task_id)
        await subject.attempt(
            await subject.claimed("deliver", row["id"]), result, disable_after_ms=1
        )
        assert (await subject.row(deliveries, row["id"]))["state"] == "dead"
        assert (await subject.types()).count("delivery.exhausted") == count
    assert "endpoint.disabled" not in await subject.types()


async def test_an_endpoint_is_inserted_once_and_read_by_its_owner(subject: Subject) -> None:
    """A second insert with the same id changes nothing. Another owner does not see the endpoint,
    and `admin` sees every one.
    """
    made = NewEndpointRow(
        new_id("endpoint"), "painter", "https://s.test/hook", ("image.task.*",), "mine", b"secret"
    )
    await subject.batch(insert_endpoints, [made])
    await subject.batch(insert_endpoints, [made])
    for_all = await subject.endpoint(None)
    row = await subject.store.read(endpoint_row, made.id, "painter")
    assert row is not None
    assert (row["url"], row["types"], row["description"], row["status"], row["secret"]) == (
        "https://s.test/hook",
        ["image.task.*"],
        "mine",
        "enabled",
        b"secret",
    )
    assert await subject.store.read(endpoint_row, made.id, "other") is None
    assert await subject.store.read(endpoint_row, for_all, "painter") is None
    assert await subject.store.read(endpoint_row, for_all, None) is not None
    own = await subject.store.read(endpoint_list, Selection("painter", 9), now=0)
    assert [row["id"] for row in own] == [made.id]
    every = await subject.store.read(endpoint_list, Selection(None, 9), now=0)
    assert [row["id"] for row in every] == [for_all, made.id]


async def test_an_endpoint_is_changed_by_its_owner_alone(subject: Subject) -> None:
    """A change sets the fields that it names and keeps the rest. It fails for another owner's
    endpoint and for a missing one.
    """
    endpoint = await subject.endpoint()
    assert await subject.change(
        endpoint, owner="painter", url="https://new.test/", types=("*",), description="new"
    )
    assert await subject.change(endpoint, owner="painter")
    row = await endpoint_of(subject, endpoint)
    assert (row["url"], row["types"], row["description"], row["status"]) == (
        "https://new.test/",
        ["*"],
        "new",
        "enabled",
    )
    assert not await subject.change(endpoint, owner="other", url="https://evil.test/")
    assert not await subject.change("ep_gone", url="https://new.test/")
    assert (await endpoint_of(subject, endpoint))["url"] == "https://new.test/"


async def test_enabling_an_endpoint_clears_why_it_was_disabled(subject: Subject) -> None:
    """The owner disables it: its deliveries are dead, it has a reason, and operators get no event.
    Enabling resets the endpoint and leaves the dead deliveries dead.
    """
    endpoint = await subject.endpoint()
    lease = await first(subject, endpoint)
    await subject.attempt(lease, "retry", wait_ms=MINUTE, pause_ms=HOUR)
    await subject.change(endpoint, status="disabled")
    row = await endpoint_of(subject, endpoint)
    assert (row["status"], row["disabled_at"], row["disabled_reason"]) == (
        "disabled",
        subject.clock.now,
        "by its owner",
    )
    await subject.change(endpoint, status="enabled")
    row = await endpoint_of(subject, endpoint)
    assert (
        row["status"],
        row["disabled_at"],
        row["disabled_reason"],
        row["failing_since"],
        row["paused_until"],
    ) == ("enabled", None, None, None, None)
    assert (await subject.row(deliveries, lease.key))["state"] == "dead"
    assert "endpoint.disabled" not in await subject.types()


async def test_a_deleted_endpoints_deliveries_are_dead_and_readable(subject: Subject) -> None:
    """An attempt under way is still recorded and finds no endpoint to change."""
    endpoint = await subject.endpoint()
    lease = await first(subject, endpoint)
    waiting = await first(subject, endpoint)
    await subject.write(leases.give_back, waiting)
    assert await subject.write(change_endpoints, EndpointChange(endpoint, "painter", delete=True))
    assert await subject.rows(endpoints) == []
    delivery = await subject.store.read(delivery_to_send, waiting.key)
    assert delivery is not None
    assert (delivery.state, delivery.endpoint_status, delivery.url) == ("dead", None, None)
    assert await subject.attempt(lease, "retry", wait_ms=1)
    assert await subject.claim("redeliver", 9) == []
    assert await subject.store.read(delivery_to_send, "dlv_gone") is None


async def test_deliveries_are_listed_newest_first_with_their_attempts(subject: Subject) -> None:
    """The list filters by owner and by any column. Its pages contain each delivery once."""
    endpoint = await subject.endpoint()
    claimed = []
    for _ in range(3):
        claimed.append(await first(subject, endpoint))
        subject.clock.shift(SECOND)
    for _ in range(2):
        await subject.attempt(claimed[0], "retry")
        claimed[0] = await again(subject, claimed[0])
        subject.clock.shift(SECOND)

    async def listed(
        owner: str | None, after: After = None, where: Mapping[str, str] | None = None
    ) -> list[tuple[str, int]]:
        found = await subject.store.read(delivery_list, Selection(owner, 9, after), where)
        return [(row["id"], len(made)) for row, made in found]

    everything = [(claimed[2].key, 0), (claimed[1].key, 0), (claimed[0].key, 2)]
    assert await listed("painter") == everything
    assert await listed(None) == everything
    assert await listed("other") == []
    row = await subject.row(deliveries, claimed[1].key)
    assert await listed("painter", (row["created_at"], row["id"])) == everything[2:]
    assert (
        await listed("painter", None, {"task_id": row["task_id"], "state": "pending"})
        == everything[1:2]
    )
    assert (
        await listed("painter", None, {"event_id": row["event_id"], "endpoint_id": endpoint})
        == everything[1:2]
    )
    assert await listed("painter", None, {"state": "dead"}) == []
