"""Delivers events: one signed attempt per lease, and what it leads to. First attempts and retries
have slots of their own.
"""

import asyncio
import time
from dataclasses import asdict, dataclass, field

import structlog

from service.db.paging import Row
from service.db.shared_reads import SharedReads
from service.db.transaction import Lease
from service.errors import StoreUnavailable
from service.events.deliveries import (
    DeliveryOutcome,
    ManualAttempt,
    deliveries_to_send,
    delivery_to_send,
    record_attempts,
    record_manual_attempts,
)
from service.events.delivery_order import RateRequest, take_times
from service.events.endpoints import DeliveryAttempt
from service.events.outbox import DeliveryToSend
from service.events.webhooks import WebhookSender
from service.ops import tracing
from service.queue.backoff import scheduled_wait
from service.queue.checkpoints import checkpoint
from service.queue.limiter import EndpointLimiter
from service.resources import Resources
from service.strict_json import JSON

log = structlog.get_logger()

RECORD_S = 1.0  # between tries to record an outcome while the store is unavailable
HINT_S = 0.01  # after the time that a rate gave


@dataclass(slots=True)
class DeliveryWorker:
    """Stages `deliver` and `redeliver`."""

    sender: WebhookSender
    schedule: tuple[float, ...]
    disable_after_s: float
    limiter: EndpointLimiter = field(default_factory=lambda: EndpointLimiter(time.monotonic))
    in_order: set[str] = field(default_factory=set)  # keys of ordered deliveries on their way
    rows: SharedReads[DeliveryToSend] = field(init=False)

    def __post_init__(self) -> None:
        self.rows = SharedReads(self.sender.resources.store, deliveries_to_send)

    async def run(self, lease: Lease) -> None:
        delivery: DeliveryToSend | None = lease.row or await self._read(lease)
        if delivery is None:
            return
        tracing.work_for(delivery.origin, owner=delivery.owner, task_id=delivery.task_id)
        checkpoint("delivery.claimed")
        outcome = self._without_request(lease, delivery)
        if outcome is None and delivery.paced:
            outcome = await self._wait_turn(lease, delivery)
        if outcome is None:
            outcome = await self._attempt(lease, delivery)
        if outcome.attempt is None:
            await self.sender.resources.store.write(record_attempts, outcome)
            return
        checkpoint("delivery.answered")
        leased = await self._record(outcome)
        checkpoint("delivery.recorded")
        self._report(delivery, outcome, leased)

    async def _read(self, lease: Lease) -> DeliveryToSend | None:
        alone = self.sender.resources.store.read
        return await self.rows.read(lease.key) or await alone(delivery_to_send, lease.key)

    async def _attempt(self, lease: Lease, delivery: DeliveryToSend) -> DeliveryOutcome:
        """Sends the delivery. It is snoozed if its subscriber has no free slot, now or soon."""
        subscriber, first = subscriber_key(delivery), lease.stage == "deliver"
        wait = self.limiter.acquire(subscriber, first=first)
        if wait is not None and not await self.limiter.wait(subscriber, wait, first=first):
            return DeliveryOutcome(lease, "snooze", wait_ms=round(wait * 1000))
        began, healthy, wake = time.monotonic(), None, False
        try:
            if wait is not None:  # the endpoint may have been paused meanwhile
                if (now := await self._read(lease)) is None:
                    return DeliveryOutcome(lease, "snooze")
                if (outcome := self._without_request(lease, delivery := now)) is not None:
                    return outcome
            attempt = await self._send(delivery, subscriber, first=first)
            healthy = None if attempt.ours else attempt.status not in (None, 429, 503)
        finally:
            seconds = time.monotonic() - began
            wake = self.limiter.record(subscriber, seconds, first=first, healthy=healthy)
        return self._outcome(lease, attempt, delivery.planned_at or 0, wake=wake)

    async def _send(
        self, delivery: DeliveryToSend, subscriber: str, *, first: bool
    ) -> DeliveryAttempt:
        key = f"{subscriber} {delivery.order_key}"
        self.in_order.add(key)
        try:
            return await self.sender.send(delivery, first=first)
        finally:
            self.in_order.discard(key)

    async def _record(self, outcome: DeliveryOutcome) -> bool:
        """Tries until the store commits, so that a failing store causes no second request while the
        lease lasts. False: the lease had ended.
        """
        while True:
            try:
                return await self.sender.resources.store.write(record_attempts, outcome)
            except StoreUnavailable as error:
                log.error(  # noqa: TRY400 - an unavailable store needs no traceback
                    "worker.failed",
                    stage=outcome.lease.stage,
                    key=outcome.lease.key,
                    attempt=outcome.lease.attempts,
                    wait_s=RECORD_S,
                    exception=f"{type(error).__name__}: {error}",
                )
                await asyncio.sleep(RECORD_S)

    def _without_request(self, lease: Lease, delivery: DeliveryToSend) -> DeliveryOutcome | None:
        """The outcome of a delivery that is not sent now. None: send it."""
        if delivery.state != "pending":  # it has ended, and is not due again
            return DeliveryOutcome(lease, "snooze")
        if not is_sendable(delivery) or delivery.endpoint_status == "disabled":
            return DeliveryOutcome(lease, "dead")
        if delivery.endpoint_status == "paused":
            return DeliveryOutcome(lease, "held")
        left = (delivery.paused_until or 0) - self.sender.resources.store.clock()
        if left > 0:
            return DeliveryOutcome(lease, "snooze", wait_ms=left)
        key = f"{subscriber_key(delivery)} {delivery.order_key}"
        on_its_way = delivery.order_key is not None and key in self.in_order
        return DeliveryOutcome(lease, "behind") if delivery.behind or on_its_way else None

    async def _wait_turn(self, lease: Lease, delivery: DeliveryToSend) -> DeliveryOutcome | None:
        """The outcome of a delivery whose turn by the endpoint's rate comes later. None: now."""
        assert delivery.endpoint_id is not None
        request = RateRequest(
            delivery.id, delivery.endpoint_id, delivery.slot_at, later=lease.stage == "redeliver"
        )
        wait_ms = await self.sender.resources.store.write(take_times, request)
        if wait_ms <= 0:
            return None
        # The pool looks for due rows too seldom for a rate.
        wait_s = wait_ms / 1000 + HINT_S
        asyncio.get_running_loop().call_later(wait_s, self._hint, lease.stage)
        return DeliveryOutcome(lease, "snooze", wait_ms=wait_ms)

    def _hint(self, stage: str) -> None:
        if workers := self.sender.resources.store.workers:
            workers.hinted((stage,))

    def _outcome(
        self, lease: Lease, attempt: DeliveryAttempt, planned_at: int, *, wake: bool
    ) -> DeliveryOutcome:
        result, wait_ms = result_of(attempt) or "dead", 0
        left = planned_at - self.sender.resources.store.clock()
        early = result == "dead" and left > 0
        if early:
            result, wait_ms = "retry", max(left, attempt.pause_ms)
        elif result == "dead" and lease.attempts <= len(self.schedule):
            random = self.sender.resources.random()
            wait_s = scheduled_wait(self.schedule, lease.attempts, random)
            result, wait_ms = "retry", max(round(wait_s * 1000), attempt.pause_ms)
        after_ms = round(self.disable_after_s * 1000)
        return DeliveryOutcome(lease, result, attempt, wait_ms, after_ms, wake, early)

    def _report(self, delivery: DeliveryToSend, outcome: DeliveryOutcome, leased: bool) -> None:
        assert outcome.attempt is not None
        assert delivery.event is not None
        resources, lease, result = self.sender.resources, outcome.lease, outcome.result
        called_back_at = delivery.event["called_back_at"]
        if result == "delivered" and lease.stage == "deliver" and called_back_at is not None:
            seconds = max(0, resources.clock() - called_back_at) / 1000
            resources.metrics.callback_to_delivery_seconds.observe(seconds)
        number, wait_ms = lease.attempts, outcome.wait_ms
        report(resources, delivery, outcome.attempt, result, number, wait_ms, held=leased)


