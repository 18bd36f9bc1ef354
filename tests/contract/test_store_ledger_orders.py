"""Any order of answers, callbacks, queries, refunds and crashes leaves the upstream's last word in
the ledger (docs/money.md).
"""

from collections.abc import Sequence
from random import Random
from typing import Any

import pytest

from service.db.operator_tables import ledger
from service.db.paging import Owned
from service.db.transaction import Transaction
from service.tasks.admin import cancel_tasks, reconcile_tasks
from service.tasks.settlements import Settlement, record_settlements
from service.tasks.submissions import record_submissions
from service.upstreams.base import Report, Status
from tests.contract.subject import (
    ASK_AGAIN,
    DAY,
    MINUTE,
    Subject,
    accept_callbacks,
    accepted,
    callback,
    completed,
    doubts,
    error_of,
    processing,
    upstream_id,
)

URL, STEPS = "https://r.test/0", 12


class Crash(Exception):
    """The process dies before the commit."""


class Story:
    """One task, the upstream's figures about it, and a seed that chooses what happens next."""

    def __init__(self, subject: Subject, chance: Random) -> None:
        self.subject, self.chance = subject, chance
        self.used = self.refunded = 0
        self.end = chance.choice([Status.COMPLETED, Status.COMPLETED, Status.FAILED])

    async def write(self, operation: Any, item: Any) -> Any:
        """Runs an operation, after some crashes of it, and sometimes once more."""

        def dies(tx: Transaction, items: Sequence[Any]) -> list[Any]:
            operation(tx, items)
            tx.write()
            tx.finish()
            raise Crash

        while self.chance.random() < 0.3:
            with pytest.raises(Crash):
                await self.subject.write(dies, item)
        if self.chance.random() < 0.3:
            await self.subject.write(operation, item)
        return await self.subject.write(operation, item)

    def report(self, task_id: str, *, final: bool) -> Report:
        """The upstream's word now. Its figures change from report to report."""
        self.used = self.chance.choice([0, 1, 500_000, 3_000_000, 7_250_000])
        self.refunded = self.chance.choice([0, 0, self.used // 2, self.used])
        figures: dict[str, Any] = {"credits_used": self.used, "credits_refunded": self.refunded}
        if not final:
            return processing(task_id, **figures)
        if self.end is Status.COMPLETED:
            return completed(task_id, URL, **figures)
        error = error_of("service_error")
        return Report(upstream_id(task_id), self.end, (), error, **figures)

    async def run(self) -> str:
        estimate = self.chance.choice([None, 2_000_000])
        lease = await self.subject.submitting(credits_estimated=estimate)
        self.lease, task_id = lease, lease.key
        for _ in range(self.chance.randrange(STEPS)):
            await getattr(self, self.chance.choice(["answer", "call", "query", "cancel"]))(task_id)
        if (await self.subject.task(task_id))["upstream_id"] is None:
            await self.answer(task_id, doubtful=False)
        await self.query(task_id, final=True)
        return task_id

    async def answer(self, task_id: str, *, doubtful: bool = True) -> None:
        reserved = self.chance.choice([None, 1_000_000, 15_000_000])
        result = accepted(upstream_id(task_id), credits_reserved=reserved)
        if doubtful and self.chance.random() < 0.4:
            result = doubts("no answer", MINUTE)
        row = await self.subject.task(task_id)
        if row["submit_lease_until"] is None and doubtful:
            return  # the worker has recorded its answer
        named = type(result)(self.lease, result.outcome, result.wait_ms, result.decide_ms)
        await self.write(record_submissions, named)

    async def call(self, task_id: str) -> None:
        report = self.report(task_id, final=self.chance.random() < 0.5)
        await self.write(accept_callbacks, callback(task_id, report, str(report).encode()))

    async def query(self, task_id: str, *, final: bool | None = None) -> None:
        if (await self.subject.task(task_id))["upstream_id"] is None:
            return
        await self.subject.write(reconcile_tasks, task_id)
        lease = await self.subject.asking(task_id)
        requests = (await self.subject.task(task_id))["settle_requests"]
        ended = self.chance.random() < 0.5 if final is None else final
        report = self.report(task_id, final=ended)
        await self.write(record_settlements, Settlement(lease, report, requests, ASK_AGAIN, DAY))

    async def cancel(self, task_id: str) -> None:
        if self.chance.random() < 0.3:
            await self.write(cancel_tasks, Owned(task_id, None))


@pytest.mark.parametrize("part", range(2))
async def test_the_sums_are_the_last_word_of_the_upstream(subject: Subject, part: int) -> None:
    for seed in range(part * 15, part * 15 + 15):
        story = Story(subject, Random(seed))
        task_id = await story.run()
        rows = await subject.rows(ledger, task_id=task_id)
        kinds = [(row["kind"], row["credits"], row["source"]) for row in rows]
        spent = sum(credits for kind, credits, _ in kinds if kind not in ("estimate", "reserve"))
        held = sum(credits for kind, credits, _ in kinds if kind == "reserve")
        assert (spent, held) == (story.used - story.refunded, 0), (seed, kinds)
        assert all(credits for _, credits, _ in kinds)
        assert sum(kind == "charge" for kind, *_ in kinds) <= 1
