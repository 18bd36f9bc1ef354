"""The pause of submission and the audit, on both stores (docs/operations.md)."""

from collections.abc import Sequence
from typing import Any

import pytest
from sqlalchemy.exc import IntegrityError

from service.db.counters import numbered_page
from service.db.operator_tables import audit
from service.db.tables import images, steps, tasks
from service.db.transaction import Lease, Transaction
from service.ops.metrics import Metrics
from service.queue import leases
from service.queue.crashes import CRASH_LIMIT, FAULT_LIMIT, claim_candidates, record_faults
from service.tasks.admin import reconcile_tasks
from service.tasks.audit import Act, ActEntry, always, forget_acts, nothing, perform, unless_refused
from service.tasks.bulk import BulkPage, TaskFilter, act_on_pages, count_tasks
from service.tasks.pause import (
    HOLD_MS,
    PauseChange,
    PauseWatch,
    change_pause,
    hold_paused,
    release_paused,
    submission_pause,
)
from service.tasks.state import State
from tests.contract.subject import DAY, HOUR, LEASE, SECOND, Opener, Subject, new_id, stored
from tests.stores import candidate_of, fault

WHY = "the upstream doubles its prices"
HELD = f"held: submission is paused: {WHY}"
URL = "https://r.test/0"


async def pause(subject: Subject, reason: str = WHY) -> bool:
    change = PauseChange(True, reason, "key_1")
    return (await subject.write(change_pause, change))[1]


async def resume(subject: Subject) -> bool:
    return (await subject.write(change_pause, PauseChange(False, None, "key_1")))[1]


async def why_held(subject: Subject, task_id: str) -> list[str]:
    rows = await subject.rows(steps, task_id=task_id)
    return [row["detail"]["message"] for row in rows if row["step"] == "task.held"]


@pytest.mark.parametrize("early", [True, False], ids=["before its look", "after its look"])
async def test_no_submission_starts_once_the_pause_is_committed(
    subject: Subject, early: bool
) -> None:
    """The transaction that would make the task `submitting` decides, and not what the worker knew.
    The task stays queued, counts no attempt, answers its waiting request, and says why, once.
    """
    lease = await subject.claimed("submit", await subject.queued())
    assert await pause(subject)
    if early:
        assert await subject.write(hold_paused, lease)
    else:
        assert await subject.start(lease) is None
    row = await subject.task(lease.key)
    assert (row["state"], row["submit_attempts"], row["submit_outcomes"]) == ("queued", 0, 1)
    assert row["submit_due_at"] == subject.clock.now + HOLD_MS
    assert await subject.claim("submit", 5) == []
    subject.clock.shift(HOLD_MS)
    (again,) = await subject.claim("submit", 5)
    assert await subject.write(hold_paused, again)
    assert await why_held(subject, lease.key) == [HELD]


async def test_a_submission_that_is_under_way_is_recorded_during_a_pause(subject: Subject) -> None:
    """Its request may have left. The start that runs again after a commit without an answer is the
    same start.
    """
    lease = await subject.submitting()
    await pause(subject)
    assert await subject.start(lease) is not None
    assert await subject.state(lease.key) is State.SUBMITTING


async def test_an_uncertain_task_is_not_sent_again_during_a_pause(subject: Subject) -> None:
    task_id = await subject.uncertain(SECOND)
    await pause(subject)
    subject.clock.shift(SECOND)
    lease = await subject.claimed("submit", task_id)
    assert await subject.start(lease, resubmit=True) is None
    assert await subject.state(task_id) is State.UNCERTAIN


async def test_held_tasks_are_due_once_the_pause_ends(opener: Opener, clock: object) -> None:
    """Also those of a process that is gone, in their turn, and not before."""
    async with opener("gone") as store:
        gone = Subject(store, clock)  # type: ignore[arg-type]
        first, second = await gone.queued(), await gone.queued(owner="other")
        await pause(gone)
        for lease in await gone.claim("submit", 5):
            assert await gone.write(hold_paused, lease)
    async with opener("next") as store:
        subject = Subject(store, clock)  # type: ignore[arg-type]
        watch = PauseWatch(store, Metrics())
        await watch.look()
        assert watch.pause.message == HELD
        assert await subject.claim("submit", 5) == []
        assert await subject.write(release_paused, 5) == 0
        await resume(subject)
        await watch.look()
        assert {lease.key for lease in await subject.claim("submit", 5)} == {first, second}
        assert watch.pause.message is None


