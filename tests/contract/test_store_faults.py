"""Unforeseen exceptions: the store counts them on the row, retries, and parks the row at the tenth.
Crashes of a process are counted too (docs/reliability.md).
"""

import pytest

from service.db.queues import QUEUES
from service.db.tables import deliveries, events, images, replays
from service.db.transaction import Lease
from service.images.downloads import Retry
from service.queue import crashes, leases
from service.queue.crashes import CRASH_LIMIT, FAULT_LIMIT, claim_candidates, record_faults
from service.queue.outlook import outlook
from service.tasks.state import State
from tests.contract.subject import LEASE, MINUTE, SECOND, Subject, completed, stored
from tests.stores import candidate_of, fault

URL = "https://r.test/0"


async def faulty(subject: Subject, stage: str, key: str, lease: Lease | None = None) -> list[int]:
    """Records faults until the row is parked. Returns each count."""
    counts = []
    for _ in range(FAULT_LIMIT):
        lease = lease or await subject.claimed(stage, key)
        counts.append(await subject.write(record_faults, fault(lease, SECOND)))
        subject.clock.shift(SECOND)
        lease = None
        stage = "redeliver" if stage == "deliver" else stage
    return counts


async def test_a_fault_is_retried_after_its_wait(subject: Subject) -> None:
    """The fault is counted on the row, and the attempt counts too."""
    key = await subject.queued()
    lease = await subject.claimed("submit", key)
    assert await subject.write(record_faults, fault(lease, SECOND)) == 1
    subject.clock.shift(SECOND - 1)
    assert await subject.claim("submit") == []
    subject.clock.shift(1)
    (again,) = await subject.claim("submit")
    assert (again.attempts, (await subject.task(key))["submit_faults"]) == (2, 1)


async def test_a_fault_under_an_expired_lease_is_not_counted(subject: Subject) -> None:
    """Another worker has claimed the row."""
    lease = await subject.claimed("submit", await subject.queued())
    subject.clock.shift(LEASE)
    await subject.claimed("submit", lease.key)
    assert await subject.write(record_faults, fault(lease, SECOND)) == 0
    assert (
        await subject.write(record_faults, fault(Lease("submit", "task_gone", 1, 1), SECOND)) == 0
    )
    assert (await subject.task(lease.key))["submit_faults"] == 0


@pytest.mark.parametrize("stage", ["submit", "settle"])
async def test_the_tenth_fault_of_a_task_parks_it(subject: Subject, stage: str) -> None:
    """The task fails with `internal_error` and operators get an event. No row of it is due, and its
    pending images are dropped.
    """
    task_id = await subject.queued() if stage == "submit" else await subject.submitted()
    if stage == "settle":
        await subject.callback(task_id, completed(task_id, URL))
    assert await faulty(subject, stage, task_id) == list(range(1, FAULT_LIMIT + 1))
    task = await subject.task(task_id)
    assert (task["state"], task["error"]["code"], task["submit_due_at"], task["settle_due_at"]) == (
        "failed",
        "internal_error",
        None,
        None,
    )
    assert (await subject.types(task_id))[-2:] == ["image.task.failed", "task.parked"]
    event = (await subject.events(task_id))[-1]
    known = {"task_id": task_id, "stage": stage, "key": task_id, "cause": f"{FAULT_LIMIT} faults"}
    assert ("/resolve" if stage == "submit" else "/reconcile") in event["data"].pop("advice")
    assert (event["owner"], event["data"]) == ("admin", known)
    assert [
        row["state"] for row in await subject.images(task_id) if row["state"] == "pending"
    ] == []


async def test_the_tenth_fault_after_the_end_only_parks_the_row(subject: Subject) -> None:
    """The state stands and there is no second terminal event. Operators get `task.parked`."""
    task_id = await subject.completed()
    lease = await subject.requeued("settle", task_id)
    await faulty(subject, "settle", task_id, lease)
    assert await subject.types(task_id) == [
        "image.task.submitted",
        "image.task.completed",
        "task.parked",
    ]
    assert (await subject.task(task_id))["settle_due_at"] is None


