"""The ledger: each step of a task's life appends its entries, once (docs/money.md)."""

from collections.abc import Awaitable, Callable, Sequence

import pytest
from sqlalchemy import update

from service.db.operator_tables import ledger
from service.db.paging import Owned
from service.db.tables import tasks
from service.db.transaction import Transaction
from service.queue.crashes import FAULT_LIMIT, Fault, record_faults
from service.tasks.admin import TaskResolution, reconcile_tasks, resolve_tasks
from service.tasks.state import State
from service.tasks.transitions import dead_letter_task
from service.upkeep.retention_sql import erase_tasks, strip_tasks
from service.upstreams.base import Report, Status
from tests.contract.subject import (
    DAY,
    LOST,
    MINUTE,
    UNDECIDED,
    Subject,
    accepted,
    completed,
    creates_nothing,
    doubts,
    error_of,
    failed,
    processing,
    refuses,
    upstream_id,
)

URL = "https://r.test/0"
ONE = 1_000_000
ESTIMATED = {"credits_estimated": 3 * ONE}
ACCEPTED = ["estimate 3 catalogue", "reserve 3 catalogue"]


async def entries(subject: Subject, task_id: str) -> list[str]:
    """The entries of a task in their order: kind, credits and source."""
    rows = await subject.rows(ledger, task_id=task_id)
    return [f"{row['kind']} {row['credits'] / ONE:g} {row['source']}" for row in rows]


async def held_and_spent(subject: Subject, task_id: str) -> tuple[int, int]:
    rows = await subject.rows(ledger, task_id=task_id)
    held = sum(row["credits"] for row in rows if row["kind"] == "reserve")
    spent = sum(row["credits"] for row in rows if row["kind"] in ("charge", "refund", "adjust"))
    return held, spent


async def a_completed_task(subject: Subject) -> str:
    task_id = await subject.submitted(**ESTIMATED)
    await subject.settle(task_id, completed(task_id, URL, credits_used=3 * ONE))
    return task_id


async def a_refused_task(subject: Subject) -> str:
    lease = await subject.submitting(**ESTIMATED)
    await subject.submission(lease, refuses(400, error_of("invalid_parameters")))
    return lease.key


async def a_task_that_nobody_took(subject: Subject) -> str:
    lease = await subject.submitting(**ESTIMATED)
    await subject.submission(lease, creates_nothing("429", 1000, give_up_ms=0))
    return lease.key


async def a_task_that_is_sent_again(subject: Subject) -> str:
    lease = await subject.submitting(**ESTIMATED)
    await subject.submission(lease, creates_nothing("429", 1000, give_up_ms=DAY))
    return lease.key


async def a_failed_task(subject: Subject) -> str:
    task_id = await subject.submitted(**ESTIMATED)
    await subject.settle(task_id, failed(task_id))
    return task_id


async def a_failed_task_that_is_charged(subject: Subject) -> str:
    task_id = await subject.submitted(**ESTIMATED)
    report = Report(
        upstream_id(task_id), Status.FAILED, (), error_of("service_error"), credits_used=ONE
    )
    await subject.settle(task_id, report)
    return task_id


async def a_task_whose_figure_is_withdrawn_by_its_failure(subject: Subject) -> str:
    task_id = await subject.submitted(**ESTIMATED)
    await subject.settle(task_id, processing(task_id, credits_used=ONE))
    await subject.settle(task_id, failed(task_id))
    return task_id


async def a_task_cancelled_before_it_was_sent(subject: Subject) -> str:
    task_id = await subject.queued(**ESTIMATED)
    assert await subject.cancel(task_id) is None
    return task_id


async def a_task_cancelled_here_that_the_upstream_makes(subject: Subject) -> str:
    task_id = await subject.submitted(**ESTIMATED)
    assert await subject.cancel(task_id) is None
    assert await held_and_spent(subject, task_id) == (3 * ONE, 0)
    await subject.settle(task_id, completed(task_id, URL, credits_used=2 * ONE))
    return task_id


async def a_task_cancelled_here_that_fails_there(subject: Subject) -> str:
    task_id = await subject.submitted(**ESTIMATED)
    assert await subject.cancel(task_id) is None
    await subject.settle(task_id, failed(task_id))
    return task_id


async def a_task_cancelled_here_whose_cost_is_not_named(subject: Subject) -> str:
    task_id = await subject.submitted(**ESTIMATED)
    assert await subject.cancel(task_id) is None
    await subject.settle(task_id, completed(task_id, URL))
    return task_id