async def test_a_process_that_starts_after_a_resume_releases_what_is_held(
    opener: Opener, clock: object
) -> None:
    """The process that resumed died before it made the tasks due."""
    async with opener("one") as store:
        one = Subject(store, clock)  # type: ignore[arg-type]
        await pause(one)
        lease = await one.claimed("submit", await one.queued())
        await one.write(hold_paused, lease)
        await resume(one)
    async with opener("two") as store:
        await PauseWatch(store, Metrics()).look()
        two = Subject(store, clock)  # type: ignore[arg-type]
        assert [each.key for each in await two.claim("submit", 5)] == [lease.key]


async def test_a_worker_that_learns_late_of_a_resume_sends_the_task(subject: Subject) -> None:
    await pause(subject)
    await resume(subject)
    lease = await subject.claimed("submit", await subject.queued())
    assert not await subject.write(hold_paused, lease)
    assert await subject.start(lease) is not None


async def test_operators_hear_of_the_beginning_and_the_end_of_a_pause(subject: Subject) -> None:
    """A second pause changes the reason, and a second resume changes nothing."""
    changes = [await pause(subject, "a"), await pause(subject, "b")]
    state = await subject.store.read(submission_pause)
    subject.clock.shift(90 * SECOND)
    changes += [await resume(subject), await resume(subject)]
    assert changes == [True, False, True, False]
    assert (state.reason, state.paused_at) == ("b", subject.clock.now - 90 * SECOND)
    paused, resumed = await subject.events()
    assert (paused["type"], paused["data"]["reason"]) == ("submission.paused", "a")
    assert (resumed["type"], resumed["data"]["seconds"]) == ("submission.resumed", 90)


# --- the audit


def act(operation: object = nothing, item: object = None, judge: object = always) -> Act:
    entry = ActEntry(new_id("act"), "admin", "key_1", "test.act", "task_1", "why")
    return Act(entry, operation, item, judge)  # type: ignore[arg-type]


def fails(tx: Transaction, items: Sequence[None]) -> list[None]:
    """Violates a unique key after its first row."""
    row = dict.fromkeys(("sequence", "time"), 0)
    texts = dict.fromkeys(("id", "owner", "action", "outcome"), "x")
    tx.connection.execute(audit.insert(), [row | texts, row | texts])
    return [None] * len(items)


async def test_an_act_and_its_entry_are_one_transaction(subject: Subject) -> None:
    """An act that fails leaves no entry, and one that is refused says why."""
    with pytest.raises(IntegrityError):
        await subject.write(perform, act(fails))
    assert await subject.rows(audit) == []
    refused = act(reconcile_tasks, "task_gone", unless_refused)
    assert (await subject.write(perform, refused))[0] == "missing"
    (row,) = await subject.rows(audit)
    assert (row["outcome"], row["time"], row["key_id"]) == ("missing", subject.clock.now, "key_1")


async def test_an_act_whose_commit_got_no_answer_has_one_entry(subject: Subject) -> None:
    once = act()
    await subject.write(perform, once)
    await subject.write(perform, once)
    assert [row["id"] for row in await subject.rows(audit)] == [once.entry.id]


async def test_readers_of_the_audit_continue_after_an_entry(subject: Subject) -> None:
    acts = [act() for _ in range(5)]
    await subject.batch(perform, acts)
    ids = [each.entry.id for each in acts]
    read = subject.store.read
    first = await read(numbered_page, audit, None, 2)
    assert first is not None
    then = await read(numbered_page, audit, first[-1]["id"], 10, action="test.act", owner=None)
    assert then is not None
    assert [row["id"] for row in (*first, *then)] == ids
    assert await read(numbered_page, audit, "act_gone", 10) is None


