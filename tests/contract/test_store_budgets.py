"""Budgets: checked and reserved in the transaction that inserts the task (docs/money.md)."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import text

from service.db.operator_tables import budgets, ledger
from service.db.paging import Selection
from service.db.tables import events, tasks
from service.db.transaction import Transaction
from service.tasks.accept import Inserted, insert_also_unpriced, insert_tasks
from service.tasks.budgets import Budget, BudgetState, budget_states, period_start, set_budgets
from service.tasks.rows import TaskRow
from tests.contract.subject import DAY, OWNER, Subject, completed, creates_nothing, failed, new_id

ONE, URL = 1_000_000, "https://r.test/0"
PRICED = {"credits_estimated": 3 * ONE}


async def budget(subject: Subject, credits: int | None, period: str = "total") -> BudgetState:
    limit = None if credits is None else credits * ONE
    return await subject.write(set_budgets, Budget(OWNER, period, limit))


async def figures(subject: Subject) -> tuple[int, int, int]:
    """Spent, reserved and left."""
    (state,) = await subject.store.read(budget_states, Selection(OWNER), subject.clock.now)
    assert state.left is not None
    return state.spent // ONE, state.reserved // ONE, state.left // ONE


async def insert(subject: Subject, **different: object) -> Inserted:
    return await subject.write(insert_tasks, subject.wish(**(PRICED | different)))


async def test_a_task_over_the_budget_is_not_inserted(subject: Subject) -> None:
    await budget(subject, 7)
    assert [(await insert(subject)).created for _ in range(3)] == [True, True, False]
    assert await figures(subject) == (0, 6, 1)
    assert len(await subject.rows(tasks)) == 2
    assert len(await subject.rows(ledger)) == 4
    refusal = (await insert(subject)).refusal
    assert refusal is not None
    assert refusal.message == (
        "the task needs 3 credits: the budget of 7 in total has 1 left (0 spent, 6 reserved)"
    )


async def test_a_task_that_fits_exactly_is_inserted(subject: Subject) -> None:
    await budget(subject, 3)
    assert (await insert(subject)).created
    assert await figures(subject) == (0, 3, 0)


async def test_a_batch_counts_its_own_tasks(subject: Subject) -> None:
    await budget(subject, 10)
    made = await subject.batch(insert_tasks, [subject.wish(**PRICED) for _ in range(8)])
    assert [inserted.created for inserted in made] == [True] * 3 + [False] * 5


async def test_other_owners_are_not_limited(subject: Subject) -> None:
    await budget(subject, 0)
    assert not (await insert(subject)).created
    assert (await insert(subject, owner="another")).created


async def test_a_repeated_key_is_no_new_task_for_the_budget(subject: Subject) -> None:
    await budget(subject, 3)
    wish = {"idempotency_key": "once", "idempotency_hash": "h"}
    first = await insert(subject, **wish)
    again = await insert(subject, **wish)
    assert (again.task_id, again.created, again.refusal) == (first.task_id, False, None)


async def test_a_key_that_another_process_inserts_meanwhile_is_no_new_task(
    two: tuple[Subject, Subject],
) -> None:
    """The second process waits for the lock of a budget that the first one uses up."""
    await budget(two[0], 3)
    locked = asyncio.Event()
    wish: dict[str, Any] = {**PRICED, "idempotency_key": "once", "idempotency_hash": "h"}

    def slowly(tx: Transaction, items: Sequence[TaskRow]) -> list[Inserted]:
        inserted = insert_tasks(tx, items)
        tx.write()
        locked.set()
        tx.connection.execute(text("SELECT pg_sleep(0.3)"))
        return inserted

    slow = asyncio.create_task(two[0].write(slowly, two[0].wish(**wish)))
    await locked.wait()
    again = await insert(two[1], **wish)
    assert (again.task_id, again.created, again.refusal) == ((await slow).task_id, False, None)


async def test_a_release_and_a_cheaper_end_make_room(subject: Subject) -> None:
    await budget(subject, 6)
    cheap, gone = await subject.submitted(**PRICED), await subject.submitted(**PRICED)
    assert not (await insert(subject)).created
    await subject.settle(cheap, completed(cheap, URL, credits_used=ONE))
    await subject.settle(gone, failed(gone))
    assert await figures(subject) == (1, 0, 5)
    assert (await insert(subject)).created


async def test_a_task_that_is_sent_again_keeps_its_reservation(subject: Subject) -> None:
    await budget(subject, 5)
    lease = await subject.submitting(**PRICED)
    await subject.submission(lease, creates_nothing("429", 1000, give_up_ms=DAY))
    assert not (await insert(subject)).created


async def test_a_task_without_a_price_needs_the_setting(subject: Subject) -> None:
    await budget(subject, 1)
    wish = subject.wish()
    refused = await subject.write(insert_tasks, wish)
    assert refused.refusal is not None
    assert "no price" in refused.refusal.message
    assert (await subject.write(insert_also_unpriced, wish)).created
    await budget(subject, 0)
    assert not (await subject.write(insert_also_unpriced, subject.wish())).created
    assert await subject.types() == ["budget.exhausted"]


async def test_a_new_period_has_the_whole_budget(subject: Subject) -> None:
    await budget(subject, 3, "day")
    task_id = await subject.submitted(**PRICED)
    assert not (await insert(subject)).created
    subject.clock.shift(DAY)
    assert await figures(subject) == (0, 0, 3)
    await subject.settle(task_id, completed(task_id, URL, credits_used=3 * ONE))
    assert await figures(subject) == (0, 0, 3)  # it counts for the day of its acceptance
    assert (await insert(subject)).created


async def test_operators_are_told_once_in_a_period(subject: Subject) -> None:
    await budget(subject, 3, "day")
    await subject.batch(insert_tasks, [subject.wish(**PRICED) for _ in range(4)])
    await insert(subject)
    (event,) = await subject.rows(events)
    assert event["type"] == "budget.exhausted"
    assert event["data"] == {
        "owner": OWNER,
        "period": "day",
        "limit": 3,
        "spent": 0,
        "reserved": 3,
        "left": 0,
    }
    subject.clock.shift(DAY)
    await subject.batch(insert_tasks, [subject.wish(**PRICED) for _ in range(4)])
    assert await subject.types() == ["budget.exhausted"] * 2


async def test_a_lowered_budget_counts_what_was_spent(subject: Subject) -> None:
    task_id = await subject.submitted(**PRICED)
    await subject.settle(task_id, completed(task_id, URL, credits_used=3 * ONE))
    assert (await budget(subject, 2)).left == -ONE
    assert not (await insert(subject)).created
    assert (await budget(subject, None)).left is None
    assert (await insert(subject)).created
    assert await subject.rows(budgets) == []


@pytest.mark.parametrize(
    ("period", "start"),
    [("day", datetime(2026, 2, 28, tzinfo=UTC)), ("month", datetime(2026, 2, 1, tzinfo=UTC))],
)
def test_a_period_begins_at_midnight_of_utc(period: str, start: datetime) -> None:
    for time in (start, datetime(2026, 2, 28, 23, 59, 59, 999000, tzinfo=UTC)):
        assert period_start(period, round(time.timestamp() * 1000)) == start.timestamp() * 1000


async def test_two_processes_never_exceed_a_budget(two: tuple[Subject, Subject]) -> None:
    """Two hundred tasks at once over two connections to PostgreSQL, with a budget for 50."""
    await budget(two[0], 150)
    made = await asyncio.gather(*(insert(two[n % 2], id=new_id("task")) for n in range(200)))
    assert sum(inserted.created for inserted in made) == 50
    assert await figures(two[1]) == (0, 150, 0)
    assert len(await two[0].rows(tasks)) == 50
