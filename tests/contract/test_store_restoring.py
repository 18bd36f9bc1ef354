"""A store restored from a backup: no task is submitted twice, and no sequence is used twice
(docs/backup.md).
"""

import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from sqlalchemy import text

from service.db.tables import counters, steps
from service.db.transaction import Transaction
from service.tasks import task_queries
from service.tasks.accept import insert_tasks
from service.tasks.admin import TaskResolution, resolve_tasks
from service.tasks.state import State
from service.tasks.submit_worker import SubmitWorker
from service.upkeep.restoring import PAGE, SEQUENCES, Restoration, Restored, restore_stores
from tests.contract.subject import HOUR, MINUTE, SECOND, UNDECIDED, Subject, accepted, upstream_id

BACKUP_PAGE = Path(__file__).parents[2] / "docs" / "backup.md"


def restoration(subject: Subject, *, moved: bool = False) -> Restoration:
    return Restoration(subject.clock.now, 15 * MINUTE, HOUR, moved)


async def restored(subject: Subject, *, moved: bool = False) -> Restored:
    return await subject.write(restore_stores, restoration(subject, moved=moved))


async def unproved(subject: Subject) -> list[str]:
    """A task in each state in which nothing proves the outcome of its submission. The last one is
    to be resubmitted by hand.
    """
    queued, sent, doubted = (
        await subject.queued(),
        (await subject.submitting()).key,
        await subject.uncertain(),
    )
    again = await subject.uncertain()
    assert await subject.write(resolve_tasks, TaskResolution(again, resubmit=True)) is None
    return [queued, sent, doubted, again]


async def test_a_task_that_may_have_been_submitted_since_the_backup_is_uncertain(
    subject: Subject,
) -> None:
    """This includes queued tasks. They are due at the end of the time for proof, and by then too
    old for any setting to resubmit them.
    """
    ids = await unproved(subject)
    assert (await restored(subject)).uncertain == 4
    for row in [await subject.task(task_id) for task_id in ids]:
        assert (row["state"], row["resubmit"], row["submit_lease_until"]) == (
            "uncertain",
            False,
            None,
        )
        assert row["submit_due_at"] - row["created_at"] >= HOUR
        assert row["submit_outcomes"] >= 2
        assert row["doubted_at"] is not None
        assert "backup" in (await subject.rows(steps, task_id=row["id"]))[-1]["detail"]["reason"]
    subject.clock.shift(HOUR - SECOND)
    assert await subject.claim("submit", 9) == []
    subject.clock.shift(SECOND)
    assert {lease.key for lease in await subject.claim("submit", 9)} == set(ids)


async def test_an_uncertain_task_of_a_backup_is_not_resubmitted_by_a_worker(
    subject: Subject,
) -> None:
    """This holds also with DARKROOM_UNCERTAIN=resubmit. The worker decides, and the task fails with
    `submission_uncertain`.
    """
    task_id = await subject.queued()
    await restored(subject)
    subject.clock.shift(HOUR)
    row = await subject.store.read(task_queries.task_row, task_id, None)
    assert row is not None
    # The rule reads no other resource.
    resources: Any = SimpleNamespace(store=SimpleNamespace(clock=lambda: subject.clock.now))
    submitter = SubmitWorker(
        resources, cast(Any, None), cast(Any, None), (1.0,), 60.0, 3600.0, "resubmit", 900.0, 60.0
    )
    assert not submitter._resubmits(row)
    lease = await subject.claimed("submit", task_id)
    assert await subject.submission(lease, UNDECIDED) is State.FAILED
    assert (await subject.task(task_id))["error"]["code"] == "submission_uncertain"


async def test_a_late_submit_response_still_proves_a_restored_task(subject: Subject) -> None:
    """A task that was submitted after the backup is found again through the upstream."""
    lease = await subject.submitting()
    await restored(subject)
    assert await subject.submission(lease, accepted(upstream_id(lease.key))) is State.SUBMITTED


async def test_a_restored_task_with_an_upstream_id_goes_on(subject: Subject) -> None:
    """Submitted, storing and ended tasks stay as they are."""
    submitted, storing, completed = (
        await subject.submitted(),
        await subject.storing("https://r.test/0"),
        await subject.completed(),
    )
    before = [await subject.task(task_id) for task_id in (submitted, storing, completed)]
    assert (await restored(subject)).uncertain == 0
    assert [await subject.task(row["id"]) for row in before] == before


async def test_a_store_that_moved_submits_its_queued_tasks(subject: Subject) -> None:
    """No process served it after the backup, so only tasks that were uncertain before stay
    uncertain.
    """
    queued, doubted = await subject.queued(), await subject.uncertain()
    assert (await restored(subject, moved=True)).uncertain == 0
    assert [lease.key for lease in await subject.claim("submit", 9)] == [queued]
    assert await subject.state(doubted) is State.UNCERTAIN


async def test_sequences_go_on_far_above_the_backups_last(subject: Subject) -> None:
    """The same backup may be restored a second time, after the first restored store emitted
    events.
    """
    await subject.submitted()
    (last,) = [row["value"] for row in await subject.rows(counters, name="events")]
    made = restoration(subject)
    subject.clock.shift(MINUTE)
    first = await subject.write(restore_stores, made)
    assert first.sequence == last + SEQUENCES + MINUTE
    await subject.submitted()
    assert (await subject.events())[-1]["sequence"] == first.sequence + 1
    assert SEQUENCES == 10**9


async def test_thousands_of_queued_tasks_are_all_marked(subject: Subject) -> None:
    """They fill more than one page."""
    wishes = [subject.wish() for _ in range(2 * PAGE + 1)]
    await subject.batch(insert_tasks, wishes)
    assert (await restored(subject)).uncertain == len(wishes)
    assert {await subject.state(wish.id) for wish in wishes[:: PAGE // 2]} == {State.UNCERTAIN}


async def test_the_sql_statements_for_postgresql_do_the_same(two: tuple[Subject, Subject]) -> None:
    """docs/backup.md has them, for a database that the server's own tools restored."""
    subject, _ = two
    ids = await unproved(subject)
    submitted = await subject.submitted()
    (last,) = [row["value"] for row in await subject.rows(counters, name="events")]
    (block,) = re.findall(r"```sql\n(.*?)```", BACKUP_PAGE.read_text("utf-8"), re.DOTALL)

    def run(tx: Transaction, items: Sequence[str]) -> list[None]:
        for statement in (part.strip() for part in items[0].split(";")):
            if statement and statement not in ("BEGIN", "COMMIT"):
                tx.connection.execute(text(statement))
        return [None]

    await subject.write(run, block)
    assert [row["value"] for row in await subject.rows(counters, name="events")] == [
        last + SEQUENCES
    ]
    for row in [await subject.task(task_id) for task_id in ids]:
        assert (
            row["state"],
            row["resubmit"],
            row["submit_lease_until"],
            row["submit_lease_owner"],
        ) == ("uncertain", False, None, None)
        assert row["submit_outcomes"] >= 2
        assert row["submit_due_at"] >= row["created_at"] + HOUR
        assert row["doubted_at"] is not None
    assert await subject.state(submitted) is State.SUBMITTED