def is_sendable(delivery: DeliveryToSend) -> bool:
    return None not in (delivery.event, delivery.url, delivery.secret)


def subscriber_key(delivery: DeliveryToSend) -> str:
    """The subject of a concurrency limit: an endpoint, or one origin of tasks' own addresses."""
    return str(delivery.endpoint_id or "/".join(str(delivery.url).split("/")[:3]))


def result_of(attempt: DeliveryAttempt) -> str | None:
    """None: the attempt failed, and may be tried again."""
    return "delivered" if attempt.error is None else "gone" if attempt.status == 410 else None


def report(
    resources: Resources,
    delivery: DeliveryToSend,
    attempt: DeliveryAttempt,
    result: str,
    number: int = 0,
    wait_ms: int = 0,
    *,
    held: bool = True,
) -> None:
    """Counts and logs an attempt. `held`: its lease had not ended when it was recorded."""
    resources.metrics.deliveries.labels(result).inc()
    resources.metrics.delivery_seconds.observe(attempt.duration_ms / 1000)
    fields = {name: getattr(delivery, name) for name in ("owner", "task_id", "endpoint_id")}
    fields |= {"event_id": delivery.event["id"] if delivery.event else None, **delivery.origin.ids}
    log.info(
        "delivery.attempted",
        **fields,
        status=attempt.status,
        duration_ms=attempt.duration_ms,
        error=attempt.error,
        result=result if held else "superseded",
        attempt=number,
        wait_s=wait_ms / 1000,
    )
    if held and result == "dead":
        log.error("delivery.exhausted", **fields, attempt=number)


async def send_manually(sender: WebhookSender, delivery_id: str) -> bool:
    """One attempt now, next to what is planned. False: there is nothing to send, or no address."""
    resources = sender.resources
    delivery = await resources.store.read(delivery_to_send, delivery_id)
    if delivery is None or not is_sendable(delivery):
        return False
    attempt = await sender.send(delivery)
    result = result_of(attempt) or "failed"
    report(resources, delivery, attempt, result)
    await resources.store.write(record_manual_attempts, ManualAttempt(delivery_id, result, attempt))
    return True


async def send_test(
    sender: WebhookSender, endpoint: Row, type: str = "endpoint.test", data: JSON | None = None
) -> JSON:
    """Sends an event that is not in the outbox, and returns the attempt. `data` None: it names the
    endpoint.
    """
    event = {
        "id": sender.resources.id("event"),
        "sequence": 0,
        "type": type,
        "task_id": str((data or {}).get("id") or endpoint["id"]),
        "time": sender.resources.clock(),
        "data": {"endpoint_id": endpoint["id"]} if data is None else data,
    }
    delivery = DeliveryToSend(
        id="",
        owner="",
        endpoint_id=endpoint["id"],
        task_id=None,
        state="pending",
        **{name: endpoint[name] for name in ("url", "secret", "paused_until", "headers")},
        endpoint_status=endpoint["status"],
        event=event,
    )
    attempt = await sender.post(delivery)
    return {"time": event["time"], **asdict(attempt)}
