"""Webhooks by the Standard Webhooks specification 1.0: a POST, signed over
`id.timestamp.body`.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from service.db.paging import Row
from service.errors import ConfigurationError, EgressError, NoPlace, NoRoute
from service.events.deliveries import DeliveryToSend
from service.events.documents import compact_json, event_document
from service.events.secrets import valid_secrets
from service.net import Egress
from service.resources import Resources
from service.signing import sign_webhook

ANSWER_BYTES = 2048
EVENT_TYPE, TASK_TYPE = "application/cloudevents+json", "application/json"


@dataclass(frozen=True, slots=True)
class WebhookResult:
    """One request. `status` None: no response came, and `error` says why. `ours`: the fault is on
    this side and says nothing about the subscriber.
    """

    status: int | None
    duration: float
    error: str | None = None
    retry_after: str | None = None  # the response's header
    answer: bytes = b""  # the first 2 KiB of the response
    ours: bool = False


@dataclass(frozen=True, slots=True)
class WebhookSender:
    """Sends signed requests. A fault of the network is a result, not an exception."""

    resources: Resources
    timeout_s: float

    async def send(self, delivery: DeliveryToSend) -> WebhookResult:
        """Sends the event to the endpoint, or the task alone to its own callback_url."""
        assert delivery.event is not None
        assert delivery.url is not None
        assert delivery.secret is not None
        if delivery.endpoint_id is not None:
            return await self.send_event(delivery.event, delivery.url, delivery.secret)
        task = compact_json(event_document(delivery.event, self.resources.links)["data"])
        egress, id = self.resources.task_callbacks, delivery.event["id"]
        return await self._post(egress, delivery.url, id, task, TASK_TYPE, delivery.secret)

    async def send_event(self, event: Row, url: str, secret: bytes) -> WebhookResult:
        document = compact_json(event_document(event, self.resources.links))
        egress, id = self.resources.endpoints, event["id"]
        return await self._post(egress, url, id, document, EVENT_TYPE, secret)

    async def _post(
        self, egress: Egress, url: str, id: str, body: str, content_type: str, secret: bytes
    ) -> WebhookResult:
        now = self.resources.clock()
        try:
            secrets = valid_secrets(self.resources.keyring.decrypt(secret), now)
        except ConfigurationError as error:
            problem = f"not sent, its secret cannot be read: {error}"
            return WebhookResult(None, 0.0, problem, ours=True)
        return await post_webhook(
            egress, url, id, now // 1000, body.encode(), content_type, secrets, self.timeout_s
        )


async def post_webhook(
    egress: Egress,
    url: str,
    id: str,
    timestamp: int,
    body: bytes,
    content_type: str,
    secrets: Sequence[str],
    timeout_s: float,
) -> WebhookResult:
    """One POST with the headers of Standard Webhooks. `timestamp` is in seconds."""
    headers = {
        "content-type": content_type,
        "webhook-id": id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": sign_webhook(secrets, id, timestamp, body),
    }
    started = time.perf_counter()
    try:
        answer = await egress.request(
            "POST", url, headers=headers, content=body, timeout=timeout_s, max_bytes=ANSWER_BYTES
        )
    except EgressError as error:
        duration, ours = time.perf_counter() - started, isinstance(error, NoRoute | NoPlace)
        return WebhookResult(None, duration, f"{type(error).__name__}: {error}", ours=ours)
    problem = None if 200 <= answer.status < 300 else f"answered {answer.status}"
    retry_after = answer.headers.get("retry-after")
    return WebhookResult(answer.status, answer.duration, problem, retry_after, answer.body)