async def a_cancelled_task_whose_reservation_is_its_cost(subject: Subject) -> str:
    lease = await subject.submitting(**ESTIMATED)
    await subject.submission(lease, accepted(upstream_id(lease.key), credits_reserved=2 * ONE))
    assert await subject.cancel(lease.key) is None
    await subject.settle(lease.key, completed(lease.key, URL))
    return lease.key


async def an_erased_task_whose_cost_is_not_named(subject: Subject) -> str:
    task_id = await an_uncertain_task_that_failed(subject)
    assert (await subject.write(erase_tasks, Owned(task_id, None))).refused is None
    await subject.callback(task_id, completed(task_id, URL))
    await subject.settle(task_id, completed(task_id, URL))
    assert await subject.images(task_id) == []
    return task_id


async def a_cancelled_task_whose_queries_are_parked(subject: Subject) -> str:
    task_id = await subject.submitted(**ESTIMATED)
    assert await subject.cancel(task_id) is None
    await parked(subject, task_id)
    return task_id


async def a_task_that_is_parked(subject: Subject) -> str:
    task_id = await subject.submitted(**ESTIMATED)
    await parked(subject, task_id)
    return task_id


async def parked(subject: Subject, task_id: str) -> None:
    for _ in range(FAULT_LIMIT):
        fault = Fault(await subject.asking(task_id), 0, dead_letter_task)
        await subject.write(record_faults, fault)
    assert (await subject.task(task_id))["settle_due_at"] is None


async def a_task_whose_callback_alone_names_a_cost(subject: Subject) -> str:
    """The query denies the outcome, and what the callbacks said of costs is in no entry."""
    task_id = await subject.submitted(**ESTIMATED)
    figures = {"credits_reserved": 900 * ONE, "credits_used": 900 * ONE}
    await subject.callback(task_id, processing(task_id, **figures))
    await subject.callback(task_id, completed(task_id, URL, **figures, credits_refunded=ONE))
    assert await held_and_spent(subject, task_id) == (3 * ONE, 0)
    await subject.settle(task_id, failed(task_id))
    return task_id


async def a_task_cancelled_while_its_request_was_on_its_way(subject: Subject) -> str:
    lease = await subject.submitting(**ESTIMATED)
    assert await subject.cancel(lease.key) is None
    assert await held_and_spent(subject, lease.key) == (0, 0)
    answer = accepted(upstream_id(lease.key), credits_reserved=3 * ONE)
    await subject.submission(lease, answer)
    await subject.settle(lease.key, completed(lease.key, URL, credits_used=3 * ONE))
    return lease.key


async def an_uncertain_task_that_was_made(subject: Subject) -> str:
    task_id = await subject.uncertain(**ESTIMATED)
    await subject.callback(task_id, completed(task_id, URL, credits_used=3 * ONE))
    await subject.settle(task_id, completed(task_id, URL, credits_used=3 * ONE))
    return task_id


async def an_uncertain_task_that_failed(subject: Subject) -> str:
    task_id = await subject.uncertain(0, **ESTIMATED)
    await subject.submission(await subject.claimed("submit", task_id), UNDECIDED)
    return task_id


async def an_uncertain_task_that_an_operator_gave_up(subject: Subject) -> str:
    task_id = await subject.uncertain(**ESTIMATED)
    assert await subject.write(resolve_tasks, TaskResolution(task_id)) is None
    return task_id


async def a_late_result(subject: Subject) -> str:
    task_id = await an_uncertain_task_that_failed(subject)
    report = completed(task_id, URL, credits_used=3 * ONE)
    await subject.callback(task_id, report)
    await subject.settle(task_id, report)
    return task_id


async def a_failed_task_that_a_false_callback_names(subject: Subject) -> str:
    """The upstream does not know its id, and is asked again for as long as it might."""
    task_id = await an_uncertain_task_that_failed(subject)
    await subject.callback(task_id, completed(task_id, URL, credits_used=3 * ONE))
    await subject.settle(task_id, None, expires_ms=DAY)
    assert (await subject.task(task_id))["settle_due_at"] is not None
    return task_id


async def an_expired_task(subject: Subject) -> str:
    task_id = await subject.submitted(**ESTIMATED)
    await subject.settle(task_id, None, expires_ms=0)
    assert await subject.state(task_id) is State.EXPIRED
    return task_id


async def fewer_images_than_asked(subject: Subject) -> str:
    task_id = await subject.submitted(**ESTIMATED)
    await subject.settle(task_id, completed(task_id, URL, credits_used=ONE))
    return task_id


