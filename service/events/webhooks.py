"""Webhooks by the Standard Webhooks specification 1.0: a POST, signed over
`id.timestamp.body`.
"""

import json
import time
from dataclasses import dataclass

from service.errors import ConfigurationError, EgressError, NoPlace, NoRoute
from service.events.documents import event_document
from service.events.endpoints import DeliveryAttempt
from service.events.outbox import DeliveryToSend
from service.events.secrets import valid_secrets
from service.net.responses import retry_after
from service.ops import tracing
from service.resources import Resources
from service.signing import sign_webhook
from service.strict_json import compact_json

ANSWER_BYTES, ANSWER_S = 2048, 1.0  # of a body: the status line has decided already
PAUSE_LIMIT_S = 3600.0
PROBLEM_CHARS = 500
EVENT_TYPE, TASK_TYPE = "application/cloudevents+json", "application/json"


@dataclass(frozen=True, slots=True)
class WebhookSender:
    """Sends signed requests. An error before the request is a failed attempt, not an exception."""

    resources: Resources
    timeout_s: float

    async def send(self, delivery: DeliveryToSend, *, first: bool = False) -> DeliveryAttempt:
        """Sends the event to the endpoint, or the task alone to its own callback_url.

        Only a `first` attempt soon after the event belongs to the task's trace.
        """
        assert delivery.event is not None
        event, to = delivery.event, delivery.endpoint_id or "callback_url"
        late = not first or self.resources.clock() - event["time"] > tracing.FRESH_MS
        about = tracing.message_attributes(
            "webhook", to, event["id"], event["type"], event["task_id"]
        )
        parent = event["traceparent"]
        with tracing.span(f"send {to}", "producer", parent, linked=late, attributes=about) as span:
            attempt = await self.post(delivery)
            if attempt.error is not None:
                span.fail(str(attempt.status or "no_answer"))
        return attempt

    async def post(self, delivery: DeliveryToSend) -> DeliveryAttempt:
        """Like `send`, without a trace."""
        resources, to_endpoint = self.resources, delivery.endpoint_id is not None
        egress = resources.endpoints if to_endpoint else resources.task_callbacks
        attempt_id, started = resources.id("attempt"), time.perf_counter()
        ours = False
        try:
            url, headers, body = self.signed_request(delivery)
            answer = await egress.request(
                "POST",
                url,
                headers=headers,
                content=body,
                timeout=self.timeout_s,
                max_bytes=ANSWER_BYTES,
                body_timeout=ANSWER_S,
            )
        except ConfigurationError as error:
            problem, ours = f"not sent, its secret cannot be read: {error}", True
        except EgressError as error:
            problem, ours = f"{type(error).__name__}: {error}", isinstance(error, NoRoute | NoPlace)
        except Exception as error:  # noqa: BLE001 - an attempt like any other, so that it has an end
            problem = f"not sent, {type(error).__name__}: {error}"[:PROBLEM_CHARS]
        else:
            return DeliveryAttempt(
                attempt_id,
                answer.status,
                round(answer.duration * 1000),
                None if 200 <= answer.status < 300 else f"answered {answer.status}",
                answer.body,
                pause_ms=self._pause_ms(answer.status, answer.headers.get("retry-after")),
                url=delivery.url,
            )
        duration_ms = round((time.perf_counter() - started) * 1000)
        return DeliveryAttempt(attempt_id, None, duration_ms, problem, ours=ours, url=delivery.url)

    def signed_request(self, delivery: DeliveryToSend) -> tuple[str, dict[str, str], bytes]:
        """The address, the headers and the body of an attempt that is made now. The endpoint's
        static headers are among them.
        """
        event, url, secret = delivery.event, delivery.url, delivery.secret
        assert event is not None
        assert url is not None
        assert secret is not None
        now, endpoint_id = self.resources.clock(), delivery.endpoint_id
        document = event_document(event, self.resources.links)
        body = compact_json(document["data"] if endpoint_id is None else document).encode()
        keyring, id, time_s = self.resources.keyring, event["id"], now // 1000
        secrets = valid_secrets(keyring.decrypt(secret), now)
        signatures = sign_webhook(secrets, id, time_s, body)
        if endpoint_id is not None:
            signatures += " " + keyring.sign_openly(endpoint_id, id, time_s, body)
        static = json.loads(keyring.decrypt(delivery.headers)) if delivery.headers else {}
        headers = {
            **{name.lower(): value for name, value in static.items()},
            "content-type": TASK_TYPE if endpoint_id is None else EVENT_TYPE,
            "webhook-id": id,
            "webhook-timestamp": str(time_s),
            "webhook-signature": signatures,
        }
        return url, headers, body

    def _pause_ms(self, status: int, header: str | None) -> int:
        now_s = self.resources.clock() / 1000
        asked = retry_after(header, now_s, PAUSE_LIMIT_S) if status in (429, 503) else None
        return round((asked or 0) * 1000)
