"""Webhooks by the Standard Webhooks specification 1.0: a POST, signed over
`id.timestamp.body`.
"""

import time
from dataclasses import dataclass

from service.db.paging import Row
from service.errors import ConfigurationError, EgressError, NoPlace, NoRoute
from service.events.deliveries import DeliveryAttempt, DeliveryToSend
from service.events.documents import event_document
from service.events.secrets import valid_secrets
from service.net import Egress
from service.net.retry_after import retry_after
from service.resources import Resources
from service.signing import sign_webhook
from service.strict_json import compact_json

ANSWER_BYTES, ANSWER_S = 2048, 1.0  # of a body: the status line has decided already
PAUSE_LIMIT_S = 3600.0
EVENT_TYPE, TASK_TYPE = "application/cloudevents+json", "application/json"


@dataclass(frozen=True, slots=True)
class WebhookSender:
    """Sends signed requests. A fault of the network is a result, not an exception."""

    resources: Resources
    timeout_s: float

    async def send(self, delivery: DeliveryToSend) -> DeliveryAttempt:
        """Sends the event to the endpoint, or the task alone to its own callback_url."""
        assert delivery.event is not None
        assert delivery.url is not None
        assert delivery.secret is not None
        if delivery.endpoint_id is not None:
            return await self.send_event(delivery.event, delivery.url, delivery.secret)
        task = compact_json(event_document(delivery.event, self.resources.links)["data"])
        egress, id = self.resources.task_callbacks, delivery.event["id"]
        return await self._post(egress, delivery.url, id, task, TASK_TYPE, delivery.secret)

    async def send_event(self, event: Row, url: str, secret: bytes) -> DeliveryAttempt:
        document = compact_json(event_document(event, self.resources.links))
        egress, id = self.resources.endpoints, event["id"]
        return await self._post(egress, url, id, document, EVENT_TYPE, secret)

    async def _post(
        self, egress: Egress, url: str, id: str, document: str, content_type: str, secret: bytes
    ) -> DeliveryAttempt:
        now, attempt_id = self.resources.clock(), self.resources.id("attempt")
        try:
            secrets = valid_secrets(self.resources.keyring.decrypt(secret), now)
        except ConfigurationError as error:
            problem = f"not sent, its secret cannot be read: {error}"
            return DeliveryAttempt(attempt_id, None, 0, problem, ours=True, url=url)
        body = document.encode()
        headers = {
            "content-type": content_type,
            "webhook-id": id,
            "webhook-timestamp": str(now // 1000),
            "webhook-signature": sign_webhook(secrets, id, now // 1000, body),
        }
        started = time.perf_counter()
        try:
            answer = await egress.request(
                "POST",
                url,
                headers=headers,
                content=body,
                timeout=self.timeout_s,
                max_bytes=ANSWER_BYTES,
                body_timeout=ANSWER_S,
            )
        except EgressError as error:
            duration_ms = round((time.perf_counter() - started) * 1000)
            problem, ours = f"{type(error).__name__}: {error}", isinstance(error, NoRoute | NoPlace)
            return DeliveryAttempt(attempt_id, None, duration_ms, problem, ours=ours, url=url)
        return DeliveryAttempt(
            attempt_id,
            answer.status,
            round(answer.duration * 1000),
            None if 200 <= answer.status < 300 else f"answered {answer.status}",
            answer.body,
            pause_ms=self._pause_ms(answer.status, answer.headers.get("retry-after")),
            url=url,
        )

    def _pause_ms(self, status: int, header: str | None) -> int:
        now_s = self.resources.clock() / 1000
        asked = retry_after(header, now_s, PAUSE_LIMIT_S) if status in (429, 503) else None
        return round((asked or 0) * 1000)
