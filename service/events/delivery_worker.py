"""Delivering: one signed attempt at a subscriber, and what it leads to. First attempts and retries
have places of their own.
"""

import asyncio
import time
from dataclasses import asdict, dataclass, field, replace

import structlog

from service.db.paging import Row
from service.db.transaction import Lease
from service.errors import StoreUnavailable
from service.events import event_queries
from service.events.delivery_records import (
    Attempt,
    ByHand,
    Outcome,
    record_attempts,
    record_by_hand,
)
from service.events.event_queries import Parcel
from service.events.webhooks import SendResult, WebhookSender
from service.ids import rfc3339
from service.queue import leases
from service.queue.backoff import retry_after, wait_before
from service.queue.checkpoints import checkpoint
from service.queue.limiter import EndpointLimiter
from service.resources import Resources
from service.strict_json import JSON

log = structlog.get_logger()

PAUSE_LIMIT_S = 3600.0
RECORD_S = 1.0  # before another attempt to record one
LATE = 1000  # outcomes under leases that had ended


@dataclass(frozen=True, slots=True)
class Deliverer:
    """Stages `deliver` and `redeliver`."""

    sender: WebhookSender
    schedule: tuple[float, ...]
    disable_after_s: float
    limiter: EndpointLimiter = field(default_factory=lambda: EndpointLimiter(time.monotonic))
    unrecorded: dict[str, Outcome] = field(default_factory=dict)

    @property
    def resources(self) -> Resources:
        return self.sender.resources

    async def run(self, lease: Lease) -> None:
        parcel = await self.resources.store.read(event_queries.parcel, lease.key)
        if parcel is None or parcel.delivery["state"] != "pending":
            await self.resources.store.write(leases.done, lease)
            return
        checkpoint("delivery.claimed")
        known = self.unrecorded.get(lease.key)
        if (
            known and known.lease.fence == lease.fence - 1
        ):  # it was sent, but its lease ended before the store took that down
            await self._record(replace(known, lease=lease))
            return
        outcome = self._not_now(lease, parcel)
        if outcome is not None or parcel.event is None:
            await self.resources.store.write(record_attempts, outcome or Outcome(lease, "dead"))
            return
        subscriber, first = subscriber_of(parcel), lease.stage == "deliver"
        wait = self.limiter.acquire(subscriber, first=first)
        if wait is not None:
            await self.resources.store.write(
                record_attempts, Outcome(lease, "later", wait_ms=round(wait * 1000))
            )
            return
        began, well, waited = time.monotonic(), None, False
        try:
            sent = await self.sender.send(parcel, parcel.event)
            well = None if sent.ours else sent.status not in (None, 429, 503)
        finally:
            waited = self.limiter.record(
                subscriber, time.monotonic() - began, first=first, healthy=well
            )
        checkpoint("delivery.answered")
        outcome = replace(self._judge(lease, parcel, sent), waited=waited, url=address_of(parcel))
        held = await self._record(outcome)
        checkpoint("delivery.recorded")
        self._tell(lease, parcel, parcel.event, sent, outcome, held)

    async def _record(self, outcome: Outcome) -> bool:
        """Until the store takes it down: what was sent must not be sent again because that failed.

        Where the lease has ended the outcome is kept for whoever of this process has the next one:
        it may be about to look.
        """
        key = outcome.lease.key
        self.unrecorded.pop(key, None)
        self.unrecorded[key] = outcome
        if len(self.unrecorded) > LATE:
            del self.unrecorded[next(iter(self.unrecorded))]
        while True:
            try:
                held = await self.resources.store.write(record_attempts, outcome)
            except StoreUnavailable as error:
                known = lost(outcome.lease, error)
                # a store that is away needs no traceback
                log.error("worker.failed", **known)  # noqa: TRY400
                await asyncio.sleep(RECORD_S)
            else:
                if held:
                    self.unrecorded.pop(key, None)
                return held

    def _not_now(self, lease: Lease, parcel: Parcel) -> Outcome | None:
        """An endpoint that is gone, paused, or asked for peace."""
        endpoint = parcel.endpoint
        if endpoint is None:
            return (
                None if parcel.callback_url and parcel.callback_secret else Outcome(lease, "dead")
            )
        if endpoint["status"] == "disabled":
            return Outcome(lease, "dead")
        if endpoint["status"] == "paused":
            return Outcome(lease, "held")
        left = (endpoint["paused_until"] or 0) - self.resources.store.clock()
        return Outcome(lease, "later", wait_ms=left) if left > 0 else None

    def _judge(self, lease: Lease, parcel: Parcel, sent: SendResult) -> Outcome:
        attempt = attempt_of(self.resources, sent)
        disable_after_ms = round(self.disable_after_s * 1000)
        if sent.error is None:
            return Outcome(lease, "delivered", attempt)
        if sent.status == 410:
            return Outcome(lease, "gone", attempt)
        wait = wait_before(
            self.schedule,
            lease.attempts,
            repeat_last=False,
            random=self.resources.random(),
            spread=0.2,
        )
        pause_ms = asked_for(self.resources, sent)
        if wait is None:
            return Outcome(lease, "dead", attempt, 0, pause_ms, sent.ours, disable_after_ms)
        wait_ms = max(round(wait * 1000), pause_ms)
        return Outcome(lease, "retry", attempt, wait_ms, pause_ms, sent.ours, disable_after_ms)

    def _tell(
        self,
        lease: Lease,
        parcel: Parcel,
        event: Row,
        sent: SendResult,
        outcome: Outcome,
        held: bool,
    ) -> None:
        metrics = self.resources.metrics
        if (
            outcome.result == "delivered"
            and event["called_back_at"] is not None
            and lease.stage == "deliver"
        ):
            metrics.callback_to_delivery.observe(
                max(0, self.resources.clock() - event["called_back_at"]) / 1000
            )
        known = _measured(self.resources, parcel, event, sent, outcome.result)
        _attempted(
            known, sent, outcome.result if held else "superseded", lease.attempts, outcome.wait_ms
        )
        if held and outcome.result == "dead":
            log.error("delivery.exhausted", **known, attempt=lease.attempts)


