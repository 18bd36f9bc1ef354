"""Deliveries: attempts, retries, the dead; endpoints paused, disabled, gone (contract section
3).
"""

import asyncio

import pytest

from service.db.paging import Row
from service.db.tables import attempts, deliveries, endpoints
from service.db.transaction import Lease
from service.events.deliveries import (
    DeliveryAttempt,
    DeliveryOutcome,
    delivery_list,
    delivery_to_send,
    record_attempts,
)
from service.events.endpoints import (
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
    """The lease for a new task's event at this endpoint, its only pending delivery that was never
    tried.
    """
    await subject.submitted()
    (row,) = await subject.rows(deliveries, endpoint_id=endpoint, state="pending", attempts=0)
    return await subject.claimed("deliver", row["id"])


async def again(subject: Subject, lease: Lease) -> Lease:
    """The lease for the retry, when it is due."""
    subject.clock.now = max(subject.clock.now, (await subject.row(deliveries, lease.key))["due_at"])
    return await subject.claimed("redeliver", lease.key)


async def endpoint_of(subject: Subject, id: str) -> Row:
    return await subject.row(endpoints, id)


async def test_a_delivered_event_is_done(subject: Subject) -> None:
    """Any 2xx: delivered, with its attempt on record; never due again."""
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


async def test_a_failed_attempt_is_tried_again_by_schedule(subject: Subject) -> None:
    """Pending, due after the wait and not before; each attempt counts and is kept."""
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


async def test_after_the_last_retry_it_is_dead_and_operators_are_told(subject: Subject) -> None:
    """Kept, listed, `delivery.exhausted` once."""
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


async def test_a_dead_delivery_of_an_operators_event_raises_none(subject: Subject) -> None:
    """Else a dead operators' endpoint would feed itself for ever."""
    operators = await subject.endpoint("admin", ["delivery.exhausted"])
    await subject.attempt(await first(subject, await subject.endpoint()), "dead")
    (row,) = await subject.rows(deliveries, endpoint_id=operators)
    await subject.attempt(await subject.claimed("deliver", row["id"]), "dead")
    assert (await subject.types()).count("delivery.exhausted") == 1


async def test_a_delivery_without_its_endpoint_is_dead_without_an_attempt(subject: Subject) -> None:
    """Nothing was tried: no attempt is kept, nobody is told."""
    lease = await first(subject, await subject.endpoint())
    assert await subject.write(record_attempts, DeliveryOutcome(lease, "dead"))
    assert ((await subject.row(deliveries, lease.key))["state"], await subject.rows(attempts)) == (
        "dead",
        [],
    )
    assert "delivery.exhausted" not in await subject.types()


async def test_an_attempt_under_an_ended_lease_is_kept_and_decides_nothing(
    subject: Subject,
) -> None:
    """It was made, so it is on record; the delivery's state is the new holder's."""
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
    """After a commit whose answer was lost the operation runs again, and finds its attempt
    there.
    """
    lease = await first(subject, await subject.endpoint())
    outcome = DeliveryOutcome(
        lease, "delivered", DeliveryAttempt(new_id("attempt"), 204, 12, None, b"")
    )
    assert [await subject.write(record_attempts, outcome) for _ in range(2)] == [True, False]
    assert len(await subject.rows(attempts)) == 1


async def test_an_attempt_for_a_delivery_that_is_gone_is_dropped(subject: Subject) -> None:
    """Nothing to keep it for."""
    assert not await subject.attempt(Lease("deliver", "dlv_gone", 1, 1), "delivered")
    assert await subject.rows(attempts) == []


async def test_gone_disables_the_endpoint_and_buries_what_is_pending(subject: Subject) -> None:
    """410: this one is dead, the others are, none are made; operators are told once, however many
    410 come.
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


async def test_what_was_under_way_when_its_endpoint_was_disabled(subject: Subject) -> None:
    """A retry of what is buried is not planned; an attempt that arrived all the same is
    delivered.
    """
    endpoint = await subject.endpoint()
    failing, arriving = await first(subject, endpoint), await first(subject, endpoint)
    await subject.change(endpoint, status="disabled")
    await subject.attempt(failing, "retry", wait_ms=SECOND)
    await subject.attempt(arriving, "delivered")
    rows = [await subject.row(deliveries, lease.key) for lease in (failing, arriving)]
    assert [(row["state"], row["due_at"]) for row in rows] == [("dead", None), ("delivered", None)]


async def test_an_endpoint_that_only_failed_for_so_long_is_disabled(subject: Subject) -> None:
    """Counted from the first failure after the last success; one success begins anew."""
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
async def test_our_own_faults_and_an_unlimited_time_disable_nobody(
    subject: Subject, more: dict[str, int]
) -> None:
    """A fault on this side says nothing of the endpoint; 0 means never."""
    endpoint = await subject.endpoint()
    lease = await first(subject, endpoint)
    for _ in range(3):
        await subject.attempt(lease, "retry", wait_ms=DAY, **more)
        lease = await again(subject, lease)
    row = await endpoint_of(subject, endpoint)
    assert (row["status"], row["failing_since"] is None) == ("enabled", "ours" in more)


async def test_an_endpoint_that_asks_for_peace_is_left_alone(subject: Subject) -> None:
    """`Retry-After` pauses the whole endpoint: neither a shorter wish nor a late success of another
    call ends it sooner.
    """
    endpoint = await subject.endpoint()
    one, two, three = [await first(subject, endpoint) for _ in range(3)]
    asked = subject.clock.now
    await subject.attempt(one, "retry", wait_ms=HOUR, pause_ms=HOUR)
    await subject.attempt(two, "retry", wait_ms=MINUTE, pause_ms=MINUTE)
    await subject.attempt(three, "delivered")
    assert (await endpoint_of(subject, endpoint))["paused_until"] == asked + HOUR


async def test_what_comes_while_an_endpoint_has_peace_is_put_off_without_counting(
    subject: Subject,
) -> None:
    """`later`: due when the pause is over, still a first attempt."""
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
    """Held, not dead and not due; enabling makes them due at once, as first attempts, and tells the
    workers.
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


async def test_what_is_held_too_late_is_due(subject: Subject) -> None:
    """The endpoint was enabled while a worker was about to hold its delivery: nobody would release
    it any more.
    """
    endpoint = await subject.endpoint()
    lease = await first(subject, endpoint)
    await subject.change(endpoint, status="paused")
    await subject.change(endpoint, status="enabled")
    assert await subject.write(record_attempts, DeliveryOutcome(lease, "held"))
    assert (await subject.row(deliveries, lease.key))["due_at"] == subject.clock.now


async def test_holding_and_enabling_at_once_leave_nothing_behind(
    two: tuple[Subject, Subject],
) -> None:
    """From two processes, in any order: the delivery is due."""
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


async def test_a_task_callback_that_is_gone_is_dead(subject: Subject) -> None:
    """410 makes it dead; there is no endpoint to disable, and dead after the last retry tells
    operators as any other.
    """
    await subject.key("painter")
    for result, told in [("gone", 0), ("dead", 1)]:
        task_id = await subject.completed(callback_url="https://c.test/done")
        (row,) = await subject.rows(deliveries, task_id=task_id)
        await subject.attempt(
            await subject.claimed("deliver", row["id"]), result, disable_after_ms=1
        )
        assert (await subject.row(deliveries, row["id"]))["state"] == "dead"
        assert (await subject.types()).count("delivery.exhausted") == told
    assert "endpoint.disabled" not in await subject.types()


async def test_an_endpoint_is_made_once_and_read_by_its_owner(subject: Subject) -> None:
    """Made again with the same id it is the same; another owner does not see it, `admin` sees
    all.
    """
    made = NewEndpointRow(
        new_id("endpoint"), "painter", "https://s.test/hook", ("image.task.*",), "mine", b"secret"
    )
    await subject.batch(insert_endpoints, [made])
    await subject.batch(insert_endpoints, [made])
    everybodys = await subject.endpoint(None)
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
    assert await subject.store.read(endpoint_row, everybodys, "painter") is None
    assert await subject.store.read(endpoint_row, everybodys, None) is not None
    assert [row["id"] for row in await subject.store.read(endpoint_list, "painter", 9)] == [made.id]
    assert [row["id"] for row in await subject.store.read(endpoint_list, None, 9)] == [
        everybodys,
        made.id,
    ]


async def test_an_endpoint_is_changed_by_its_owner_alone(subject: Subject) -> None:
    """What is named is changed, the rest stays; nobody else's, and none that is missing."""
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


async def test_enabling_forgets_why_an_endpoint_was_disabled(subject: Subject) -> None:
    """By its owner: dead deliveries, a reason, no operators' event; enabled again it is as new, and
    what died stays dead.
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
    """An attempt under way is still recorded, and finds no endpoint to judge."""
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
    """By owner and any of the columns; page by page, each once."""
    endpoint = await subject.endpoint()
    claimed = []
    for _ in range(3):
        claimed.append(await first(subject, endpoint))
        subject.clock.shift(SECOND)
    for _ in range(2):
        await subject.attempt(claimed[0], "retry")
        claimed[0] = await again(subject, claimed[0])
        subject.clock.shift(SECOND)

    async def listed(*arguments: object) -> list[tuple[str, int]]:
        # # each case names some
        found = await subject.store.read(delivery_list, *arguments)  # type: ignore[arg-type]
        return [(row["id"], len(made)) for row, made in found]

    everything = [(claimed[2].key, 0), (claimed[1].key, 0), (claimed[0].key, 2)]
    assert await listed("painter", 9) == everything
    assert await listed(None, 9) == everything
    assert await listed("other", 9) == []
    row = await subject.row(deliveries, claimed[1].key)
    assert await listed("painter", 9, (row["created_at"], row["id"])) == everything[2:]
    assert (
        await listed("painter", 9, None, {"task_id": row["task_id"], "state": "pending"})
        == everything[1:2]
    )
    assert (
        await listed("painter", 9, None, {"event_id": row["event_id"], "endpoint_id": endpoint})
        == everything[1:2]
    )
    assert await listed("painter", 9, None, {"state": "dead"}) == []
