"""Settling: the upstream is asked, its word is mapped to one outcome and recorded once. Callback
and reconcile meet here.
"""

from dataclasses import dataclass

import structlog

from service.db.transaction import Lease
from service.errors import NoPlace
from service.queue import leases
from service.queue.checkpoints import checkpoint
from service.queue.limiter import Kind
from service.resources import Resources
from service.tasks import task_queries
from service.tasks.reconcile import Plan
from service.tasks.rows import TaskRow
from service.tasks.settling import Settlement, record_settlements
from service.tasks.state import TERMINAL, State
from service.upstreams.base import Found, NoAnswer, NotFound, QueryOutcome, Report, throttled

log = structlog.get_logger()

PATIENCE_S = (
    2.0  # reconciling gives its row back when it finds no place at the upstream for so long
)


@dataclass(frozen=True, slots=True)
class Settler:
    """Stages `settle`, for what somebody asked for, and `reconcile`, for the rest.

    `confirm` False: a callback's token is enough (`EVOLINK_CONFIRM=never`).
    """

    resources: Resources
    plan: Plan
    confirm: bool
    task_ttl_s: float
    result_ttl_s: float

    async def run(self, lease: Lease) -> None:
        found = await self.resources.store.read(task_queries.settling, lease.key)
        if found is None or (
            found[0].upstream_id is None and found[0].state is not State.SUBMITTED
        ):
            await self.resources.store.write(leases.done, lease)
            return
        row, callback = found
        checkpoint("settle.claimed")
        believed = self._believed(row, callback)
        answer: QueryOutcome
        if believed:
            answer = Found(believed)
        elif (
            row.upstream_id is None
        ):  # another task proved that the id was its own: nobody to ask, until its own answer comes
            answer = NotFound()
        else:
            try:
                answer = await self._query(lease, row.upstream_id)
            except NoPlace:
                await self.resources.store.write(leases.give_back, lease)
                return
        retry_after = answer.retry_after if isinstance(answer, NoAnswer) else None
        wait_ms = self.plan.again(
            lease.attempts, called_back=callback is not None, retry_after=retry_after
        )
        if callback is None:
            log.info(
                "reconcile.queried",
                attempt=lease.attempts,
                answer=_word(answer),
                wait_s=wait_ms / 1000,
            )
        checkpoint("settle.answered")
        report = answer.report if isinstance(answer, Found) else None
        settlement = Settlement(
            lease,
            report,
            requests=row.settle_requests,
            wait_ms=wait_ms,
            result_ttl_ms=round(self.result_ttl_s * 1000),
            expires_ms=round(self.task_ttl_s * 1000) if isinstance(answer, NotFound) else None,
        )
        recorded = await self.resources.store.write(record_settlements, settlement)
        checkpoint("settle.recorded")
        if (
            recorded is not None
            and report is not None
            and report.final
            and row.state not in TERMINAL
        ):
            log.info(
                "task.confirmed",
                owner=row.owner,
                upstream_id=row.upstream_id,
                status=report.status,
                results=len(report.results),
            )

    async def _query(self, lease: Lease, upstream_id: str) -> QueryOutcome:
        """NoPlace: reconciling, which comes last, found none in time; a callback may ask for the
        same row meanwhile.
        """
        kind: Kind = "confirm" if lease.stage == "settle" else "reconcile"
        async with self.resources.limiter.slot(
            kind, None if kind == "confirm" else PATIENCE_S
        ) as record:
            answer = await self.resources.upstream.query(upstream_id)
            record(throttled(answer))
        return answer

    def _believed(self, row: TaskRow, callback: bytes | None) -> Report | None:
        """What the first callback said, where no query is wanted and nothing contradicted it
        yet.
        """
        if (
            self.confirm
            or callback is None
            or row.settle_requests != 1
            or row.state is not State.SUBMITTED
        ):
            return None
        return self.resources.upstream.read_callback(callback)


def _word(answer: QueryOutcome) -> str:
    if isinstance(answer, Found):
        return answer.report.status or "undocumented"
    return "not_found" if isinstance(answer, NotFound) else answer.reason