async def test_retention_deletes_old_entries_alone(subject: Subject) -> None:
    await subject.write(perform, act())
    subject.clock.shift(DAY)
    await subject.write(perform, new := act())
    assert await subject.write(forget_acts, subject.clock.now) == 1
    assert [row["id"] for row in await subject.rows(audit)] == [new.entry.id]


# --- acts in bulk


async def parked_by_faults(subject: Subject, stage: str, lease: Lease) -> None:
    for _ in range(FAULT_LIMIT):
        await subject.write(record_faults, fault(lease, SECOND))
        subject.clock.shift(SECOND)
        (lease,) = await subject.claim(stage) or (lease,)


async def parked_by_crashes(subject: Subject, stage: str, _: Lease) -> None:
    while True:
        subject.clock.shift(max(LEASE, 400 * SECOND))
        found = await subject.write(claim_candidates, candidate_of(stage))
        if found is None:
            await subject.claim(stage)
        elif found.dead_lettered:
            assert found.crashes == CRASH_LIMIT
            return


async def count(subject: Subject, name: str = "requeue", **wanted: Any) -> int:
    return await subject.store.read(count_tasks, name, TaskFilter(**wanted))


async def act_on(subject: Subject, name: str, **wanted: Any) -> tuple[int, int]:
    page = BulkPage(name, TaskFilter(**wanted), (0, ""), subject.clock.now)
    result = await subject.write(act_on_pages, page)
    return result.done, result.refused


@pytest.mark.parametrize("parked", [parked_by_faults, parked_by_crashes])
async def test_a_dead_lettered_download_is_requeued(subject: Subject, parked: object) -> None:
    """The row starts anew with no fault. It is counted until then and not after it."""
    task_id = await subject.storing(URL)
    (image,) = await subject.images(task_id)
    lease = await subject.claimed("download", image["id"])
    await parked(subject, "download", lease)  # type: ignore[operator]
    assert await subject.state(task_id) is State.FAILED
    assert (await count(subject), await count(subject, state="completed")) == (1, 0)
    assert await act_on(subject, "requeue") == (1, 0)
    row = await subject.row(images, image["id"])
    assert (row["state"], row["faults"], row["due_at"] is not None) == ("pending", 0, True)
    assert await count(subject) == 0
    assert await subject.download(row, stored(row)) == "stored"


async def test_a_dead_lettered_query_is_requeued(subject: Subject) -> None:
    task_id = await subject.submitted()
    lease = await subject.requeued("settle", task_id)
    await parked_by_faults(subject, "settle", lease)
    assert await count(subject, owner=(await subject.task(task_id))["owner"]) == 1
    assert await act_on(subject, "requeue") == (1, 0)
    row = await subject.task(task_id)
    assert (row["settle_faults"], row["settle_due_at"]) == (0, subject.clock.now)
    assert await count(subject) == 0


async def test_only_uncertain_tasks_are_resolved_in_bulk(subject: Subject) -> None:
    """A filter narrows them, and the other tasks stay as they are."""
    uncertain = [await subject.uncertain(owner="a"), await subject.uncertain(owner="a")]
    other, submitted = await subject.uncertain(owner="b"), await subject.submitted(owner="a")
    assert await count(subject, "resolve", owner="a") == 2
    assert await act_on(subject, "resolve", owner="a") == (2, 0)
    assert [await subject.state(id) for id in uncertain] == [State.FAILED, State.FAILED]
    assert await subject.state(other) is State.UNCERTAIN
    assert await subject.state(submitted) is State.SUBMITTED


async def test_tasks_of_a_time_are_reconciled_in_bulk(subject: Subject) -> None:
    """Queued tasks have nothing to ask for and do not count."""
    early = await subject.submitted()
    subject.clock.shift(HOUR)
    late, _ = await subject.submitted(), await subject.queued()
    wanted = TaskFilter(since=subject.clock.now)
    assert await subject.store.read(count_tasks, "reconcile", wanted) == 1
    page = BulkPage("reconcile", wanted, (0, ""), subject.clock.now)
    assert (await subject.write(act_on_pages, page)).done == 1
    requests = {row["id"]: row["settle_requests"] for row in await subject.rows(tasks)}
    assert (requests[early], requests[late]) == (0, 1)
    assert leases.holds(await subject.claimed("settle", late), await subject.task(late))