async def reserved_and_used_that_differ_fivefold(subject: Subject) -> str:
    lease = await subject.submitting(**ESTIMATED)
    await subject.submission(lease, accepted(upstream_id(lease.key), credits_reserved=15 * ONE))
    await subject.settle(lease.key, completed(lease.key, URL, credits_used=3 * ONE))
    return lease.key


async def a_cost_over_the_reservation(subject: Subject) -> str:
    lease = await subject.submitting(**ESTIMATED)
    await subject.submission(lease, accepted(upstream_id(lease.key), credits_reserved=ONE))
    await subject.settle(lease.key, completed(lease.key, URL, credits_used=5 * ONE))
    return lease.key


async def asked_again(subject: Subject, task_id: str, report: Report) -> None:
    assert await subject.write(reconcile_tasks, task_id) is None
    await subject.settle(task_id, report)


async def a_refund_that_comes_later(subject: Subject) -> str:
    task_id = await a_completed_task(subject)
    report = completed(task_id, URL, credits_used=3 * ONE, credits_refunded=2 * ONE)
    await asked_again(subject, task_id, report)
    return task_id


async def a_cost_that_is_lowered_later(subject: Subject) -> str:
    task_id = await a_completed_task(subject)
    await asked_again(subject, task_id, completed(task_id, URL, credits_used=ONE))
    return task_id


async def a_cost_that_is_raised_later(subject: Subject) -> str:
    task_id = await a_completed_task(subject)
    await asked_again(subject, task_id, completed(task_id, URL, credits_used=4 * ONE))
    return task_id


async def a_completed_task_without_a_figure(subject: Subject) -> str:
    lease = await subject.submitting(**ESTIMATED)
    await subject.submission(lease, accepted(upstream_id(lease.key), credits_reserved=2 * ONE))
    await subject.settle(lease.key, completed(lease.key, URL))
    assert await held_and_spent(subject, lease.key) == (2 * ONE, 0)
    (image,) = await subject.images(lease.key)
    await subject.download(image, LOST)
    return lease.key


async def a_task_without_a_price(subject: Subject) -> str:
    task_id = await subject.submitted()
    await subject.settle(task_id, completed(task_id, URL, credits_used=ONE))
    return task_id


CASES: dict[Callable[[Subject], Awaitable[str]], list[str]] = {
    a_completed_task: [*ACCEPTED, "reserve -3 query", "charge 3 query"],
    a_refused_task: [*ACCEPTED, "reserve -3 submit"],
    a_task_that_nobody_took: [*ACCEPTED, "reserve -3 submit"],
    a_task_that_is_sent_again: ACCEPTED,
    a_failed_task: [*ACCEPTED, "reserve -3 query"],
    a_failed_task_that_is_charged: [*ACCEPTED, "reserve -3 query", "charge 1 query"],
    a_task_whose_figure_is_withdrawn_by_its_failure: [
        *ACCEPTED,
        "reserve -3 query",
        "charge 1 query",
        "refund -1 query",
    ],
    a_task_cancelled_before_it_was_sent: [*ACCEPTED, "reserve -3 operator"],
    a_task_cancelled_here_that_the_upstream_makes: [
        *ACCEPTED,
        "reserve -3 query",
        "charge 2 query",
    ],
    a_task_cancelled_here_that_fails_there: [*ACCEPTED, "reserve -3 query"],
    a_task_cancelled_here_whose_cost_is_not_named: [
        *ACCEPTED,
        "reserve -3 query",
        "charge 3 catalogue",
    ],
    a_cancelled_task_whose_reservation_is_its_cost: [
        *ACCEPTED,
        "reserve -1 submit",
        "reserve -2 query",
        "charge 2 submit",
    ],
    an_erased_task_whose_cost_is_not_named: [*ACCEPTED, "reserve -3 submit", "charge 3 catalogue"],
    a_cancelled_task_whose_queries_are_parked: [*ACCEPTED, "reserve -3 operator"],
    a_task_that_is_parked: [*ACCEPTED, "reserve -3 operator"],
    a_task_whose_callback_alone_names_a_cost: [*ACCEPTED, "reserve -3 query"],
    a_task_cancelled_while_its_request_was_on_its_way: [
        *ACCEPTED,
        "reserve -3 operator",
        "reserve 3 submit",
        "reserve -3 query",
        "charge 3 query",
    ],
    an_uncertain_task_that_was_made: [*ACCEPTED, "reserve -3 query", "charge 3 query"],
    an_uncertain_task_that_failed: [*ACCEPTED, "reserve -3 submit"],
    an_uncertain_task_that_an_operator_gave_up: [*ACCEPTED, "reserve -3 operator"],
    a_late_result: [*ACCEPTED, "reserve -3 submit", "charge 3 query"],
    a_failed_task_that_a_false_callback_names: [*ACCEPTED, "reserve -3 submit"],
    an_expired_task: [*ACCEPTED, "reserve -3 query"],
    fewer_images_than_asked: [*ACCEPTED, "reserve -3 query", "charge 1 query"],
    reserved_and_used_that_differ_fivefold: [
        *ACCEPTED,
        "reserve 12 submit",
        "reserve -15 query",
        "charge 3 query",
    ],
    a_cost_over_the_reservation: [
        *ACCEPTED,
        "reserve -2 submit",
        "reserve -1 query",
        "charge 5 query",
    ],
    a_refund_that_comes_later: [*ACCEPTED, "reserve -3 query", "charge 3 query", "refund -2 query"],
    a_cost_that_is_lowered_later: [
        *ACCEPTED,
        "reserve -3 query",
        "charge 3 query",
        "refund -2 query",
    ],
    a_cost_that_is_raised_later: [
        *ACCEPTED,
        "reserve -3 query",
        "charge 3 query",
        "adjust 1 query",
    ],
    a_completed_task_without_a_figure: [
        *ACCEPTED,
        "reserve -1 submit",
        "reserve -2 operator",
        "charge 2 submit",
    ],
    a_task_without_a_price: ["charge 1 query"],
}