def _measured(
    resources: Resources, parcel: Parcel, event: Row, sent: SendResult, result: str
) -> JSON:
    """Counts an attempt; what its lines have in common."""
    resources.metrics.deliveries.labels(result).inc()
    resources.metrics.delivery_seconds.observe(sent.duration)
    delivery = parcel.delivery
    known = {name: delivery[name] for name in ("owner", "task_id", "endpoint_id")}
    return {**known, "event_id": event["id"]}


def _attempted(known: JSON, sent: SendResult, result: str, attempt: int, wait_ms: int) -> None:
    figures = {
        "status": sent.status,
        "duration_ms": round(sent.duration * 1000),
        "error": sent.error,
    }
    log.info(
        "delivery.attempted",
        **known,
        **figures,
        result=result,
        attempt=attempt,
        wait_s=wait_ms / 1000,
    )


def asked_for(resources: Resources, sent: SendResult) -> int:
    """How long the subscriber wants peace, in milliseconds."""
    asked = (
        retry_after(sent.retry_after, resources.clock() / 1000, PAUSE_LIMIT_S)
        if sent.status in (429, 503)
        else None
    )
    return round((asked or 0) * 1000)


def address_of(parcel: Parcel) -> str | None:
    """An endpoint's, when it was sent to."""
    return parcel.endpoint["url"] if parcel.endpoint else None


def subscriber_of(parcel: Parcel) -> str:
    """Who is spared together: an endpoint, or all that answers at one origin for tasks' own
    addresses.
    """
    return str(parcel.delivery["endpoint_id"] or "/".join(str(parcel.callback_url).split("/")[:3]))


async def send_by_hand(sender: WebhookSender, delivery_id: str) -> bool:
    """One attempt now, beside whatever is planned; False: there is nothing to send, or nobody to
    send it to.
    """
    resources = sender.resources
    parcel = await resources.store.read(event_queries.parcel, delivery_id)
    if (
        parcel is None
        or parcel.event is None
        or (parcel.endpoint is None and not (parcel.callback_url and parcel.callback_secret))
    ):
        return False
    sent = await sender.send(parcel, parcel.event)
    result = "delivered" if sent.error is None else "gone" if sent.status == 410 else "failed"
    _attempted(_measured(resources, parcel, parcel.event, sent, result), sent, result, 0, 0)
    attempt, pause_ms = attempt_of(resources, sent), asked_for(resources, sent)
    await resources.store.write(
        record_by_hand, ByHand(delivery_id, result, attempt, pause_ms, address_of(parcel))
    )
    return True


async def send_test(sender: WebhookSender, endpoint: Row) -> JSON:
    """An event of no task, which is in no outbox, by the path of a real one."""
    now = sender.resources.clock()
    sent = await sender.send_test(endpoint)
    return {"time": now, **asdict(attempt_of(sender.resources, sent))}


def attempt_of(resources: Resources, sent: SendResult) -> Attempt:
    return Attempt(
        resources.id("attempt"), sent.status, round(sent.duration * 1000), sent.error, sent.answer
    )


def lost(lease: Lease, error: Exception) -> JSON:
    known = {"stage": lease.stage, "key": lease.key, "attempt": lease.attempts, "wait_s": RECORD_S}
    return {**known, "exception": f"{type(error).__name__}: {error}"}


def delivery_document(row: Row, attempts: list[Row], *, answers: bool) -> JSON:
    """A delivery as clients see it; `answers`: with the first 2 KiB of what the subscriber said
    (admin).
    """
    return {
        "id": row["id"],
        "endpoint": row["endpoint_id"],
        "event": row["event_id"],
        "task": row["task_id"],
        "state": row["state"],
        "created_at": rfc3339(row["created_at"]),
        "next_attempt_at": rfc3339(row["due_at"])
        if row["state"] == "pending" and row["due_at"]
        else None,
        "attempts": [attempt_document(attempt, answers=answers) for attempt in attempts],
    }


def attempt_document(attempt: Row, *, answers: bool) -> JSON:
    return {
        "id": attempt["id"],
        "time": rfc3339(attempt["time"]),
        "status": attempt["status"],
        "duration_ms": attempt["duration_ms"],
        "error": attempt["error"],
        "answer": (attempt["answer"] or b"").decode("utf-8", "replace") if answers else None,
    }