async def test_the_tenth_fault_of_a_download_loses_the_image(subject: Subject) -> None:
    """The task goes on with its other results, and fails with `results_lost` after the last one."""
    task_id = await subject.storing(URL, "https://r.test/1")
    first, second = await subject.images(task_id)
    await faulty(subject, "download", first["id"])
    row = await subject.row(images, first["id"])
    assert (row["state"], row["error"], row["due_at"]) == ("lost", "internal_error", None)
    assert (await subject.types(task_id))[-1] == "task.parked"
    await subject.download(second, stored(second))
    task = await subject.task(task_id)
    assert (task["state"], task["error"]["code"]) == ("failed", "results_lost")


async def test_the_last_download_to_be_parked_ends_the_task(subject: Subject) -> None:
    """No image is left to download."""
    task_id = await subject.storing(URL)
    await faulty(subject, "download", (await subject.images(task_id))[0]["id"])
    assert await subject.state(task_id) is State.FAILED
    assert await subject.types(task_id) == [
        "image.task.submitted",
        "image.task.failed",
        "task.parked",
    ]


async def test_the_tenth_fault_of_a_delivery_makes_it_dead(subject: Subject) -> None:
    """The task stays as it is."""
    await subject.endpoint()
    task_id = await subject.submitted()
    (row,) = await subject.rows(deliveries)
    await faulty(subject, "deliver", row["id"])
    row = await subject.row(deliveries, row["id"])
    assert (row["state"], row["finished_at"] is not None, row["due_at"]) == ("dead", True, None)
    assert await subject.state(task_id) is State.SUBMITTED
    event = (await subject.events(task_id))[-1]
    assert (event["type"], event["data"]["stage"], event["data"]["task_id"]) == (
        "task.parked",
        "redeliver",
        task_id,
    )


async def test_the_tenth_fault_of_a_replay_cancels_it(subject: Subject) -> None:
    """Operators get the event. It names no task, because a replay has none."""
    key = await subject.replay()
    await faulty(subject, "replay", key)
    row = await subject.row(replays, key)
    assert (row["state"], row["finished_at"] is not None, row["due_at"]) == (
        "cancelled",
        True,
        None,
    )
    (event,) = await subject.rows(events, type="task.parked")
    data = event["data"]
    assert (data["stage"], data["key"], data["task_id"]) == ("replay", key, None)


async def overtaken(subject: Subject, stage: str) -> tuple[Lease, str]:
    """A lease whose row ended meanwhile: by a callback, by a cancel, or because the endpoint was
    disabled.
    """
    if stage == "submit":
        lease = await subject.submitting()
        await subject.callback(lease.key, completed(lease.key, URL))
        return lease, lease.key
    if stage == "cancelled":
        lease = await subject.submitting()
        assert await subject.cancel(lease.key) is None
        return lease, lease.key
    endpoint_id = await subject.endpoint()
    task_id = await subject.submitted()
    (row,) = await subject.rows(deliveries)
    lease = await subject.claimed("deliver", row["id"])
    await subject.change(endpoint_id, status="disabled")
    return lease, task_id


@pytest.mark.parametrize("stage", ["submit", "cancelled", "deliver"])
async def test_a_fault_on_a_row_that_ended_meanwhile_only_frees_the_lease(
    subject: Subject, stage: str
) -> None:
    """No fault is counted, and the row is not due again."""
    lease, _ = await overtaken(subject, stage)
    assert await subject.write(record_faults, fault(lease, SECOND)) == 0
    queue = QUEUES[lease.stage]
    row = await subject.row(queue.table, lease.key)
    assert [
        row[queue.prefix + name]
        for name in ("due_at", "lease_until", "lease_owner", "faults", "deaths")
    ] == [None, None, None, 0, 0]