@pytest.mark.parametrize("life", CASES, ids=lambda life: life.__name__)
async def test_each_end_of_a_task_has_its_entries(
    subject: Subject, life: Callable[[Subject], Awaitable[str]]
) -> None:
    task_id = await life(subject)
    assert await entries(subject, task_id) == CASES[life]
    held, _ = await held_and_spent(subject, task_id)
    assert (held == 0) == (life is not a_task_that_is_sent_again)


async def test_an_equal_report_adds_no_entry(subject: Subject) -> None:
    task_id = await a_completed_task(subject)
    report = completed(task_id, URL, credits_used=3 * ONE)
    for _ in range(3):
        await asked_again(subject, task_id, report)
        await subject.callback(task_id, report)
    assert await entries(subject, task_id) == CASES[a_completed_task]


async def test_a_doubted_task_keeps_its_reservation(subject: Subject) -> None:
    task_id = await subject.uncertain(**ESTIMATED)
    assert await entries(subject, task_id) == ACCEPTED
    lease = await subject.requeued("submit", task_id)
    assert await subject.start(lease, resubmit=True) is not None
    await subject.submission(lease, doubts("no answer again", MINUTE))
    assert await entries(subject, task_id) == ACCEPTED


async def test_the_entries_of_one_transaction_follow_each_other(subject: Subject) -> None:
    """The sequence of the entries has no gap and no double, across tasks and transactions."""
    for _ in range(3):
        await a_completed_task(subject)
    rows = await subject.rows(ledger)
    assert [row["sequence"] for row in rows] == list(range(1, len(rows) + 1))
    assert len({row["id"] for row in rows}) == len(rows) == 12


async def test_entries_survive_erasure_and_retention(subject: Subject) -> None:
    task_id = await a_refused_task(subject)
    before = await subject.rows(ledger)
    assert (await subject.write(erase_tasks, Owned(task_id, None))).refused is None
    other = await a_refused_task(subject)
    subject.clock.shift(DAY)
    assert (await subject.write(strip_tasks, subject.clock.now)).tasks == 1
    assert (await subject.task(other))["erased_at"] is not None
    after = await subject.rows(ledger)
    assert [dict(row) for row in after[: len(before)]] == [dict(row) for row in before]
    assert await entries(subject, other) == CASES[a_refused_task]


async def test_a_transaction_that_fails_leaves_no_entry(subject: Subject) -> None:
    task_id = await subject.submitted(**ESTIMATED)

    def charge_and_fail(tx: Transaction, items: Sequence[TaskResolution]) -> list[str | None]:
        resolve_tasks(tx, items)
        tx.connection.execute(update(tasks).values(owner=None))
        return [None]

    with pytest.raises(Exception, match="owner"):
        await subject.write(charge_and_fail, TaskResolution(task_id))
    assert await entries(subject, task_id) == ACCEPTED
