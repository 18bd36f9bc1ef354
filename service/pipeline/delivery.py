"""Delivering: one signed attempt at a subscriber, and what it leads to. First attempts and retries have places of their own."""

import json
from dataclasses import dataclass

import structlog

from service import model
from service.pipeline.checkpoints import checkpoint
from service.pipeline.outbox import render, written
from service.pipeline.retry import retry_after, wait_before
from service.resources import Resources
from service.sinks import Sent
from service.store import Grant, queries
from service.store.operations import leases
from service.store.operations.deliveries import Attempt, Outcome, record_attempts
from service.store.queries import Parcel
from service.store.records import Row

log = structlog.get_logger()

PAUSE_LIMIT_S = 3600.0


def encode_secrets(secrets: list[str]) -> str:
    """An endpoint's secrets as they are encrypted: the newest first, each with the time (milliseconds) its overlap ends."""
    return json.dumps([[secret, None] for secret in secrets])


def valid_secrets(text: str, now: int) -> list[str]:
    return [secret for secret, until in json.loads(text) if until is None or until > now]


@dataclass(frozen=True, slots=True)
class Deliverer:
    """Stages `deliver` and `redeliver`."""

    resources: Resources
    schedule: tuple[float, ...]
    disable_after_s: float

    async def run(self, grant: Grant) -> None:
        parcel = await self.resources.store.read(queries.parcel, grant.key)
        if parcel is None or parcel.delivery["state"] != "pending" or parcel.event is None:
            await self.resources.store.write(leases.done, grant)
            return
        checkpoint("delivery.claimed")
        outcome = self._not_now(grant, parcel)
        sent = None
        if outcome is None:
            sent = await self._send(parcel, parcel.event)
            checkpoint("delivery.answered")
            outcome = self._judge(grant, parcel, sent)
        held = await self.resources.store.write(record_attempts, outcome)
        checkpoint("delivery.recorded")
        if sent is not None:
            self._tell(grant, parcel, parcel.event, sent, outcome, held)

    def _not_now(self, grant: Grant, parcel: Parcel) -> Outcome | None:
        """An endpoint that is gone, paused, or asked for peace."""
        endpoint = parcel.endpoint
        if endpoint is None:
            return None if parcel.callback_url and parcel.callback_secret else Outcome(grant, "dead")
        if endpoint["status"] == "disabled":
            return Outcome(grant, "dead")
        if endpoint["status"] == "paused":
            return Outcome(grant, "held")
        left = (endpoint["paused_until"] or 0) - self.resources.store.clock()
        return Outcome(grant, "later", wait_ms=left) if left > 0 else None

    async def _send(self, parcel: Parcel, event: Row) -> Sent:
        keyring, now = self.resources.keyring, self.resources.clock()
        document = render(event, self.resources.links)
        if parcel.endpoint is not None:
            body = written(document).encode()
            secrets = valid_secrets(keyring.decrypt(parcel.endpoint["secret"]), now)
            return await self.resources.webhooks.send(
                parcel.endpoint["url"], event["id"], now // 1000, body, "application/cloudevents+json", secrets
            )
        assert parcel.callback_url is not None
        assert parcel.callback_secret is not None
        body = written(document["data"]).encode()
        secret = keyring.decrypt(parcel.callback_secret)
        return await self.resources.task_callbacks.send(parcel.callback_url, event["id"], now // 1000, body, "application/json", [secret])

    def _judge(self, grant: Grant, parcel: Parcel, sent: Sent) -> Outcome:
        attempt = Attempt(self.resources.id("attempt"), sent.status, round(sent.duration * 1000), sent.error, sent.answer)
        disable_after_ms = round(self.disable_after_s * 1000)
        if sent.error is None:
            return Outcome(grant, "delivered", attempt)
        if sent.status == 410:
            return Outcome(grant, "gone", attempt)
        wait = wait_before(self.schedule, grant.attempts, repeat_last=False, random=self.resources.random(), spread=0.2)
        if wait is None:
            return Outcome(grant, "dead", attempt, disable_after_ms=disable_after_ms)
        asked = retry_after(sent.retry_after, self.resources.clock() / 1000, PAUSE_LIMIT_S) if sent.status in (429, 503) else None
        pause_ms = round((asked or 0) * 1000)
        return Outcome(
            grant, "retry", attempt, wait_ms=max(round(wait * 1000), pause_ms), pause_ms=pause_ms, disable_after_ms=disable_after_ms
        )

    def _tell(self, grant: Grant, parcel: Parcel, event: Row, sent: Sent, outcome: Outcome, held: bool) -> None:
        metrics = self.resources.metrics
        metrics.deliveries.labels(outcome.result).inc()
        metrics.delivery_seconds.observe(sent.duration)
        if outcome.result == "delivered" and event["called_back_at"] is not None and grant.attempts == 1:
            metrics.callback_to_delivery.observe(max(0, self.resources.clock() - event["called_back_at"]) / 1000)
        known = {
            "owner": parcel.delivery["owner"],
            "task_id": parcel.delivery["task_id"],
            "event_id": event["id"],
            "endpoint_id": parcel.delivery["endpoint_id"],
        }
        log.info(
            "delivery.attempted",
            **known,
            status=sent.status,
            result=outcome.result if held else "superseded",
            attempt=grant.attempts,
            duration_ms=round(sent.duration * 1000),
            error=sent.error,
            wait_s=outcome.wait_ms / 1000,
        )
        if held and outcome.result == "dead":
            log.error("delivery.exhausted", **known, attempt=grant.attempts)


def delivery_document(row: Row, attempts: list[Row], *, answers: bool) -> model.JSON:
    """A delivery as clients see it; `answers`: with the first 2 KiB of what the subscriber said (admin)."""
    return {
        "id": row["id"],
        "endpoint": row["endpoint_id"],
        "event": row["event_id"],
        "task": row["task_id"],
        "state": row["state"],
        "created_at": model.rfc3339(row["created_at"]),
        "next_attempt_at": model.rfc3339(row["due_at"]) if row["state"] == "pending" and row["due_at"] else None,
        "attempts": [
            {
                "id": attempt["id"],
                "time": model.rfc3339(attempt["time"]),
                "status": attempt["status"],
                "duration_ms": attempt["duration_ms"],
                "error": attempt["error"],
            }
            | ({"answer": (attempt["answer"] or b"").decode("utf-8", "replace")} if answers else {})
            for attempt in attempts
        ],
    }