@pytest.mark.parametrize("stage", ["submit", "cancelled", "deliver"])
async def test_a_row_that_ended_meanwhile_is_not_parked(
    subject: Subject, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds at the limit too. A task that a callback proved goes on to its end, and operators
    get no event.
    """
    monkeypatch.setattr(crashes, "FAULT_LIMIT", 1)
    lease, task_id = await overtaken(subject, stage)
    state, types = await subject.state(task_id), await subject.types(task_id)
    await subject.write(record_faults, fault(lease, SECOND))
    assert (await subject.state(task_id), await subject.types(task_id)) == (state, types)
    if state is State.SUBMITTED and stage == "submit":
        assert await subject.settle(task_id, completed(task_id, URL)) is State.STORING


@pytest.mark.parametrize("stage", QUEUES)
async def test_a_fault_frees_the_lease(subject: Subject, stage: str) -> None:
    """The row's next attempt does not wait for the lease to expire."""
    task_id = await subject.storing(URL) if stage == "download" else None
    if stage == "submit":
        key = await subject.queued()
    elif task_id is not None:
        key = str((await subject.images(task_id))[0]["id"])
    elif stage == "settle":
        key = await subject.submitted()
        await subject.callback(key, None, b"<html>")
    elif stage == "reconcile":
        key = await subject.submitted()
        subject.clock.now = (await subject.task(key))["settle_due_at"]
    elif stage == "replay":
        key = await subject.replay()
    else:
        await subject.endpoint()
        await subject.submitted()
        key = str((await subject.rows(deliveries))[0]["id"])
        if stage == "redeliver":
            await subject.attempt(await subject.claimed("deliver", key), "retry")
    lease = await subject.claimed(stage, key)
    assert await subject.write(record_faults, fault(lease, 0)) == 1
    queue = QUEUES[stage]
    assert (await subject.row(queue.table, key))[queue.prefix + "lease_until"] is None


async def crashed(subject: Subject, key: str, times: int) -> None:
    """Lets this number of leases for the image expire, as if their processes had crashed."""
    for _ in range(times):
        claimed = await subject.claim("download", 9)
        if key not in [lease.key for lease in claimed]:
            candidate = await subject.write(claim_candidates, candidate_of("download"))
            assert candidate is not None
            assert (candidate.lease.key, candidate.dead_lettered) == (key, False)
        subject.clock.shift(LEASE + leases.LONGEST_WAIT_MS)


async def test_a_row_of_two_crashes_is_leased_alone(subject: Subject) -> None:
    """`claim` passes over the row. After an attempt that ends without a crash, it is claimed as
    usual.
    """
    (first,) = await subject.images(await subject.storing(URL))
    assert await subject.write(claim_candidates, candidate_of("download")) is None
    await crashed(subject, first["id"], 2)
    assert await subject.claim("download", 9) == []
    assert (await subject.store.read(outlook, subject.clock.now)).candidates
    candidate = await subject.write(claim_candidates, candidate_of("download"))
    assert candidate is not None
    assert (candidate.lease.key, candidate.crashes, candidate.dead_lettered) == (
        first["id"],
        2,
        False,
    )
    assert await subject.write(claim_candidates, candidate_of("download")) is None
    assert (
        await subject.download(first, Retry("answered 500", SECOND), candidate.lease) == "pending"
    )
    subject.clock.shift(SECOND)
    assert [lease.key for lease in await subject.claim("download", 9)] == [first["id"]]
    assert not (await subject.store.read(outlook, subject.clock.now)).candidates


async def test_a_row_whose_lone_process_crashes_is_due_later_each_time(subject: Subject) -> None:
    """A burst of kills from outside parks no row. More than seven minutes pass from the first crash
    of a lone attempt to the last.
    """
    (image,) = await subject.images(await subject.storing(URL))
    await crashed(subject, image["id"], 2)
    waits = []
    for _ in range(CRASH_LIMIT - 2):
        candidate = await subject.write(claim_candidates, candidate_of("download"))
        assert candidate is not None
        assert not candidate.dead_lettered
        began, due = subject.clock.now, (await subject.row(images, image["id"]))["due_at"]
        waits.append(due - began)
        subject.clock.now = began + max(waits[-1], LEASE) - 1
        assert await subject.write(claim_candidates, candidate_of("download")) is None
        subject.clock.shift(1)
    assert waits == sorted(waits)
    assert sum(waits[:-1]) > 7 * MINUTE


async def test_five_crashes_park_a_row(subject: Subject) -> None:
    """The image is lost, the task ends with the stored images, and operators get an event. The
    processes live on.
    """
    task_id = await subject.storing(URL)
    (image,) = await subject.images(task_id)
    await crashed(subject, image["id"], CRASH_LIMIT)
    candidate = await subject.write(claim_candidates, candidate_of("download"))
    assert candidate is not None
    assert (candidate.crashes, candidate.dead_lettered) == (CRASH_LIMIT, True)
    upstream_id = (await subject.task(task_id))["upstream_id"]
    assert candidate.task_ids() == {"task_id": task_id, "upstream_id": upstream_id}
    assert await subject.state(task_id) is State.FAILED
    assert (await subject.types(task_id))[-2:] == ["image.task.failed", "task.parked"]
    assert await subject.write(claim_candidates, candidate_of("download")) is None
    assert not (await subject.store.read(outlook, subject.clock.now)).candidates
