"""The work of a worker under a lease, one transaction after another, as in the real stages.

Each script is a generator that asks for one read or write after another. Between any two of them,
other actions may happen and the process may crash. The script calls the upstream where a real
worker does, and `luck` chooses the outcome.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

from service.db.transaction import Lease
from service.events.deliveries import DeliveryOutcome, delivery_to_send, record_attempts
from service.events.endpoints import DeliveryAttempt
from service.events.outbox import DeliveryToSend
from service.images.downloads import (
    Download,
    Lost,
    Refusal,
    Retry,
    Stored,
    image_and_origin,
    record_downloads,
)
from service.queue import leases
from service.tasks import task_queries
from service.tasks.account_breaker import SubmissionHold, hold_submissions
from service.tasks.confirm_worker import QueryPlan
from service.tasks.rows import ImageRow, TaskRow
from service.tasks.settlements import Settlement, record_settlements
from service.tasks.state import State
from service.tasks.submissions import (
    SubmissionResult,
    SubmissionStart,
    record_submissions,
    start_submissions,
)
from service.upstreams.base import Found, NoAnswer, NotCreated, NotFound, Report
from tests.contract.subject import (
    DAY,
    HOUR,
    MINUTE,
    SECOND,
    UNDECIDED,
    accepts,
    creates_nothing,
    doubts,
    new_id,
    refuses,
)
from tests.property.life_upstream import Upstream, error


@dataclass(frozen=True, slots=True)
class Read:
    query: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Write:
    operation: Callable[..., Any]
    item: Any

    @property
    def lease(self) -> Lease | None:
        return self.item if isinstance(self.item, Lease) else getattr(self.item, "lease", None)


Script = Generator[Read | Write, Any, None]


@dataclass(slots=True)
class Sent:
    """A request that left for the upstream. `nothing` means that its recorded answer proved that
    nothing was created.
    """

    lease: Lease
    nothing: bool = False


@dataclass(slots=True)
class WorkerScripts:
    """Starts the scripts of jobs. It has the upstream and the settings of the service."""

    upstream: Upstream
    clock: Callable[[], int]
    resubmits: bool = False  # DARKROOM_UNCERTAIN=resubmit
    with_callback: bool = True
    confirms: bool = True
    luck: int = 0  # the luck of the next step
    sent: dict[str, list[Sent]] = field(default_factory=dict)
    # tasks that an operator allowed to resubmit, until the next uncertain outcome
    permitted: set[str] = field(default_factory=set)
    # tasks with a callback after Darkroom ended them
    proved_late: set[str] = field(default_factory=set)
    said: dict[bytes, Report] = field(default_factory=dict)  # reports of callbacks, by body

    @property
    def plan(self) -> QueryPlan:
        return QueryPlan(self.with_callback, None, lambda: 0.5)

    def script(self, lease: Lease) -> Script:
        lives = {
            "submit": self.submit,
            "settle": self.settle,
            "reconcile": self.settle,
            "download": self.download,
        }
        return lives.get(lease.stage, self.deliver)(lease)

    # --- submit ---

    def submit(self, lease: Lease) -> Script:
        row: TaskRow | None = yield Read(task_queries.task_row, (lease.key, None))
        state = row.state if row else None
        if state is State.SUBMITTING:
            yield Write(
                record_submissions, replace(self._uncertain("its sender died"), lease=lease)
            )
        elif row and state is State.UNCERTAIN and not self._again(row):
            yield Write(record_submissions, replace(UNDECIDED, lease=lease))
        elif state not in (State.QUEUED, State.UNCERTAIN):
            yield Write(leases.done, lease)
        elif row and self.luck in (1, 11) and (state is State.UNCERTAIN or self._young(row)):
            yield Write(hold_submissions, SubmissionHold(lease, MINUTE, HOUR))
        elif (
            yield Write(
                start_submissions, SubmissionStart(lease, 70 * SECOND, state is State.UNCERTAIN)
            )
        ) is None:
            yield Write(leases.done, lease)
        else:
            sent = Sent(lease)
            self.sent.setdefault(lease.key, []).append(sent)
            result = self._call(lease.key)
            yield Write(record_submissions, replace(result, lease=lease))
            sent.nothing = isinstance(result.outcome, NotCreated)

    def _again(self, row: TaskRow) -> bool:
        return bool(row.resubmit or (self.resubmits and self._young(row)))

    def _young(self, row: TaskRow) -> bool:
        return bool(self.clock() - row.created_at < HOUR)

    def _uncertain(self, reason: str) -> SubmissionResult:
        return doubts(
            reason,
            15 * MINUTE if self.with_callback else 5 * SECOND if self.resubmits else 0,
            resend=self.resubmits,
        )

    def _call(self, task_id: str) -> SubmissionResult:
        """The real effect at the upstream, and the result that the worker gets."""
        mine, others = (
            self.upstream.of(task_id),
            [real for real in self.upstream.reals.values() if real.task_id != task_id],
        )
        match 0 if self.upstream.honest and self.luck in (6, 7) else self.luck:
            case 1 | 10 | 11:
                self.upstream.create(task_id)
                return self._uncertain("the answer was lost")
            case 2:
                return self._uncertain("the request was lost")
            case 3 | 4:
                return creates_nothing("429", 5 * SECOND * (4 - self.luck), HOUR)
            case 5:
                return refuses(400, error("invalid_request"))
            case 6 if others:
                taken = others[-1]
                self.upstream.lied_about |= {task_id, taken.task_id}
                return accepts(taken.truth, self.plan.first(None))
            case 7:
                self.upstream.create(task_id)
                self.upstream.lied_about.add(task_id)
                return creates_nothing("a lie", SECOND, HOUR)
            case 8:
                self.upstream.end(self.upstream.create(task_id), "completed", 2)
                return accepts(self.upstream.of(task_id)[-1].truth, self.plan.first(None))
            case 9 if mine:  # the upstream knows the idempotency key
                return accepts(mine[-1].truth, self.plan.first(45))
        return accepts(self.upstream.create(task_id).truth, self.plan.first(45))

    # --- settle ---

    def settle(self, lease: Lease) -> Script:
        row, callback = yield Read(task_queries.settling, (lease.key,))
        if row is None or (row.upstream_id is None and row.state is not State.SUBMITTED):
            yield Write(leases.done, lease)
            return
        believed = (
            not self.confirms
            and callback
            and row.settle_requests == 1
            and row.state == State.SUBMITTED
        )
        if believed and callback:
            answer: Any = Found(self.said[callback])
        else:
            answer = (
                NotFound()
                if row.upstream_id is None
                else self.upstream.query(row.upstream_id, self.luck)
            )
        if answer is None:
            yield Write(leases.give_back, lease)
            return
        report, expires = (
            answer.report if isinstance(answer, Found) else None,
            None if isinstance(answer, NoAnswer) else DAY,
        )
        wait = self.plan.again(lease.attempts, called_back=callback is not None)
        yield Write(
            record_settlements, Settlement(lease, report, row.settle_requests, wait, DAY, expires)
        )

    # --- download ---

    def download(self, lease: Lease) -> Script:
        row, _ = yield Read(image_and_origin, (lease.key,))
        if row is None or row.state != "pending":
            yield Write(leases.done, lease)
        else:
            yield Write(
                record_downloads, Download(lease, row.task_id, row.source_url, self._fetched(row))
            )

    def _fetched(self, row: ImageRow) -> Stored | Retry | Lost:
        sha = sha256(row.source_url.encode()).hexdigest()
        bad = (
            4 if row.wrong_count else 2 if row.stale_count else self.luck
        )  # a bad download mostly stays bad
        match bad if self.luck > 4 else self.luck:
            case 1:
                return Retry("answered 500", SECOND)
            case 2 | 3:  # the upstream gives a fresh link at the next query
                for real in self.upstream.of(row.task_id):
                    real.truth = self.upstream.renewed(real.truth)
                return Retry("answered 404", 5 * SECOND, stale=True)
            case 4:
                return Retry("no image", SECOND, wrong_sha256=sha)
            case 5:
                return Lost("refused")
            case 7:
                refusal = Refusal("files.test", "DARKROOM_EVOLINK_RESULT_HOSTS")
                return Retry("refused for now", SECOND, refused=refusal)
            case 6:
                return Retry("answered 503", 6 * HOUR)
        return Stored(f"{row.task_id}/{row.position}-{sha}.png", "image/png", 1234, sha, 768, 512)

    # --- deliver ---

    def deliver(self, lease: Lease) -> Script:
        delivery: DeliveryToSend | None = yield Read(delivery_to_send, (lease.key,))
        if delivery is None or delivery.state != "pending" or delivery.event is None:
            yield Write(leases.done, lease)
        elif delivery.url is None or delivery.endpoint_status == "disabled":
            yield Write(record_attempts, DeliveryOutcome(lease, "dead"))
        elif delivery.endpoint_status == "paused":
            yield Write(record_attempts, DeliveryOutcome(lease, "held"))
        elif (left := (delivery.paused_until or 0) - self.clock()) > 0:
            yield Write(record_attempts, DeliveryOutcome(lease, "snooze", wait_ms=left))
        else:
            yield Write(record_attempts, self._delivered(lease))

    def _delivered(self, lease: Lease) -> DeliveryOutcome:
        attempt = DeliveryAttempt(new_id("attempt"), 500 if self.luck else 204, 12, None, b"")
        match self.luck:
            case 1 | 2:
                return DeliveryOutcome(
                    lease, "retry", attempt, wait_ms=5 * SECOND, disable_after_ms=DAY
                )
            case 3:
                paused = replace(attempt, pause_ms=HOUR)
                return DeliveryOutcome(lease, "retry", paused, wait_ms=HOUR)
            case 4:
                return DeliveryOutcome(lease, "dead", attempt)
            case 5:
                return DeliveryOutcome(lease, "gone", attempt)
        return DeliveryOutcome(lease, "delivered", attempt)
